"""Put the emulated driver into this process, or describe a fresh process that has it."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

from .build import HERE, libraries
from .text import compile_text

_watched = False
_RUNTIME_CUDA = "libtvm_runtime_cuda.so"


@cache
def driver() -> ctypes.CDLL:
    """The emulated libcuda, in this process from the first call on."""
    return ctypes.CDLL(str(libraries() / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


def gpu_count() -> int:
    """How many real GPUs this machine has, asked in a process of its own (a driver cannot be unloaded)."""
    import subprocess

    code = (
        "import ctypes\ntry: d = ctypes.CDLL('libcuda.so.1')\nexcept OSError: print(0)\n"
        "else:\n n = ctypes.c_int(0)\n print(0 if d.cuInit(0) or d.cuDeviceGetCount(ctypes.byref(n)) else n.value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout or 0)


def active() -> bool:
    """Whether this process has the emulated driver."""
    return driver.cache_info().currsize > 0


def install() -> None:
    """Make this process's CUDA device the emulated one; before or after tvm is imported, but before a CUDA library is.

    TVM's own CUDA runtime is loaded on the emulated libraries; `tvm_callback_cuda_compile` and nvcc make images for it.
    """
    driver()
    ctypes.CDLL(str(libraries() / "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)
    import tvm
    import tvm_ffi

    ctypes.CDLL(str(Path(tvm.base._LOADED_LIBS["tvm_runtime"]._name).parent / _RUNTIME_CUDA))
    assert tvm.get_global_func("device_api.cuda", allow_missing=True) is not None
    import gemmify.cuda.callback  # noqa: F401  # registers nvcc under this name, and must not do so afterwards

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _compile, override=True)
    os.environ["PATH"] = _path()


def _compile(code: str) -> bytearray:
    import tvm

    from gemmify.cuda.archs import arch_name
    from gemmify.cuda.device import gpu_here
    from schedules.cuda.target import archs_of

    target = tvm.target.Target.current(allow_none=True)
    if target is not None and target.kind.name == "cuda":
        archs = archs_of(target)
    else:  # as gemmify.cuda.callback: TVM may ask outside of the build, when a function is first called
        here = gpu_here()
        assert here is not None, "the emulator has no device to compile for (devices=0)"
        archs = (arch_name(here.capability),)
    return bytearray(compile_text(code, archs, _watched or bool(os.environ.get("GEMMIFY_EMULATOR_WATCHED"))))


def set_watched(watched: bool) -> None:
    """Whether what TVM compiles from now on is watched for races and exact bounds (several times slower)."""
    global _watched
    _watched = watched


def set_order(seed: int) -> None:
    """The order of blocks, warps and lanes from now on: 0 ascending with asynchronous copies as late as they may be,
    1 descending with copies at once, more: shuffled, odd ones with copies at once."""
    driver().gemmify_emulator_set_order(ctypes.c_uint(seed))


def set_capability(arch: str) -> None:
    """The device is from now on one of `arch` ("sm_80"); what was compiled for another is refused by it."""
    from gemmify.cuda import device

    driver().gemmify_emulator_set_capability(ctypes.c_int(int(arch.removeprefix("sm_").rstrip("af"))))
    device._found.cache_clear()  # it asks the driver once


def last_error() -> str:
    """Why the last call of this thread failed that did, in a sentence."""
    text = driver().gemmify_emulator_last_error
    text.restype = ctypes.c_char_p
    return text().decode()


def check_guards() -> bool:
    """Whether nothing was written beside the device's allocations."""
    return driver().gemmify_emulator_check_guards() == 0


def _path() -> str:
    """The PATH with an `nvcc` that makes code for the emulator: exported libraries hold such code, too."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([str(HERE / "bin"), *(folder for folder in folders if folder != str(HERE / "bin"))])


def environment(**settings: object) -> dict[str, str]:
    """The environment of a fresh process in which CUDA is the emulator.

    `settings`: devices=0 (none) ..., capability=75 ..., memory_mib=..., host_access=1; README.md lists them.
    `emulator` can be imported there, and `nvcc` makes code for it.
    """
    result = dict(os.environ)
    result["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(libraries()), result.get("LD_LIBRARY_PATH", "")]))
    result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), result.get("PYTHONPATH", "")]))
    result["PATH"] = _path()
    result |= {f"GEMMIFY_EMULATOR_{name.upper()}": str(value) for name, value in settings.items()}
    return result
