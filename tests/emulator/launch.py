"""Run a kernel of hand-written CUDA text on the emulated device, without TVM: for tests of the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .build import libraries
from .process import driver
from .text import compile_text

_MAX_DYNAMIC_SHARED = 8
_TO_DEVICE, _TO_HOST = 1, 2


class LaunchError(RuntimeError):
    """The driver's status of a call that did not succeed, with its reason."""


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise LaunchError((text.value or b"").decode())


def _three(extents: int | Sequence[int]) -> Any:
    given = (extents,) if isinstance(extents, int) else tuple(extents)
    return (ctypes.c_uint * 3)(*given, *[1] * (3 - len(given)))


class _Memory:
    """Copies of arrays on the device, freed at the end of `with`; freeing finds what was written beside them."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.runtime = ctypes.CDLL(str(libraries() / "libcudart.so.13"))
        self.arrays, self.pointers = arrays, [ctypes.c_void_p() for _ in arrays]

    def __enter__(self) -> _Memory:
        for pointer, array in zip(self.pointers, self.arrays, strict=True):
            _check(self.runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(array.nbytes)))
            self._copy(pointer, array.ctypes.data_as(ctypes.c_void_p), array.nbytes, _TO_DEVICE)
        return self

    def read(self) -> list[np.ndarray]:
        results = [np.empty_like(array) for array in self.arrays]
        for pointer, array in zip(self.pointers, results, strict=True):
            self._copy(array.ctypes.data_as(ctypes.c_void_p), pointer, array.nbytes, _TO_HOST)
        return results

    def _copy(self, to: Any, source: Any, size: int, kind: int) -> None:
        _check(self.runtime.cudaMemcpy(to, source, ctypes.c_size_t(size), kind))

    def __exit__(self, *_: object) -> None:
        for pointer in self.pointers:
            self.runtime.cudaFree(pointer)


def launch(
    text: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *arrays: np.ndarray,
    shared: int = 0,
    archs: Sequence[str] = ("sm_90",),
    watched: bool = False,
    kernel: str = "kernel",
) -> list[np.ndarray]:
    """All `arrays` after `kernel` of CUDA `text` ran on copies of them, with `shared` bytes of dynamic shared memory.

    Raises BuildError where the text does not compile, LaunchError where the device refuses or stops it.
    """
    image = compile_text(text, archs, watched)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver().cuModuleLoadData(ctypes.byref(module), image))
    try:
        _check(driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()))
        _check(driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared))
        with _Memory(arrays) as memory:
            arguments = (ctypes.c_void_p * len(arrays))(*[ctypes.addressof(pointer) for pointer in memory.pointers])
            config = _Config(_three(grid), _three(block), shared, None, None, 0)
            _check(driver().cuLaunchKernelEx(ctypes.byref(config), function, arguments, None))
            results = memory.read()
            if driver().gemmify_emulator_check_guards():
                raise LaunchError("something was written beside an array")
            return results
    finally:
        driver().cuModuleUnload(module)
