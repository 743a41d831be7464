"""The GPU of this machine, asked of the driver without a context; and TVM's CUDA runtime, found and loaded.

Nothing here imports TVM's compiler, nor TVM at all before `load_runtime`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import GemmifyError, IncompatibleError
from .archs import arch_name, runs_on

RUNTIME = "libcudart.so.13"
"""What TVM's CUDA runtime is linked against."""
_DRIVER = "libcuda.so.1"
_OLDEST_DRIVER = 13000
"""CUDA version of the driver, as cuDriverGetVersion says it: the first that works with RUNTIME."""
_NO_DEVICE = 100
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class HereGpu:
    """The GPU that code runs on here: CUDA's device 0. `capability` is (major, minor)."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int

    def runs(self, gpu: Any) -> bool:
        """Whether code for `gpu` (its `archs`: a `schedules.cuda.device.Gpu`, a `Manifest`) runs on this one."""
        return runs_on(gpu.archs, self.capability)

    def __str__(self) -> str:
        return f"{self.name} ({arch_name(self.capability)})"


class _Absent(Exception):
    """Why there is no GPU to use, in one clause."""


@lru_cache(maxsize=1)
def _found() -> HereGpu | str:
    try:
        return _ask()
    except _Absent as why:
        return str(why)


def _ask() -> HereGpu:
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        raise _Absent(f"this machine has no NVIDIA driver ({_DRIVER} is not found)") from None
    status = driver.cuInit(0)
    if status not in (0, _NO_DEVICE):
        raise _Absent(f"the NVIDIA driver does not start (error {status} of cuInit)")
    count, version, device, value = (ctypes.c_int() for _ in range(4))
    if status == _NO_DEVICE or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        hidden = " that CUDA_VISIBLE_DEVICES leaves visible" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        raise _Absent(f"the NVIDIA driver finds no GPU{hidden}")
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value < _OLDEST_DRIVER:
        said = f"{version.value // 1000}.{version.value % 1000 // 10}"
        raise _Absent(f"the NVIDIA driver is made for CUDA {said}, and 13.0 is needed: update it to 580 or later")
    driver.cuDeviceGet(ctypes.byref(device), 0)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    capability = (attribute(_MAJOR), attribute(_MINOR))
    return HereGpu(name.value.decode(errors="replace"), capability, attribute(_MULTIPROCESSORS), memory.value)


def gpu_here() -> HereGpu | None:
    """The GPU of this machine; None where there is no driver, or no GPU that it can use. Makes no CUDA context."""
    found = _found()
    return found if isinstance(found, HereGpu) else None


def require_archs(archs: tuple[str, ...], source: str) -> HereGpu:
    """The GPU of this machine; IncompatibleError, naming `source`, where it is absent or runs no code for `archs`."""
    found = _found()
    made_for = f"{source} is made for a GPU ({', '.join(archs)})"
    if isinstance(found, str):
        raise IncompatibleError(f"{made_for}, and {found}; run it where there is one, or compile it for llvm")
    if not runs_on(archs, found.capability):
        here = arch_name(found.capability)
        raise IncompatibleError(f'{made_for}, this machine has {found}; compile it with --target "cuda -arch={here}"')
    return found


def require_gpu(target: Any) -> HereGpu:
    """The GPU of this machine, which runs code for `target` (a checked cuda target); IncompatibleError where there is
    none, GemmifyError where CUDA's runtime library is missing."""
    from ..manifest import target_archs

    here = require_archs(target_archs(target), "this code")
    load_runtime()
    return here


# --- libraries -------------------------------------------------------------------------------------------------------


def _runtime_places() -> list[Path]:
    """Where libcudart may lie beside where the dynamic loader looks: the package index's, PyTorch's, a toolkit's."""
    places: list[Path] = []
    for package, folders in (("nvidia", ("cu13/lib", "cuda_runtime/lib")), ("torch", ("lib",))):
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or ()) if spec is not None else []
        places += [Path(root) / folder for root in roots for folder in folders]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return places + [Path(home) / folder for home in homes if home for folder in ("lib64", "lib")]


@lru_cache(maxsize=1)
def _runtime() -> ctypes.CDLL | None:
    """libcudart where it is found; what is linked against it and loaded later takes this one."""
    for name in (RUNTIME, *(str(place / RUNTIME) for place in _runtime_places())):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return None


def cuda_runtime() -> ctypes.CDLL:
    """CUDA's runtime library; GemmifyError, saying what to install, where it is not found."""
    found = _runtime()
    if found is None:
        raise GemmifyError(
            f"running on a GPU needs CUDA's runtime library {RUNTIME}, and it was not found; "
            "`pip install 'nvidia-cuda-runtime>=13,<14'`, or add its folder to LD_LIBRARY_PATH"
        )
    return found


def load_runtime() -> None:
    """Load TVM's CUDA runtime into this process, where `import tvm` could not: it passes silently over what is missing.

    Call it only where `gpu_here` found a GPU. Raises GemmifyError where CUDA's own runtime library is not found, or TVM
    has none.
    """
    _runtime()
    from ..threads import import_tvm

    tvm = import_tvm()
    if _registered(tvm):
        return
    cuda_runtime()
    library = Path(tvm.base._LOADED_LIBS["tvm_runtime"]._name).resolve().with_name("libtvm_runtime_cuda.so")
    try:
        tvm.base._LOADED_LIBS["tvm_runtime_cuda"] = ctypes.CDLL(str(library))
    except OSError as err:
        raise GemmifyError(f"cannot load TVM's CUDA runtime: {err}; `pip install gemmify` brings it") from err
    if not _registered(tvm):
        raise GemmifyError(f"{library} registers no CUDA device; `pip install gemmify` brings one that does")


def _registered(tvm: Any) -> bool:
    return tvm.get_global_func("device_api.cuda", allow_missing=True) is not None
