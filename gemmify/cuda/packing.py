"""The binary that a library of TVM's carries its imported modules in, with the device code as machine code.

A compiler without a GPU beside it leaves CUDA *text* in that binary, which only a machine with nvcc could load. Here
the text is exchanged for the fatbin that nvcc made of it, and the result written as an object file for the linker.

The layout is that of tvm-ffi's library loader (src/ffi/extra/library_module.cc), little endian, sizes as u64:

    [bytes that follow][offsets: vector of u64][children: vector of u64]       the import tree, compressed by rows
    then for each module [kind: string], and unless the kind is "_lib" (the library's own code) [its bytes: string]

and of a module of kind "cuda": [format: string][kernels: map of name -> (name, argument types, launch parameters,
tags)][code: string], the format "cuda" for text, "fatbin", "cubin" or "ptx" for what the driver takes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SYMBOL = "__tvm_ffi__library_bin"
TEXT, BINARY = "cuda", "fatbin"
_LIBRARY = b"_lib"
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class CudaModule:
    """A serialised module of kind "cuda": the format of its code, its table of kernels as it stands, and the code."""

    format: str
    table: bytes
    kernels: tuple[str, ...]
    code: bytes

    def pack(self) -> bytes:
        """The bytes that the loader of the kind "cuda" reads."""
        return _string(self.format.encode()) + self.table + _string(self.code)

    @staticmethod
    def unpack(data: memoryview) -> CudaModule:
        """The inverse of `pack`; ValueError where `data` is no such module."""
        reader = _Reader(data)
        name = bytes(reader.string()).decode()
        start = reader.at
        kernels = tuple(_kernel(reader) for _ in range(reader.count(1)))
        table = bytes(data[start : reader.at])
        code = bytes(reader.string())
        reader.end()
        return CudaModule(name, table, kernels, code)


def _kernel(reader: _Reader) -> str:
    """Step over one entry of the table of kernels; returns its name."""
    name = bytes(reader.string()).decode()
    reader.string()
    reader.take(4 * reader.count(4))  # DLDataType
    for _ in range(reader.count(8)):
        reader.string()
    reader.take(4 * reader.count(4))
    return name


class _Reader:
    """Reads the parts of a binary in order; ValueError where it ends too early."""

    def __init__(self, data: memoryview, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"a packed module ends at byte {len(self.data)}, {size} more were expected at {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def count(self, least: int) -> int:
        """A number of things that take `least` bytes each at least."""
        (number,) = _U64.unpack(self.take(_U64.size))
        if number * least > len(self.data) - self.at:
            raise ValueError(f"a packed module announces {number} parts at byte {self.at}, more than it can hold")
        return int(number)

    def string(self) -> memoryview:
        return self.take(self.count(1))

    def end(self) -> None:
        if self.at != len(self.data):
            raise ValueError(f"a packed module has {len(self.data) - self.at} bytes too many")


def _string(data: bytes) -> bytes:
    return _U64.pack(len(data)) + data


@dataclass(frozen=True)
class Packed:
    """The imports of a library: the tree as it stands, and (kind, bytes) of each module, no bytes of "_lib"."""

    tree: memoryview
    modules: tuple[tuple[str, memoryview | None], ...]

    @staticmethod
    def unpack(data: memoryview) -> Packed:
        """Take apart what TVM packed; ValueError where the layout is not the expected one."""
        reader = _Reader(data)
        if reader.count(1) != len(data) - _U64.size:
            raise ValueError(f"a packed module announces other than its {len(data)} bytes")
        start = reader.at
        rows = reader.count(8)
        reader.take(8 * rows)
        reader.take(8 * reader.count(8))
        tree = data[start : reader.at]
        modules: list[tuple[str, memoryview | None]] = []
        for _ in range(rows - 1):
            kind = bytes(reader.string())
            modules.append((kind.decode(), None if kind == _LIBRARY else reader.string()))
        reader.end()
        return Packed(tree, tuple(modules))

    def cuda_modules(self) -> tuple[CudaModule, ...]:
        """The modules of kind "cuda", in order."""
        return tuple(CudaModule.unpack(data) for kind, data in self.modules if kind == "cuda" and data is not None)

    def compiled(self, compiler: Callable[[str], bytes]) -> Packed:
        """The same with every CUDA text exchanged for the fatbin that `compiler` makes of it."""
        modules = []
        for kind, data in self.modules:
            if kind == "cuda" and data is not None:
                module = CudaModule.unpack(data)
                if module.format == TEXT:
                    image = compiler(module.code.decode())
                    data = memoryview(CudaModule(BINARY, module.table, module.kernels, image).pack())
            modules.append((kind, data))
        return Packed(self.tree, tuple(modules))

    def parts(self) -> Iterator[bytes | memoryview]:
        """The binary again, in pieces: weights are not copied."""
        pieces: list[bytes | memoryview] = [self.tree]
        for kind, data in self.modules:
            pieces.append(_string(kind.encode()))
            if data is not None:
                pieces += [_U64.pack(len(data)), data]
        yield _U64.pack(sum(len(piece) for piece in pieces))
        yield from pieces


def pack_imports(module: Any, compiler: Callable[[str], bytes]) -> Packed:
    """The imports of `module` (tvm.runtime.Module) as TVM packs them, with the device code compiled."""
    import tvm

    blob = tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy()
    return Packed.unpack(memoryview(blob).cast("B")).compiled(compiler)


def has_device_code(module: Any) -> bool:
    """Whether `module` (tvm.runtime.Module) imports a CUDA module, itself or through others."""
    return any(imported.kind == "cuda" or has_device_code(imported) for imported in module.imports)


def device_modules(module: Any) -> list[CudaModule]:
    """The CUDA modules that `module` imports, itself or through others; weights are not serialised for it."""
    import tvm

    found: list[CudaModule] = []
    todo = [module]
    while todo:
        current = todo.pop()
        if any(imported.kind == "cuda" for imported in current.imports):
            blob = tvm.get_global_func("runtime.ModulePackImportsToTensor")(current).numpy()
            found += Packed.unpack(memoryview(blob).cast("B")).cuda_modules()
        else:
            todo += list(current.imports)
    return found


# --- the object file -------------------------------------------------------------------------------------------------

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_ALIGNMENT = 64
_SYMBOL = struct.Struct("<IBBHQQ")


def write_object(like: Path, parts: Iterator[bytes | memoryview], output: BinaryIO) -> None:
    """Write a relocatable ELF file that defines SYMBOL as the bytes `parts`, read-only, for the machine of `like`.

    `like` is an object file of the same library, 64-bit and little endian; ValueError for another. Only the header of
    `like` is read. TVM makes such a file by way of LLVM, which needs the bytes as a constant of its own first.
    """
    with like.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or head[:4] != b"\x7fELF" or head[4:6] != b"\x02\x01":
        raise ValueError(f"{like} is not a 64-bit little-endian ELF file")
    ident, _, machine, version, *_ = _HEADER.unpack(head)
    flags = _HEADER.unpack(head)[7]

    names = b"\0.rodata\0.note.GNU-stack\0.symtab\0.strtab\0" + SYMBOL.encode() + b"\0"
    output.write(bytes(_ALIGNMENT))  # the header's place
    size = 0
    for part in parts:
        size += output.write(part)
    here = names.index(SYMBOL.encode())
    symbols = bytes(_SYMBOL.size) + _SYMBOL.pack(here, 0x11, 0, 1, 0, size)  # a global object of section 1
    # (name, type, flags, bytes, link, info, alignment, size of an entry); .rodata is written already
    tables = [(names.index(b".note"), 1, 0, b"", 0, 0, 1, 0)]
    tables += [(names.index(b".symtab"), 2, 0, symbols, 4, 1, 8, _SYMBOL.size)]
    tables += [(names.index(b".strtab"), 3, 0, names, 0, 0, 1, 0)]
    at = _ALIGNMENT + size
    sections = [_SECTION.pack(*[0] * 10), _SECTION.pack(1, 1, 2, 0, _ALIGNMENT, size, 0, 0, _ALIGNMENT, 0)]
    for name, kind, attributes, data, link, info, alignment, entry in tables:
        at += output.write(bytes(-at % alignment))
        sections.append(_SECTION.pack(name, kind, attributes, 0, at, len(data), link, info, alignment, entry))
        at += output.write(data)
    at += output.write(bytes(-at % 8))
    output.write(b"".join(sections))
    output.seek(0)
    counts = (_HEADER.size, 0, 0, _SECTION.size, len(sections), 4)
    output.write(_HEADER.pack(ident, 1, machine, version, 0, 0, at, flags, *counts))
