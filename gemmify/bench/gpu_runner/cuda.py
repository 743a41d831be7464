"""The few calls of the CUDA runtime that the suite needs: memory, a stream, events, and graphs of captured calls.

They come from the same libcudart that TVM's runtime is linked with, so that both see one context.
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

NAME = "libcudart.so.13"
_RELAXED = 2  # cudaStreamCaptureModeRelaxed: an allocation while another call is recorded is no error
_UP, _DOWN = 1, 2  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost
_OLD_DRIVER = 35  # cudaErrorInsufficientDriver
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor, -Minor
_POINTER = ctypes.c_void_p


class CudaFailure(RuntimeError):
    """A CUDA call failed. The context is of no use any more: end the process."""


def find_cudart(folder: str) -> Any:
    """libcudart.so.13: the one that is loaded already, that of PyTorch's packages, or the bundle's own in `folder`."""
    places = [NAME]
    for path in sys.path:
        places += sorted(glob.glob(os.path.join(path, "nvidia", "*", "lib", NAME)))
    places += [os.path.join(folder, NAME), os.path.join("/usr/local/cuda/lib64", NAME)]
    said = []
    for place in places:
        try:
            return ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
        except OSError as err:
            said.append(str(err))
    raise CudaFailure(f"{NAME} cannot be loaded ({said[0]}); pip install nvidia-cuda-runtime")


class Cuda:
    """The first GPU, and one stream of it."""

    def __init__(self, lib: Any) -> None:
        self.lib = lib
        lib.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        failed = lib.cudaGetDeviceCount(ctypes.byref(count))
        if failed or not count.value:
            why = lib.cudaGetErrorString(failed).decode() if failed else "the driver counts no device"
            if failed == _OLD_DRIVER:  # what CUDA also says where there is none at all
                why = "this machine has no NVIDIA driver, or one older than CUDA 13 needs (580)"
            raise CudaFailure(f"no GPU can be used: {why}")
        self.check(lib.cudaSetDevice(0))
        stream = _POINTER()
        self.check(lib.cudaStreamCreateWithFlags(ctypes.byref(stream), 1))  # 1: it does not wait for the default one
        self.stream = int(stream.value or 0)

    def check(self, code: int) -> None:
        if code:
            raise CudaFailure(f"CUDA error {code}: {self.lib.cudaGetErrorString(code).decode()}")

    @property
    def capability(self) -> tuple[int, int]:
        found = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self.check(self.lib.cudaDeviceGetAttribute(ctypes.byref(value), attribute, 0))
            found.append(value.value)
        return found[0], found[1]

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the GPU."""
        address = _POINTER()
        self.check(self.lib.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(max(size, 1))))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        self.check(self.lib.cudaFree(_POINTER(address)))

    def upload(self, address: int, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self._copy(address, array.ctypes.data, array.nbytes, _UP)

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        self._copy(array.ctypes.data, address, array.nbytes, _DOWN)
        return array

    def _copy(self, to: int, source: int, size: int, kind: int) -> None:
        if size:
            arguments = _POINTER(to), _POINTER(source), ctypes.c_size_t(size), kind, _POINTER(self.stream)
            self.check(self.lib.cudaMemcpyAsync(*arguments))
            self.synchronize()

    def synchronize(self) -> None:
        """Wait for the stream; CudaFailure where a kernel on it failed."""
        self.check(self.lib.cudaStreamSynchronize(_POINTER(self.stream)))

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` launches on the stream, as a graph. Nothing of it runs yet."""
        graph, stream = _POINTER(), _POINTER(self.stream)
        self.check(self.lib.cudaStreamBeginCapture(stream, _RELAXED))
        try:
            work()
        finally:
            failed = self.lib.cudaStreamEndCapture(stream, ctypes.byref(graph))
        self.check(failed)
        ready = _POINTER()
        self.check(self.lib.cudaGraphInstantiate(ctypes.byref(ready), graph, ctypes.c_ulonglong(0)))
        self.check(self.lib.cudaGraphDestroy(graph))
        return Graph(self, int(ready.value or 0))

    def seconds(self, launch: Callable[[], object], stream: int | None = None) -> float:
        """Seconds on the GPU between two events around what `launch` puts on `stream` (default: this one)."""
        at = _POINTER(self.stream if stream is None else stream)
        begin, end, elapsed = _POINTER(), _POINTER(), ctypes.c_float()
        for event in (begin, end):
            self.check(self.lib.cudaEventCreate(ctypes.byref(event)))
        try:
            self.check(self.lib.cudaEventRecord(begin, at))
            launch()
            self.check(self.lib.cudaEventRecord(end, at))
            self.check(self.lib.cudaEventSynchronize(end))
            self.check(self.lib.cudaEventElapsedTime(ctypes.byref(elapsed), begin, end))
        finally:
            for event in (begin, end):
                self.lib.cudaEventDestroy(event)
        return elapsed.value * 1e-3


class Graph:
    """Captured calls, ready to be launched on the stream of their `Cuda`."""

    def __init__(self, cuda: Cuda, handle: int) -> None:
        self.cuda, self.handle = cuda, handle

    def launch(self) -> None:
        self.cuda.check(self.cuda.lib.cudaGraphLaunch(_POINTER(self.handle), _POINTER(self.cuda.stream)))

    def close(self) -> None:
        if self.handle:
            self.cuda.check(self.cuda.lib.cudaGraphExecDestroy(_POINTER(self.handle)))
            self.handle = 0
