"""Architectures by name ("sm_90"): how code for some of them is compiled, and which GPUs run it."""

from __future__ import annotations

from collections.abc import Sequence


def capability(arch: str) -> tuple[int, int]:
    """`"sm_90"` -> (9, 0)."""
    number = int(arch.removeprefix("sm_"))
    return number // 10, number % 10


def arch_name(of: tuple[int, int]) -> str:
    """The inverse of `capability`."""
    return f"sm_{of[0]}{of[1]}"


def specific(archs: Sequence[str]) -> tuple[str, ...]:
    """The architectures as nvcc is told them: sm_90 alone as sm_90a, with instructions of its own (wgmma)."""
    return ("sm_90a",) if tuple(archs) == ("sm_90",) else tuple(archs)


def portable(archs: Sequence[str]) -> str | None:
    """The architecture whose PTX goes along, for GPUs newer than `archs`; None where the code is for one alone."""
    return None if specific(archs) != tuple(archs) else max(archs, key=capability)


def runs_on(archs: Sequence[str], gpu: tuple[int, int]) -> bool:
    """Whether code for `archs` runs on a GPU of compute capability `gpu`.

    Machine code runs on its own major version from its minor version on; the PTX of the newest architecture is compiled
    by the driver of any later GPU.
    """
    newest = portable(archs)
    if newest is None:
        return gpu in [capability(arch) for arch in archs]
    same = [capability(arch) for arch in archs if capability(arch)[0] == gpu[0]]
    return any(found[1] <= gpu[1] for found in same) or capability(newest) <= gpu
