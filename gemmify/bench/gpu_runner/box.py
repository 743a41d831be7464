"""The machine that the bundle runs on: TVM's runtime, CUDA, PyTorch where it is installed, and memory on the GPU."""

from __future__ import annotations

import os
import platform
from math import prod
from typing import Any

import numpy as np

from . import arrays
from .cuda import Cuda, CudaFailure, find_cudart
from .ffi import CUDA, Device, Runtime, Tensor

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder of the bundle."""
Sizes = tuple[int, ...]


def import_torch() -> tuple[Any, str]:
    """(PyTorch, "") where it is installed and sees a GPU, else (None, why not)."""
    if os.environ.get("GEMMIFY_NO_TORCH"):
        return None, "GEMMIFY_NO_TORCH is set"
    try:
        import torch
    except Exception as err:  # a damaged installation raises anything
        return None, f"PyTorch cannot be imported ({type(err).__name__}: {err})"
    if not torch.cuda.is_available():
        return None, f"PyTorch {torch.__version__} sees no GPU"
    return torch, ""


class Memory:
    """Bytes on the GPU; with PyTorch a tensor of its own, so that both look at the same numbers."""

    def __init__(self, box: Box, size: int) -> None:
        self.box, self.size, self.tensor = box, size, None
        if box.torch is not None:
            self.tensor = box.torch.empty(max(size, 1), dtype=box.torch.uint8, device="cuda")
            self.address = int(self.tensor.data_ptr())
        else:
            self.address = box.cuda.allocate(size)

    def close(self) -> None:
        """Give the memory back."""
        if self.tensor is None and self.address:
            self.box.cuda.free(self.address)
        self.tensor, self.address = None, 0

    def as_torch(self, shape: Sizes, dtype: str) -> Any:
        """The same memory as a tensor of PyTorch's."""
        assert self.tensor is not None, "there is no PyTorch"
        kind = getattr(self.box.torch, dtype)
        return self.tensor[: prod(shape) * kind.itemsize].view(kind).reshape(shape)


class Array:
    """A tensor of an entry: its memory, shape and dtype, and what TVM's functions are given for it."""

    def __init__(self, box: Box, shape: Sizes, dtype: str) -> None:
        self.box, self.shape, self.dtype = box, tuple(shape), dtype
        self.memory = Memory(box, prod(shape) * np.dtype(arrays.STORED[dtype]).itemsize)
        self.tensor: Tensor = box.runtime.tensor(self.memory.address, self.shape, dtype, Device(CUDA))

    def put(self, stored: np.ndarray) -> None:
        assert stored.size == prod(self.shape), f"{stored.shape} does not fit {self.shape}"
        self.box.cuda.upload(self.memory.address, stored)

    def get(self) -> np.ndarray:
        """What it holds, in float64."""
        stored = self.box.cuda.download(self.memory.address, self.shape, arrays.STORED[self.dtype])
        return arrays.widen(stored, self.dtype)

    def poison(self) -> None:
        self.put(arrays.poison(self.shape, self.dtype))

    def poison_fast(self) -> None:
        """`poison`, on the GPU itself where PyTorch can."""
        if self.memory.tensor is None:
            self.poison()
        else:
            self.memory.tensor.fill_(0xFF)  # NaN in every floating dtype
            self.box.torch.cuda.synchronize()

    def draw(self, *seed: int | str, scale: float = 1.0) -> None:
        """Fill it with uniform random numbers in -scale/2 .. scale/2, on the GPU itself where PyTorch can."""
        torch = self.box.torch
        if torch is None:
            values = arrays.widen(arrays.random(self.shape, "float32", *seed), "float32").astype(np.float32)
            self.put(arrays.narrow(values * np.float32(scale), self.dtype))
            return
        generator = torch.Generator("cuda").manual_seed(hash_of(seed))
        values = torch.rand(self.shape, generator=generator, device="cuda", dtype=torch.float32)
        self.as_torch().copy_((values - 0.5) * scale)
        torch.cuda.synchronize()

    def as_torch(self) -> Any:
        return self.memory.as_torch(self.shape, self.dtype)

    def close(self) -> None:
        self.memory.close()


def hash_of(seed: tuple[int | str, ...]) -> int:
    """One number from several and from texts, the same in every process."""
    return int(np.random.default_rng([x if isinstance(x, int) else sum(x.encode()) for x in seed]).integers(2**31))


class Box:
    """What all sections share. Raises CudaFailure or RuntimeFailure where the machine cannot run the bundle."""

    def __init__(self, folder: str = HERE) -> None:
        self.folder = folder
        self.torch, self.why_no_torch = import_torch()
        runtime = os.path.join(folder, "runtime")
        cudart = find_cudart(runtime)
        self.runtime = Runtime(runtime)
        self.cuda = Cuda(cudart)
        if self.torch is not None:
            self.torch.cuda.init()
        self.runtime.set_stream(self.cuda.stream)

    def array(self, shape: Sizes, dtype: str) -> Array:
        return Array(self, shape, dtype)

    def synchronize(self) -> None:
        """Wait for all that was launched; CudaFailure where a kernel failed."""
        self.cuda.synchronize()
        if self.torch is not None:
            self.torch.cuda.synchronize()

    def describe(self) -> dict[str, Any]:
        """The machine in words, for the results."""
        found: dict[str, Any] = {"python": platform.python_version(), "numpy": np.__version__, "cpus": os.cpu_count()}
        found["capability"] = list(self.cuda.capability)
        if self.torch is None:
            return {**found, "gpu": "unknown", "torch": None, "why_no_torch": self.why_no_torch}
        properties = self.torch.cuda.get_device_properties(0)
        found.update(gpu=properties.name, memory=properties.total_memory, sms=properties.multi_processor_count)
        found.update(torch=self.torch.__version__, cuda=self.torch.version.cuda)
        found["cudnn"] = self.torch.backends.cudnn.version()
        return found


def check_capability(bundle: dict[str, Any], found: tuple[int, int]) -> None:
    """CudaFailure where the bundle holds no code for this GPU."""
    made = [tuple(capability) for capability in bundle["capabilities"]]
    runs = [c for c in made if c[0] == found[0] and c[1] <= found[1]]
    if not runs or (bundle["exact"] and found not in made):
        names = ", ".join(bundle["archs"])
        raise CudaFailure(
            f"the bundle holds code for {names}, this GPU is sm_{found[0]}{found[1]}; make one with "
            f'--target "cuda -arch=sm_{found[0]}{found[1]}"'
        )
