"""Whose a record is: this machine and these versions, the folder of a target, and whether a record fits."""

from __future__ import annotations

import re
from typing import Any

from schedules import machine_of
from schedules.cuda.device import Gpu

from .. import host
from .record import MachineId, Record, Versions, feature_hash


def folder_of(machine: MachineId) -> str:
    """The folder of a target inside the log folder: "llvm-sapphirerapids"; "llvm" where the CPU has no name."""
    name = "-".join(part for part in (machine.target, machine.mcpu) if part)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", name).lstrip(".") or "unknown"


def this_machine(target: Any = "llvm", threads: int | None = None) -> MachineId:
    """The machine that code for `target` (text, dict or TVM's) will run on, with `threads` (default: its cores).

    `cpu` is this machine's model where it can run that code, and "" where it cannot: which model will is not known
    then. A GPU takes the CPU's place: `mcpu` is its architecture, `cpu` its name, `cores` its multiprocessors, and
    there is one thread, the one that launches. Raises InputError for a target that cannot be read.
    """
    from ..bench.header import cpu_model
    from ..pipeline import resolve_target

    resolved = resolve_target(target)
    machine = machine_of(resolved)
    if isinstance(machine, Gpu):
        return _gpu(machine, str(resolved.kind.name))
    needed, present = host.kernel_names(machine.arch, machine.features), host.cpu_flags()
    runs_here = machine.arch == host.host_arch() and (present is None or present.issuperset(needed))
    cpu = cpu_model() if runs_here else ""
    features, count = feature_hash(machine.features), threads or machine.cores
    return MachineId(str(resolved.kind.name), machine.mcpu, features, cpu, machine.cores, count)


def _gpu(machine: Gpu, kind: str) -> MachineId:
    from ..cuda.device import gpu_here

    here = gpu_here()
    name = here.name if here is not None and here.runs(machine) else ""
    features = feature_hash({*machine.archs, *(("tf32",) if machine.allow_tf32 else ())})
    cores = here.multiprocessors if here is not None and name else machine.multiprocessors
    return MachineId(kind, ",".join(machine.archs), features, name, cores, 1)


def this_versions() -> Versions:
    """The versions that make code now."""
    import tvm

    from .. import __version__

    return Versions(__version__, str(tvm.__version__))


def fits(record: Record, machine: MachineId, versions: Versions) -> str | None:
    """None where `record` may decide what is compiled for `machine` by `versions`, else the reason in a clause."""
    return other_machine(record, machine) or other_versions(record, versions)


def other_machine(record: Record, machine: MachineId) -> str | None:
    """None where `record` was measured on a machine like `machine`, else what differs.

    Code, CPU model and threads must be the same; the cores beside those threads may be others. Where the CPU that will
    run the code is not known (cross compilation) the code alone is compared.
    """
    then = record.machine
    if (then.target, then.mcpu) != (machine.target, machine.mcpu):
        return f"another target: {code_of(then)} instead of {code_of(machine)}"
    if machine.cpu and then.cpu != machine.cpu:
        return f"another CPU: {then.cpu or 'unknown'} instead of {machine.cpu}"
    if then.features != machine.features:
        return f"other CPU features: {then.features} instead of {machine.features}"
    if then.threads != machine.threads:
        return f"{then.threads} thread{'' if then.threads == 1 else 's'} instead of {machine.threads}"
    return None


def other_versions(record: Record, versions: Versions) -> str | None:
    """None where `record` was made by the TVM, the gemmify (major and minor number) and the knobs of `versions`, else
    what differs: such a record is a seed for tuning, and nothing that a compilation may rest on."""
    then = record.versions
    if then.tvm != versions.tvm:
        return f"TVM {then.tvm} instead of {versions.tvm}"
    if minor(then.gemmify) != minor(versions.gemmify):
        return f"gemmify {then.gemmify} instead of {versions.gemmify}"
    if then.space != versions.space:
        return f"another version of the space: {then.space} instead of {versions.space}"
    return None


def minor(version: str) -> str:
    """ "0.1" of "0.1.3"."""
    return ".".join(version.split(".")[:2])


def code_of(machine: MachineId) -> str:
    """The target as a text: "llvm -mcpu=sapphirerapids", "llvm" where the CPU has no name."""
    option = "arch" if machine.target == "cuda" else "mcpu"
    return f"{machine.target} -{option}={machine.mcpu}" if machine.mcpu else machine.target
