"""For any function: the first data-parallel loop of each block over the cores, everything else as it came."""

from __future__ import annotations

from tvm import s_tir
from tvm.s_tir import ScheduleError
from tvm.tirx import PrimFunc

from ..machine import Machine
from .blocks import SPATIAL, root_blocks
from .parallel import SERIAL_WORK, extent


def schedule_fallback(func: PrimFunc, machine: Machine) -> PrimFunc:
    """A function that computes the same; never fails (what cannot be scheduled is returned as it is)."""
    try:
        sch = s_tir.Schedule(func)
        blocks = root_blocks(sch)
    except (ScheduleError, ValueError, RuntimeError, TypeError):
        return func
    for block in blocks:
        if machine.cores == 1 or block.work < SERIAL_WORK:
            continue
        try:
            loops = sch.get_loops(block.rv)
            kinds = [int(it.iter_type) for it in block.iters]
            if len(loops) != len(kinds):
                continue
            wide = (loop for loop, kind in zip(loops, kinds, strict=True) if kind == SPATIAL and extent(sch, loop) > 1)
            first = next(wide, None)
            if first is not None:
                sch.parallel(first)
        except ScheduleError:
            continue
    return sch.mod["main"]
