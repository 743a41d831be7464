"""The machine that code is scheduled for: vector width, registers, caches, cores. Every hardware number lives here.

`Machine.from_target` reads from a TVM target what the schedules need.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.target import Target, codegen

from .host import DEFAULT_CACHES, host_caches, host_cores
from .target import TargetError, host_target

# Cores whose 512-bit multiply-add takes both ports' turns (two 256-bit halves, or one port only).
_ONE_WIDE_FMA = ("znver4", "cannonlake", "icelake-client", "rocketlake", "tigerlake")


@dataclass(frozen=True)
class Streams:
    """What one core streams, in bytes a cycle at which it computes; only the choice among lowerings rests on it.

    `memory` and `shared` are from memory and from the shared cache; `overlap` is the part of the shorter of computing
    and streaming from memory that the longer one hides. The default was measured on a Zen 5 (28 GB/s at 4 GHz).
    """

    memory: float = 7.0
    shared: float = 10.0
    overlap: float = 0.75


# Measured on a Xeon with AMX, layers of 0.6 to 60 MB of weights: memory is far, and waiting for it adds to the time.
_MESH = Streams(memory=3.5, shared=9.0, overlap=0.0)
_MESH_CORES = (
    "skylake-avx512",
    "cascadelake",
    "cooperlake",
    "icelake-server",
    "sapphirerapids",
    "emeraldrapids",
    "graniterapids",
    "graniterapids-d",
    "diamondrapids",
)


@dataclass(frozen=True)
class Machine:
    """What a schedule must know of a CPU. Sizes are in bytes; `cores` counts the physical cores that may be used.

    `vector_registers` is the number of architectural vector registers of `vector_bytes` each; `fma_ports` how many
    multiply-adds of that width start in one cycle; `l1_bytes` and `l2_bytes` are one core's, `l3_bytes` is shared.
    """

    vector_bytes: int
    vector_registers: int
    fma_ports: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    cores: int
    mcpu: str
    arch: str
    features: frozenset[str] = frozenset()
    streams: Streams = Streams()

    def lanes(self, dtype: str) -> int:
        """Elements of `dtype` in one vector register (at least 1)."""
        bits = int(tvm.DataType(dtype).bits)
        return max(1, self.vector_bytes * 8 // max(bits, 8))

    @property
    def converts_float16(self) -> bool:
        """Whether float16 in memory is widened and narrowed by instructions, not by calls into a library."""
        needs = {
            "x86_64": ("f16c", "avx512fp16"),
            "aarch64": (),
            "riscv64": ("zfhmin", "zfh"),
            "riscv32": ("zfhmin", "zfh"),
        }
        needed = needs.get(self.arch)
        return needed is not None and (not needed or not self.features.isdisjoint(needed))

    @staticmethod
    def from_target(target: Target) -> Machine:
        """The machine behind an LLVM target; a GPU target gives the machine of its host. Raises TargetError."""
        if str(target.kind) != "llvm":
            if target.host is None or str(target.host.kind) != "llvm":
                raise TargetError(f"a Machine describes a CPU: needs an llvm target or host, got {target.kind}")
            return Machine.from_target(target.host)
        arch = _arch(target)
        features = frozenset(str(f) for f in codegen.llvm_get_cpu_features(target))
        width, registers, ports = _vector_unit(arch, str(target.attrs.get("mcpu", "")), features)
        caches = host_caches() if _is_host(target) else DEFAULT_CACHES
        cores = int(target.attrs.get("num-cores", 0)) or host_cores()
        mcpu = str(target.attrs.get("mcpu", ""))
        streams = _MESH if mcpu in _MESH_CORES else Streams()
        return Machine(width, registers, ports, *caches, cores, mcpu, arch, features, streams)


def _vector_unit(arch: str, mcpu: str, features: frozenset[str]) -> tuple[int, int, int]:
    """(bytes of a vector register, registers, multiply-adds started a cycle) of an instruction set."""
    if arch == "x86_64":
        if "avx512f" in features:
            return 64, 32, 1 if mcpu in _ONE_WIDE_FMA else 2
        return (32 if "avx2" in features or "avx" in features else 16), 16, 2 if "fma" in features else 1
    if arch == "aarch64":
        return 16, 32, 2
    if arch.startswith(("riscv", "ppc", "powerpc", "s390", "loongarch")):
        return 16, 32, 2
    return 16, 16, 1


def _arch(target: Target) -> str:
    """The instruction set of a target by its triple, in LLVM's spelling: `x86_64`, `aarch64`, ..."""
    triple = str(target.attrs.get("mtriple", "")) or str(codegen.llvm_get_system_triple())
    arch = triple.split("-")[0].lower()
    return {"amd64": "x86_64", "x86-64": "x86_64", "arm64": "aarch64"}.get(arch, arch)


def _is_host(target: Target) -> bool:
    same_arch = _arch(target) == str(codegen.llvm_get_system_triple()).split("-")[0]
    return same_arch and str(target.attrs.get("mcpu", "")) == str(host_target().attrs.get("mcpu", ""))
