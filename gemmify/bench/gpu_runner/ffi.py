"""TVM's runtime through its C interface alone (tvm-ffi's c_api.h): no package of TVM's is needed, of whatever Python.

`Runtime` loads the libraries and finds global functions; a `Function` takes and returns None, numbers, text, `Device`
and the objects below. Objects are counted references; they give theirs back when Python drops them.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any, NamedTuple

CPU, CUDA = 1, 2
"""DLPack's device types."""
_NONE, _INT, _BOOL, _FLOAT, _DEVICE, _RAW_STR, _SMALL_STR = 0, 1, 2, 3, 6, 8, 11
_STR, _ERROR, _FUNCTION, _TENSOR, _ARRAY, _MODULE = 65, 67, 68, 70, 71, 73
_HEADER = 24  # bytes of TVMFFIObject in front of what an object holds
_OBJECTS = 64  # type indices from here on are counted references
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}
KEPT: list[Any] = []
"""What C++ may still point to when Python has dropped it: a hundred bytes a tensor."""


class RuntimeFailure(RuntimeError):
    """A call into TVM's runtime failed; the text is its own."""


class Device(NamedTuple):
    """A device by DLPack's type and its number."""

    kind: int
    number: int = 0


class _Value(ctypes.Structure):
    _fields_ = [("index", ctypes.c_int32), ("small", ctypes.c_uint32), ("bits", ctypes.c_uint64)]


class _Bytes(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("size", ctypes.c_size_t)]


class _Raw(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_int64)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("number", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]


@_Deleter
def _keep(_managed: int) -> None:
    """The memory belongs to whoever made the tensor."""


class Object:
    """A counted reference."""

    def __init__(self, lib: Any, handle: int) -> None:
        self._lib, self.handle = lib, handle

    def __del__(self) -> None:
        self._lib.TVMFFIObjectDecRef(ctypes.c_void_p(self.handle))


class Function(Object):
    """A packed function."""

    def __call__(self, *args: Any) -> Any:
        values, alive = (_Value * max(1, len(args)))(), []
        for value, arg in zip(values, args, strict=False):
            value.index, value.bits, keep = _given(arg)
            alive.append(keep)
        result = _Value(0, 0, 0)
        failed = self._lib.TVMFFIFunctionCall(
            ctypes.c_void_p(self.handle), values, ctypes.c_int32(len(args)), ctypes.byref(result)
        )
        if failed:
            raise RuntimeFailure(_raised(self._lib))
        return _found(self._lib, result, owned=True)


class Tensor(Object):
    """A tensor; `data` is its address."""

    @property
    def data(self) -> int:
        view = _DLTensor.from_address(self.handle + _HEADER)
        return int(view.data or 0) + int(view.offset)

    @property
    def shape(self) -> tuple[int, ...]:
        view = _DLTensor.from_address(self.handle + _HEADER)
        return tuple(view.shape[i] for i in range(view.dims))


class Module(Object):
    """A loaded library, or the virtual machine in it."""

    runtime: Runtime

    def __getitem__(self, name: str) -> Function:
        found = self.runtime.function("ffi.ModuleGetFunction")(self, name, True)
        if found is None:
            raise RuntimeFailure(f"the library has no function {name}")
        assert isinstance(found, Function)
        return found


def _given(arg: Any) -> tuple[int, int, Any]:
    """(type index, bits, what must stay alive during the call) of an argument."""
    if arg is None:
        return _NONE, 0, None
    if isinstance(arg, bool):
        return _BOOL, int(arg), None
    if isinstance(arg, int):
        return _INT, arg & 0xFFFFFFFFFFFFFFFF, None
    if isinstance(arg, float):
        return _FLOAT, struct.unpack("<Q", struct.pack("<d", arg))[0], None
    if isinstance(arg, Device):
        return _DEVICE, (arg.number << 32) | arg.kind, None
    if isinstance(arg, str):
        text = ctypes.create_string_buffer(arg.encode())
        return _RAW_STR, ctypes.addressof(text), text
    assert isinstance(arg, Object), f"{arg!r} cannot be handed to TVM's runtime"
    kind = ctypes.c_int32.from_address(arg.handle + 8).value
    return kind, arg.handle, arg


def _found(lib: Any, value: _Value, owned: bool) -> Any:
    """What a call returned. `owned`: the reference is this one's to give back."""
    kind, bits = value.index, value.bits
    if kind < _OBJECTS:
        return _plain(value)
    if kind == _STR:
        raw = _Raw.from_address(bits + _HEADER)
        text = ctypes.string_at(raw.data, raw.size).decode()
        if owned:
            lib.TVMFFIObjectDecRef(ctypes.c_void_p(bits))
        return text
    if not owned:
        lib.TVMFFIObjectIncRef(ctypes.c_void_p(bits))
    if kind == _ARRAY:
        whole = Object(lib, bits)
        cell = _Array.from_address(bits + _HEADER)
        items = [_Value.from_address(cell.data + 16 * i) for i in range(cell.size)]
        found = [_found(lib, item, owned=False) for item in items]
        del whole
        return found
    return {_FUNCTION: Function, _TENSOR: Tensor, _MODULE: Module}.get(kind, Object)(lib, bits)


def _plain(value: _Value) -> Any:
    kind, bits = value.index, value.bits
    if kind == _NONE:
        return None
    if kind == _BOOL:
        return bool(bits)
    if kind == _INT:
        return bits - (1 << 64) if bits >> 63 else bits
    if kind == _FLOAT:
        return struct.unpack("<d", struct.pack("<Q", bits))[0]
    if kind == _SMALL_STR:
        return struct.pack("<Q", bits)[: value.small].decode()
    raise RuntimeFailure(f"TVM's runtime returned a value of type {kind}, which is not known here")


def _raised(lib: Any) -> str:
    """The text of the error that is pending, without its traceback."""
    handle = ctypes.c_void_p()
    lib.TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
    if not handle.value:
        return "TVM's runtime failed without a word"
    kind = _Raw.from_address(handle.value + _HEADER)
    said = _Raw.from_address(handle.value + _HEADER + ctypes.sizeof(_Raw))
    words = [ctypes.string_at(part.data, part.size).decode(errors="replace") for part in (kind, said)]
    lib.TVMFFIObjectDecRef(handle)
    return ": ".join(" ".join(word.split()) for word in words)[:600]


class Runtime:
    """TVM's libraries in this process. `folder` holds libtvm_ffi.so, libtvm_runtime.so and libtvm_runtime_cuda.so."""

    def __init__(self, folder: str) -> None:
        found = [os.path.join(folder, f"lib{name}.so") for name in ("tvm_ffi", "tvm_runtime", "tvm_runtime_cuda")]
        try:
            loaded = [ctypes.CDLL(path, ctypes.RTLD_GLOBAL) for path in found]
        except OSError as err:
            raise RuntimeFailure(f"TVM's runtime cannot be loaded: {err}") from err
        self.lib = loaded[0]
        self.lib.TVMFFIErrorMoveFromRaised.restype = None
        self._functions: dict[str, Function] = {}

    def function(self, name: str) -> Function:
        """The global function `name`; RuntimeFailure where there is none."""
        if name not in self._functions:
            raw, handle = name.encode(), ctypes.c_void_p()
            self._check(self.lib.TVMFFIFunctionGetGlobal(ctypes.byref(_Bytes(raw, len(raw))), ctypes.byref(handle)))
            if not handle.value:
                raise RuntimeFailure(f"TVM's runtime has no function {name}")
            self._functions[name] = Function(self.lib, handle.value)
        return self._functions[name]

    def load(self, path: str) -> Module:
        """The shared library `path` as a module."""
        module = self.function("ffi.Module.load_from_file.so")(path, "so")
        assert isinstance(module, Module)
        return self.bound(module)

    def bound(self, module: Module) -> Module:
        """`module`, which can then find its functions."""
        module.runtime = self
        return module

    def set_stream(self, stream: int, device: int = 0) -> None:
        """Kernels of this thread run on `stream` (a cudaStream_t) from now on."""
        self._check(self.lib.TVMFFIEnvSetStream(CUDA, device, ctypes.c_void_p(stream), None))

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str, device: Device) -> Tensor:
        """A tensor over memory that belongs to the caller, who must keep it as long as the tensor is used."""
        bits = int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))
        sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
        steps = (ctypes.c_int64 * max(1, len(shape)))(*_row_major(shape))
        code = _CODES[dtype.rstrip("0123456789")]
        view = _DLTensor(address, device.kind, device.number, len(shape), code, bits, 1, sizes, steps, 0)
        managed, handle = _Managed(view, None, _keep), ctypes.c_void_p()
        KEPT.append((managed, sizes, steps))
        self._check(self.lib.TVMFFITensorFromDLPack(ctypes.byref(managed), 0, 0, ctypes.byref(handle)))
        assert handle.value
        return Tensor(self.lib, handle.value)

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeFailure(_raised(self.lib))


def _row_major(shape: tuple[int, ...]) -> list[int]:
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return steps[::-1]
