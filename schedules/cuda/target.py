"""A cuda target: architectures, what TVM must know of them, and the CPU that launches the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm.target import Target

from ..target import TargetError, host_target, parse_target
from .device import MAX_THREADS, REGISTERS_PER_SM, WARP, capability_of, gpu_limits

TF32 = "tf32"
"""In `libs` of a cuda target: float32 layers may round their operands to TF32. `libs` is the list of free words that a
TVM target has; TVM itself looks there for libraries that it may call, and knows neither this word nor "sm_90"."""
_OURS = ("kind", "arch", "host", "libs", TF32)
_TVMS = (
    *("keys", "tag", "device", "model", "from_device", "max_shared_memory_per_block", "max_threads_per_block"),
    *("max_num_threads", "thread_warp_size", "registers_per_block", "l2_cache_size_bytes"),
)


def cuda_target(given: Mapping[str, Any], spec: object) -> Target:
    """The TVM target of `given`, as a user writes it: `{"kind": "cuda", "arch": "sm_80,sm_90", "tf32": True}`.

    `arch` holds one architecture or several, as text with commas or as a list; without it, that of the GPU which is
    present. `tf32` (or "tf32" among `libs`) lets float32 layers round their operands. `host` is the target of the code
    that launches the kernels: by default the plainest CPU of this machine's architecture, because the machine with the
    GPU is often another one. Limits (shared memory, threads ...) are the architecture's, whatever was given: TVM's own
    tags hold smaller ones. Raises TargetError.
    """
    unknown = [key for key in given if key not in _OURS + _TVMS]
    if unknown:
        takes = "-arch=sm_XX (several with commas), -tf32, -host=..."
        raise TargetError(f"target {spec!r}: a cuda target has no option -{unknown[0]}; it takes {takes}")
    archs = _archs(given, spec)
    limits = gpu_limits(archs)
    config: dict[str, Any] = {
        "kind": "cuda",
        "arch": archs[0],  # TVM reads one: what the code that it writes may use
        "max_shared_memory_per_block": limits.shared_per_block,
        "max_threads_per_block": MAX_THREADS,
        "max_num_threads": MAX_THREADS,
        "registers_per_block": REGISTERS_PER_SM,
        "thread_warp_size": WARP,
        "host": _host(given.get("host"), spec),
    }
    words = [*archs[1:], *([TF32] if _tf32(given, spec) else [])]
    return Target({**config, "libs": words} if words else config)


def archs_of(target: Target) -> tuple[str, ...]:
    """The architectures of a cuda target, lowest first: `("sm_80", "sm_90")`."""
    return (str(target.attrs.get("arch", "")), *(lib for lib in _libs(target.attrs) if lib.startswith("sm_")))


def allows_tf32(target: Target) -> bool:
    """Whether a cuda target lets float32 layers round their operands to TF32."""
    return TF32 in _libs(target.attrs)


def _libs(attrs: Mapping[str, Any]) -> list[str]:
    return [str(lib) for lib in attrs.get("libs") or ()]


def _archs(given: Mapping[str, Any], spec: object) -> tuple[str, ...]:
    """The architectures without their suffix (`sm_90a` is how sm_90 is compiled for), each once, lowest first."""
    asked = given.get("arch")
    if asked is None:
        asked = _present(spec)
    if not isinstance(asked, str | list | tuple):
        raise TargetError(f"target {spec!r}: arch is text such as 'sm_90', or a list, got {asked!r}")
    words = asked.split(",") if isinstance(asked, str) else [str(word) for word in asked]
    words = [word.strip() for word in words if word.strip()]
    words += [lib for lib in _libs(given) if lib.startswith("sm_")] if words else []
    if not words:
        raise TargetError(f"target {spec!r} names no architecture: try 'cuda -arch=sm_90'")
    found = {capability_of(word) for word in words}
    return tuple(f"sm_{major}{minor}" for major, minor in sorted(found))


def _present(spec: object) -> str:
    device = tvm.cuda(0)
    if not device.exist:
        raise TargetError(f"target {spec!r} needs an architecture where no GPU is present: try 'cuda -arch=sm_90'")
    return "sm_" + str(device.compute_version).replace(".", "")


def _tf32(given: Mapping[str, Any], spec: object) -> bool:
    libs = _libs(given)
    other = [lib for lib in libs if lib != TF32 and not lib.startswith("sm_")]
    if other:
        raise TargetError(
            f"target {spec!r} asks for the library {other[0]}; gemmify makes its own kernels, leave it out"
        )
    flag = given.get(TF32, False)
    if not isinstance(flag, bool):
        raise TargetError(f"target {spec!r}: tf32 is on or off (True or False), got {flag!r}")
    return flag or TF32 in libs


def _host(given: Any, spec: object) -> dict[str, Any]:
    if given is None:
        return plain_host()
    target = given if isinstance(given, Target) else parse_target(given if isinstance(given, str) else dict(given))
    if str(target.kind) != "llvm":
        raise TargetError(f"target {spec!r}: the host of a GPU is an llvm target, got {target.kind}")
    # The number of its cores matters to no kernel that only launches others.
    return {"kind": "llvm", **{str(k): _plain(v) for k, v in target.attrs.items() if str(k) != "num-cores"}}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else [str(item) for item in value]


def plain_host() -> dict[str, Any]:
    """The plainest CPU of this machine's architecture: all that launching kernels needs."""
    triple = str(host_target().attrs["mtriple"])
    cpu = {"mcpu": "x86-64"} if triple.startswith("x86_64") else {}
    return {"kind": "llvm", "mtriple": triple, **cpu}
