"""The GPU that code is scheduled for: multiprocessors, registers, shared memory, rates. Every number of one lives here.

Limits are NVIDIA's, by compute capability (CUDA C++ Programming Guide, table "Technical Specifications per Compute
Capability"); rates are of one typical board of that capability, from the vendor's data sheets, and only the choice
among lowerings and block tiles rests on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tvm.target import Target

from ..machine import Machine
from ..target import TargetError

WARP = 32
MAX_THREADS = 1024
"""Threads of one block."""
MAX_REGISTERS = 255
"""Registers of one thread, of 4 bytes each."""
REGISTERS_PER_SM = 65536


@dataclass(frozen=True)
class Gpu:
    """What a schedule must know of a GPU. Sizes in bytes, rates of the whole chip.

    `capability` is (major, minor) of the lowest architecture of `archs` ("sm_90", ...), that the code must run on;
    `warp_group` says that the code is for that architecture alone, so that its own instructions (sm_90's wgmma) may be
    used. `shared_per_block` is what one block may have at most, `shared_per_sm` what all of a multiprocessor's share.
    `bandwidth` is bytes a second from memory; `fma` multiply-adds a second in float32, `half` those of the tensor
    cores on float16 or bfloat16, `tf32` on float32 rounded to 11 digits. `allow_tf32`: float32 layers may take the
    latter. `host` is the CPU that launches the kernels.
    """

    archs: tuple[str, ...]
    capability: tuple[int, int]
    multiprocessors: int
    shared_per_block: int
    shared_per_sm: int
    threads_per_sm: int
    l2_bytes: int
    bandwidth: float
    fma: float
    half: float
    tf32: float
    host: Machine = field(repr=False)
    allow_tf32: bool = False
    warp_group: bool = False

    @property
    def async_copy(self) -> bool:
        """Whether global memory is copied to shared memory without a register (cp.async)."""
        return self.capability >= (8, 0)

    @property
    def bfloat16(self) -> bool:
        """Whether tensor cores take bfloat16 and TF32."""
        return self.capability >= (8, 0)

    @property
    def cores(self) -> int:
        """What the work is divided among: the multiprocessors."""
        return self.multiprocessors

    @staticmethod
    def from_target(target: Target) -> Gpu:
        """The GPU behind a cuda target; TargetError for another target or an unknown architecture."""
        if str(target.kind) != "cuda":
            raise TargetError(f"a Gpu describes a cuda target, got {target.kind}")
        from .target import allows_tf32, archs_of

        return replace(gpu_of(archs_of(target), Machine.from_target(target)), allow_tf32=allows_tf32(target))


# (multiprocessors, shared KiB a block, shared KiB a multiprocessor, threads a multiprocessor, L2 MiB,
#  GB/s, multiply-adds in 10^12 a second: float32, half, TF32)
_BOARDS: dict[tuple[int, int], tuple[int, int, int, int, int, float, float, float, float]] = {
    (7, 5): (40, 64, 64, 1024, 4, 320, 4.05, 32.5, 4.05),  # T4
    (8, 0): (108, 163, 164, 2048, 40, 1555, 9.75, 156, 78),  # A100
    (8, 6): (84, 99, 100, 1536, 6, 936, 17.8, 35.6, 17.8),  # GeForce RTX 3090
    (8, 7): (16, 163, 164, 1536, 4, 205, 2.65, 21, 10.5),  # Orin
    (8, 9): (142, 99, 100, 1536, 96, 864, 45.3, 181, 90.5),  # L40
    (9, 0): (132, 227, 228, 2048, 50, 4800, 33.5, 495, 247),  # H200
    (10, 0): (148, 227, 228, 2048, 126, 8000, 37, 1125, 560),  # B200
    (10, 3): (160, 227, 228, 2048, 126, 8000, 37, 1250, 625),  # B300
    (11, 0): (20, 227, 228, 1536, 32, 273, 4, 125, 62),  # Thor
    (12, 0): (170, 99, 100, 1536, 96, 1792, 52.4, 209, 104),  # GeForce RTX 5090
    (12, 1): (48, 99, 100, 1536, 24, 273, 15.5, 62, 31),  # GB10
}


def capability_of(arch: str) -> tuple[int, int]:
    """`"sm_90"` or `"sm_90a"` -> (9, 0); TargetError for anything else."""
    digits = arch.removeprefix("sm_").rstrip("af")
    if not arch.startswith("sm_") or not digits.isdigit() or len(digits) < 2:
        raise TargetError(f"a GPU architecture is written sm_XX, for example sm_90, got {arch!r}")
    return int(digits[:-1]), int(digits[-1])


def known_archs() -> tuple[str, ...]:
    """The architectures that code is made for, oldest first: `("sm_75", ...)`."""
    return tuple(f"sm_{major}{minor}" for major, minor in _BOARDS)


@dataclass(frozen=True)
class Limits:
    """What a kernel may use on every one of several architectures; bytes."""

    shared_per_block: int
    shared_per_sm: int
    threads_per_sm: int


def gpu_limits(archs: tuple[str, ...]) -> Limits:
    """The least of each limit over `archs`: sm_86 has less shared memory than the older sm_80. Raises TargetError."""
    if not archs:
        raise TargetError("a cuda target needs an architecture, as in cuda -arch=sm_90")
    for arch in archs:
        if capability_of(arch) not in _BOARDS:
            raise TargetError(f"no GPU of architecture {arch} is known; known are {', '.join(known_archs())}")
    boards = [_BOARDS[capability_of(arch)] for arch in archs]
    kib = 1024
    return Limits(min(b[1] for b in boards) * kib, min(b[2] for b in boards) * kib, min(b[3] for b in boards))


def gpu_of(archs: tuple[str, ...], host: Machine) -> Gpu:
    """The typical board of the lowest of `archs`, within the limits of all; TargetError where one is missing or
    unknown."""
    limits = gpu_limits(archs)
    lowest = min(capability_of(arch) for arch in archs)
    sms, _, _, _, l2, bandwidth, fma, half, tf32 = _BOARDS[lowest]
    mib, tera = 1 << 20, 1e12
    return Gpu(
        archs, lowest, sms, limits.shared_per_block, limits.shared_per_sm, limits.threads_per_sm, l2 * mib,
        bandwidth * 1e9, fma * tera, half * tera, tf32 * tera, host,
        warp_group=len(archs) == 1 and lowest == (9, 0),
    )  # fmt: skip


def with_tf32(gpu: Gpu, allow: bool) -> Gpu:
    """The same GPU, float32 layers allowed to round their operands to TF32 or not."""
    return replace(gpu, allow_tf32=allow)
