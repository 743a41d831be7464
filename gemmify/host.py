"""What this machine is, read without a compiler: its CPU features, its architecture, the cores this process may use."""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError

# LLVM's name -> the kernel's name in /proc/cpuinfo, for the features whose instructions LLVM writes on its own from
# plain arithmetic. The rest of a CPU's list (pku, clzero, shstk, aes ...) never comes out of the code made here, and a
# hypervisor often hides it: asking for it would refuse a library on the very machine that built it.
X86_FEATURES = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "popcnt": "popcnt",
    "cx16": "cx16",
    "sahf": "lahf_lm",
    "lzcnt": "abm",
    "movbe": "movbe",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "adx": "adx",
    "f16c": "f16c",
    "fma": "fma",
    "fma4": "fma4",
    "xop": "xop",
    "tbm": "tbm",
    "gfni": "gfni",
    "avx": "avx",
    "avx2": "avx2",
    "avxvnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}
ARM_FEATURES = {
    "fp-armv8": "fp",
    "neon": "asimd",
    "fullfp16": "asimdhp",
    "rdm": "asimdrdm",
    "dotprod": "asimddp",
    "lse": "atomics",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
}
_ALIASES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_ELF_MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_CGROUP_FILES = ("/sys/fs/cgroup/cpu.max",)


def arch_of(triple: str) -> str:
    """The architecture of an LLVM triple, or of `platform.machine()`, in one spelling: "x86_64", "aarch64" ..."""
    name = triple.split("-")[0].lower()
    return _ALIASES.get(name, name)


def host_arch() -> str:
    return arch_of(platform.machine())


def kernel_names(arch: str, llvm_features: Iterable[str]) -> tuple[str, ...]:
    """The features that code for `arch` may use, sorted, in the spelling of /proc/cpuinfo."""
    table = {"x86_64": X86_FEATURES, "aarch64": ARM_FEATURES}.get(arch, {})
    return tuple(sorted(table[f] for f in llvm_features if f in table))


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str] | None:
    """The features of this CPU as the kernel names them, or None where it publishes no list."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found: frozenset[str] | None = None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            # A machine with unlike cores can run only what all of them have.
            flags = frozenset(value.split())
            found = flags if found is None else found & flags
    return found


def is_library(path: Path) -> bool:
    """Whether `path` is meant as a library: it is called .so, or is an ELF file under another name."""
    if path.suffix == ".so":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def elf_arch(path: Path) -> str:
    """The architecture of the 64-bit ELF shared library at `path`; InputError where it is none or is cut short."""
    with path.open("rb") as file:
        head = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(head) < 64 or head[:4] != b"\x7fELF" or head[4] != 2:
        raise InputError(f"{path} is not a shared library (64-bit ELF); give the .so that `gemmify compile` wrote")
    order = "<" if head[5] == 1 else ">"
    kind, machine = struct.unpack_from(order + "HH", head, 16)
    (sections_at,) = struct.unpack_from(order + "Q", head, 40)
    entry_size, entries = struct.unpack_from(order + "HH", head, 58)
    if kind != 3:
        raise InputError(f"{path} is an ELF file but not a shared library; give the .so that `gemmify compile` wrote")
    needed = sections_at + entry_size * entries
    if size < needed:
        raise InputError(f"{path} is cut short: it needs {needed} bytes and has {size}; copy or export it again")
    return _ELF_MACHINES.get(machine, f"ELF machine {machine}")


def _core_of(cpu: int, topology: Path) -> tuple[str, str] | int:
    """A key that the hardware threads of one core share; the CPU itself where the kernel does not say."""
    folder = topology / f"cpu{cpu}" / "topology"
    try:
        return (folder / "physical_package_id").read_text().strip(), (folder / "core_id").read_text().strip()
    except OSError:
        return cpu


def _cgroup_cpus(files: Iterable[str] = _CGROUP_FILES) -> int | None:
    """Whole CPUs that the control group grants (at least 1), or None where it sets no limit."""
    for name in files:
        try:
            quota, period = Path(name).read_text().split()[:2]
        except (OSError, ValueError):
            continue
        if quota != "max":
            # Rounded down: TVM's threads spin while they wait, and would burn the quota of a fraction.
            return max(1, int(quota) // max(1, int(period)))
    return None


def allowed_cpus() -> frozenset[int]:
    """The CPUs that the scheduler may put this process on."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return frozenset(range(os.cpu_count() or 1))


def usable_cpus() -> int:
    """How many CPUs this process can use at once: those that it may run on, within the control group's limit."""
    granted = _cgroup_cpus()
    return len(allowed_cpus()) if granted is None else min(len(allowed_cpus()), granted)


def physical_cores(
    cpus: Iterable[int] | None = None, topology: Path = Path("/sys/devices/system/cpu"), limit: int | None = None
) -> int:
    """Physical cores among `cpus` (default: those this process may use), within the control group's limit."""
    chosen = allowed_cpus() if cpus is None else frozenset(cpus)
    cores = max(1, len({_core_of(cpu, topology) for cpu in chosen}))
    granted = _cgroup_cpus() if limit is None else limit
    return cores if granted is None else min(cores, granted)
