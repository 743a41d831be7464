"""The machine that code is scheduled for: vector width, registers, caches, cores. Every hardware number lives here.

`parse_target` turns what a user writes (`"llvm"`, `"llvm -mcpu=x86-64-v3"`, a dict) into a checked TVM target, and
`Machine.from_target` reads from that target what the schedules need.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm
from tvm.target import Target, codegen

_CPU_DIR = Path("/sys/devices/system/cpu")
_INT_OPTIONS = ("num-cores", "opt-level", "vector-width", "max_num_threads", "thread_warp_size")
# Sound values where the target is another machine: (L1 data a core, L2 a core, L3 shared), in bytes.
_DEFAULT_CACHES = (32 << 10, 512 << 10, 8 << 20)
# Cores whose 512-bit multiply-add takes both ports' turns (two 256-bit halves, or one port only).
_ONE_WIDE_FMA = ("znver4", "cannonlake", "icelake-client", "rocketlake", "tigerlake")


class TargetError(ValueError):
    """The target is not one that TVM can compile for, or its description cannot be read."""


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
    memory_bytes_per_cycle: float = 7.0
    """What one core streams from memory; 28 GB/s at 4 GHz was measured. Only the choice among lowerings rests on it."""
    shared_bytes_per_cycle: float = 10.0
    """What one core streams from the shared cache."""

    def lanes(self, dtype: str) -> int:
        """Elements of `dtype` in one vector register (at least 1)."""
        bits = int(tvm.DataType(dtype).bits)
        return max(1, self.vector_bytes * 8 // max(bits, 8))

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
        caches = host_caches() if _is_host(target) else _DEFAULT_CACHES
        cores = int(target.attrs.get("num-cores", 0)) or host_cores()
        return Machine(width, registers, ports, *caches, cores, str(target.attrs.get("mcpu", "")), arch, features)


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
    return same_arch and str(target.attrs.get("mcpu", "")) == str(codegen.llvm_get_system_cpu())


@lru_cache(maxsize=1)
def host_cores() -> int:
    """Physical cores that this process may run on (two hardware threads of one core count once); at least 1."""
    try:
        allowed = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        topology = _CPU_DIR / f"cpu{cpu}" / "topology"
        try:
            cores.add((_read(topology / "physical_package_id"), _read(topology / "core_id")))
        except OSError:
            cores.add(("cpu", str(cpu)))
    return max(1, len(cores))


@lru_cache(maxsize=1)
def host_caches() -> tuple[int, int, int]:
    """(L1 data a core, L2 a core, L3 shared) of this machine in bytes; a default for each level that is not told."""
    sizes = dict(zip((1, 2, 3), _DEFAULT_CACHES, strict=True))
    for index in sorted((_CPU_DIR / "cpu0" / "cache").glob("index*")):
        try:
            level, kind, text = int(_read(index / "level")), _read(index / "type"), _read(index / "size")
            if kind in ("Data", "Unified") and level in sizes:
                sizes[level] = _parse_size(text) or sizes[level]
        except (OSError, ValueError):
            continue
    return sizes[1], sizes[2], sizes[3]


def _parse_size(text: str) -> int:
    """`"48K"` -> 49152."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1].upper()] if text[-1:].upper() in units else int(text)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


@lru_cache(maxsize=1)
def host_target() -> Target:
    """This machine as an LLVM target: detected CPU, its physical cores, and only the features that it really has.

    A hypervisor may hide instructions that the CPU's name implies; those are switched off by `mattr`, so that compiled
    code never meets an illegal instruction.
    """
    mcpu, triple = str(codegen.llvm_get_system_cpu()), str(codegen.llvm_get_system_triple())
    config: dict[str, Any] = {"kind": "llvm", "mcpu": mcpu, "mtriple": triple, "num-cores": host_cores()}
    if not codegen.llvm_is_valid_cpu(mcpu, triple):
        del config["mcpu"]
    hidden = hidden_features(_implied(config), _host_features())
    if hidden:
        config["mattr"] = [f"-{name}" for name in hidden]
    return Target(config)


def _implied(config: dict[str, Any]) -> frozenset[str]:
    return frozenset(str(f) for f in codegen.llvm_get_cpu_features(Target(config)))


def _host_features() -> dict[str, bool]:
    """What LLVM finds by asking the CPU itself: feature -> present."""
    probe = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures", allow_missing=True)
    found = probe() if probe is not None else None
    return {str(name): bool(value) for name, value in found.items()} if found else {}


def hidden_features(implied: frozenset[str], present: Mapping[str, bool]) -> list[str]:
    """The features that a CPU's name implies and that the machine reports as absent, sorted."""
    return sorted(name for name in implied if present.get(name) is False)


def parse_target(spec: str | Mapping[str, Any] | Target) -> Target:
    """A checked TVM target from what a user writes.

    `"llvm"` is this machine; `"llvm -mcpu=x86-64-v3"` and `"cuda -arch=sm_90"` name options; a JSON text, a dict, one
    of TVM's target tags and a Target are taken as they are. Raises TargetError for what cannot be compiled for: an
    unknown kind or option, a CPU name that LLVM does not know (the message names close ones).
    """
    if isinstance(spec, Target):
        return _checked(spec, str(spec))
    config = _parse_text(spec) if isinstance(spec, str) else dict(spec)
    if isinstance(config, Target):
        return _checked(config, str(spec))
    if config.get("kind") == "llvm" and not set(config) - {"kind", "num-cores"}:
        config = {**_config_of(host_target()), **config}
    if config.get("kind") == "llvm":
        config.setdefault("num-cores", host_cores())
    if config.get("kind") == "cuda":
        if "arch" not in config and not tvm.cuda(0).exist:
            raise TargetError(f"target {spec!r} needs an architecture where no GPU is present: try 'cuda -arch=sm_90'")
        config.setdefault("host", _config_of(host_target()))
    _check_cpu_name(config, spec)
    try:
        return Target(config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise TargetError(f"target {spec!r} is not one that TVM knows: {_first_sentence(error)}") from error


def _parse_text(text: str) -> dict[str, Any] | Target:
    """`"kind -key=value ..."` (also `-key value` and `--key=value`), JSON, or a tag of TVM's."""
    text = text.strip()
    if not text:
        raise TargetError("the target is empty; try 'llvm' for this machine or 'llvm -mcpu=x86-64-v3'")
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise TargetError(f"target {text!r} is not valid JSON: {error}") from error
    kind, *rest = shlex.split(text)
    if "/" in kind:
        try:
            return Target(text)
        except (ValueError, RuntimeError) as error:
            raise TargetError(f"target {text!r} is not one of TVM's tags: {_first_sentence(error)}") from error
    config: dict[str, Any] = {"kind": kind}
    words = iter(rest)
    for word in words:
        key, sep, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not key:
            raise TargetError(f"target {text!r}: expected an option such as -mcpu=x86-64-v3, found {word!r}")
        if not sep:
            value = next(words, "")
        if not value:
            raise TargetError(f"target {text!r}: option -{key} needs a value, as in -{key}=...")
        config[key] = _option_value(text, key, value)
    return config


def _option_value(text: str, key: str, value: str) -> Any:
    if key in ("mattr", "keys", "libs"):
        return [part for part in value.split(",") if part]
    if key not in _INT_OPTIONS:
        return value
    if not value.isdigit():
        raise TargetError(f"target {text!r}: option -{key} needs a whole number, got {value!r}")
    return int(value)


def _check_cpu_name(config: Mapping[str, Any], spec: object) -> None:
    """TVM only warns of an unknown CPU and goes on with a generic one; that is an error here."""
    if config.get("kind") != "llvm":
        return
    triple = str(config.get("mtriple") or codegen.llvm_get_system_triple())
    _check_triple(triple, spec)
    mcpu = config.get("mcpu")
    if not mcpu:
        return
    if codegen.llvm_is_valid_cpu(str(mcpu), triple):
        return
    known = [str(name) for name in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": triple}))]
    close = difflib.get_close_matches(str(mcpu), known, n=4, cutoff=0.5) or known[:4]
    raise TargetError(
        f"target {spec!r}: LLVM knows no CPU {str(mcpu)!r} for {triple}; did you mean {', '.join(close)}?"
    )


def _check_triple(triple: str, spec: object) -> None:
    """A triple of an unknown architecture crashes inside LLVM: refuse it before TVM sees it."""
    arch = triple.split("-")[0].lower()
    known = [str(name) for name in codegen.llvm_get_targets()]
    aliases = ("amd64", "arm64", "i486", "i586", "i686")
    if arch in known or arch in aliases or arch.startswith(("arm", "thumb")):
        return
    close = difflib.get_close_matches(arch, known, n=3, cutoff=0.5) or known[:4]
    raise TargetError(f"target {spec!r}: LLVM knows no architecture {arch!r}; did you mean {', '.join(close)}?")


def _checked(target: Target, text: str) -> Target:
    _check_cpu_name({"kind": str(target.kind), **{str(k): v for k, v in target.attrs.items()}}, text)
    return target


def _config_of(target: Target) -> dict[str, Any]:
    keep = ("mcpu", "mtriple", "mattr", "num-cores")
    config = {key: target.attrs[key] for key in keep if key in target.attrs}
    if "mattr" in config:
        config["mattr"] = [str(item) for item in config["mattr"]]
    return {"kind": str(target.kind), **config}


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[-1].split(". ")[0][:200]
