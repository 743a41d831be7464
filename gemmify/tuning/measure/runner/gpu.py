"""The GPU that a bundle runs on. Nothing here starts CUDA in the process that forks: its children could not use it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from functools import partial
from typing import Any

from .apart import apart
from .machine import fail

CUDART = "libcudart.so.13"
"""What TVM's CUDA runtime is linked against."""
_QUERY_LIMIT = 120.0


def load_cuda(tvm: Any) -> None:
    """Load TVM's CUDA runtime, after the library that it needs from wherever that lies; ends the program without it."""
    if tvm.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return
    for name in [CUDART, *_places()]:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            break
    else:
        fail(f"{CUDART} is not found; pip install 'nvidia-cuda-runtime>=13,<14', or set LD_LIBRARY_PATH")
    library = os.path.join(os.path.dirname(os.path.abspath(tvm.__file__)), "lib", "libtvm_runtime_cuda.so")
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as err:
        fail(f"TVM's CUDA runtime cannot be loaded ({err}); is this a machine with an NVIDIA driver?")


def _places() -> list[str]:
    """Where the package index's packages, PyTorch's or a toolkit's copy may lie."""
    found = []
    for package, folders in (("nvidia", ("cu13/lib", "cuda_runtime/lib")), ("torch", ("lib",))):
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or ()) if spec is not None else []
        found += [os.path.join(root, folder, CUDART) for root in roots for folder in folders]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return found + [os.path.join(home, folder, CUDART) for home in homes if home for folder in ("lib64", "lib")]


def check_gpu(tvm: Any, bundle: Any, machine: dict[str, Any]) -> dict[str, Any]:
    """What the results say of the machine: its GPU. Ends the program where that cannot run the bundle's code."""
    load_cuda(tvm)
    kind, found = apart(partial(_ask, tvm), _QUERY_LIMIT)
    archs = bundle["gpu"]["archs"]
    if kind != "value" or found is None:
        why = "" if kind == "value" else f" ({found})"
        fail(f"this bundle needs a GPU ({', '.join(archs)}), and none can be used here{why}")
    name, capability, multiprocessors = found
    if not any(runs(arch, capability) for arch in archs):
        here = "sm_" + capability.replace(".", "")
        fail(f"this bundle holds code for {', '.join(archs)}, this machine has {name} ({here}); make one for it")
    return {**machine, "cpu": name, "cores": multiprocessors}


def runs(arch: str, capability: str) -> bool:
    """Whether machine code for `arch` ("sm_86") runs on a GPU of `capability` ("8.9")."""
    major, minor = (int(part) for part in capability.split("."))
    number = int(arch.removeprefix("sm_"))
    return number // 10 == major and number % 10 <= minor


def _ask(tvm: Any) -> tuple[str, str, int] | None:
    device = tvm.cuda(0)
    if not device.exist:
        return None
    return str(device.device_name), str(device.compute_version), int(device.multi_processor_count)
