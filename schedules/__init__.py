"""Schedules: TIR -> scheduled TIR for one machine. Knows no convolution and imports nothing of `lowering`.

One contract for two kinds of machine: a `Machine` is a CPU, a `Gpu` a GPU; `machine_of` tells which one a target names.
"""

from __future__ import annotations

import tvm
from tvm.tirx import PrimFunc

from schedules.cpu.knobs import Knobs
from schedules.cpu.knobs import knob_space as _cpu_space
from schedules.cpu.rules import IS_SCHEDULED
from schedules.cpu.rules import schedule_func as _cpu_schedule
from schedules.cuda.device import Gpu
from schedules.machine import Machine
from schedules.target import TargetError, host_target, parse_target

AnyMachine = Machine | Gpu
"""What code is scheduled for."""


def machine_of(target: tvm.target.Target) -> AnyMachine:
    """What stands behind a checked target: a Machine for llvm, a Gpu for cuda. Raises TargetError for another kind."""
    return Gpu.from_target(target) if str(target.kind) == "cuda" else Machine.from_target(target)


def schedule_func(func: PrimFunc, machine: AnyMachine, knobs: Knobs | None = None) -> PrimFunc:
    """The same function, scheduled for `machine` and marked `tirx.is_scheduled`.

    `knobs` gives values of `knob_space` by name; what is missing takes its default, a name that this function's
    schedule does not have is left to the others of the layer. Raises ValueError for a name that no schedule of this
    kind of machine has, and for a value that this function cannot have.

    On a GPU the result may need scratch between its kernels: then as many tensors as its attribute `gemmify.scratch`
    says stand as outputs just before the last parameter.
    """
    if isinstance(machine, Gpu):
        from schedules.cuda.rules import schedule_func as cuda_schedule

        return cuda_schedule(func, machine, knobs)
    return _cpu_schedule(func, machine, knobs)


def schedule_module(mod: tvm.IRModule, machine: AnyMachine) -> tvm.IRModule:
    """Every PrimFunc of the module scheduled; Relax functions stay."""
    result = mod.clone() if hasattr(mod, "clone") else tvm.IRModule(dict(mod.functions.items()))
    for name, func in mod.functions.items():
        if isinstance(func, PrimFunc):
            result.update_func(name, schedule_func(func, machine))
    return result


def knob_space(func: PrimFunc, machine: AnyMachine) -> dict[str, tuple[int | str, ...]]:
    """What the schedule of an unscheduled function leaves free on `machine`: values by name, the default first.

    {} where nothing is free. Pure and cheap: nothing is scheduled. Every value may be given to `schedule_func` together
    with any values of the other names.
    """
    if isinstance(machine, Gpu):
        from schedules.cuda.gemm_knobs import knob_space as cuda_space

        return cuda_space(func, machine)
    return _cpu_space(func, machine)


__all__ = [
    "IS_SCHEDULED",
    "AnyMachine",
    "Gpu",
    "Machine",
    "TargetError",
    "host_target",
    "knob_space",
    "machine_of",
    "parse_target",
    "schedule_func",
    "schedule_module",
]
