"""The schedule of a CPU function: an ordered list of rules by structure and annotation, the fallback last.

    1. blocks annotated as a copy, with or without the GEMM that reads it (blocked.py), as chains, with or without a
       GEMM between them (staged.py), as sweeps (sweep.py), or as a GEMM (gemm.py);
    2. anything else: inline what only maps elements (inline.py); then from the last block to the first a reduction with
       its neighbours (reduction.py), else an elementwise block (elementwise.py); lower to loops, cut conditions out of
       the inner loops and vectorise them (vectorize.py);
    3. the fallback (fallback.py), vectorised in the same way.

Whatever the rule, exp and its like are written out as vector arithmetic at the end (vector_math.py).
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import s_tir
from tvm.s_tir import ScheduleError
from tvm.tirx import PrimFunc

from ..machine import Machine
from .accumulate import schedule_accumulate
from .blocked import find_copy_block, merge_unblock, schedule_blocked
from .blocks import BlockInfo, root_blocks
from .borders import BORDERS_ANNOTATION, cut_borders
from .chain import find_chain_blocks
from .elementwise import schedule_elementwise
from .fallback import schedule_fallback
from .gemm import find_gemm_block, schedule_gemm
from .inline import inline_producers
from .knobs import Knobs, changed, require_known
from .prefetch import prefetch_panels
from .reduction import group_of, root_reduction, schedule_group, split_off_result
from .staged import schedule_staged
from .sweep import find_sweeps, schedule_sweeps
from .tir_tools import in_root_block, lower_blocks
from .vector_math import rewrite_math
from .vectorize import vectorize

IS_SCHEDULED = "tirx.is_scheduled"


def schedule_func(func: PrimFunc, machine: Machine, knobs: Knobs | None = None) -> PrimFunc:
    """The same function, scheduled for `machine` and marked `tirx.is_scheduled`.

    `knobs` gives values of `knob_space` by name; what is missing takes its default, a name that this function's
    schedule does not have is left to the others of the layer. Raises ValueError for a name that no schedule has, for a
    value that this function cannot have, and where the schedule fails with knobs that are not at their defaults.

    A function that carries the mark, or that is no block-level TIR, comes back unchanged but for the mark. A rule
    whose primitives refuse the function gives way to the next one.
    """
    if func.attrs and IS_SCHEDULED in func.attrs and func.attrs[IS_SCHEDULED]:
        return func
    knobs = knobs or {}
    require_known(knobs)
    scheduled: PrimFunc | None = func
    if func.attrs and "s_tir" in func.attrs:
        for rule in _RULES:
            try:
                scheduled = rule(func, machine, knobs)
            except ScheduleError as error:
                if asked := changed(func, machine, knobs):
                    said = f"the schedule cannot be made with {', '.join(asked)}; leave them at their defaults"
                    raise ValueError(said) from error
                continue
            if scheduled is not None:
                break
    assert scheduled is not None, "the fallback takes every function"
    return scheduled.with_attr(IS_SCHEDULED, True)


def schedule_module(mod: tvm.IRModule, machine: Machine) -> tvm.IRModule:
    """Every PrimFunc of the module scheduled; Relax functions stay."""
    result = mod.clone() if hasattr(mod, "clone") else tvm.IRModule(dict(mod.functions.items()))
    for name, func in mod.functions.items():
        if isinstance(func, PrimFunc):
            result.update_func(name, schedule_func(func, machine))
    return result


def _annotated(func: PrimFunc, machine: Machine, knobs: Knobs) -> PrimFunc | None:
    """Rule 1; None for a function without the annotations."""
    if (summed := schedule_accumulate(func, machine)) is not None:
        return rewrite_math(summed)
    sch = s_tir.Schedule(func, error_render_level="none")
    merge_unblock(sch)
    gemm, chains = find_gemm_block(sch), find_chain_blocks(sch)
    if (copy := find_copy_block(sch)) is not None:
        return rewrite_math(schedule_blocked(sch, copy, gemm, machine, knobs))
    sweeps = find_sweeps(sch)
    for sweep in sweeps:
        schedule_sweeps(sch, sweep, machine)
    if chains:
        schedule_staged(sch, chains, gemm, machine, knobs)
    elif gemm is not None:
        schedule_gemm(sch, gemm, machine, knobs)
    elif not sweeps:
        return None
    borders = gemm is not None and BORDERS_ANNOTATION in sch.get(gemm).annotations
    scheduled = prefetch_panels(sch.mod["main"])
    scheduled = cut_borders(scheduled) if borders else scheduled
    return rewrite_math(scheduled)


def _by_structure(func: PrimFunc, machine: Machine, knobs: Knobs) -> PrimFunc:
    """Rule 2."""
    return _in_vectors(_blocks_by_structure(func, machine), machine)


def _fallback(func: PrimFunc, machine: Machine, knobs: Knobs) -> PrimFunc:
    """Rule 3."""
    return _in_vectors(schedule_fallback(func, machine), machine)


_RULES: tuple[Callable[[PrimFunc, Machine, Knobs], PrimFunc | None], ...] = (_annotated, _by_structure, _fallback)


def _in_vectors(func: PrimFunc, machine: Machine) -> PrimFunc:
    return in_root_block(rewrite_math(vectorize(lower_blocks(func), machine)))


def _blocks_by_structure(func: PrimFunc, machine: Machine) -> PrimFunc:
    sch = s_tir.Schedule(func, error_render_level="none")
    inline_producers(sch)
    waiting = [block.name for block in root_blocks(sch)]
    while waiting:
        finished = _one(sch, waiting, machine)
        waiting = [name for name in waiting if name not in finished]
    return sch.mod["main"]


def _one(sch: s_tir.Schedule, waiting: list[str], machine: Machine) -> set[str]:
    """Schedule the last waiting block and what moves into its loops; the names of the blocks that are finished."""
    name = waiting[-1]
    block = BlockInfo(rv := sch.get_sblock(name), sch.get(rv))
    result = block
    if block.is_reduction and len(block.written) == 1 and block.write_axes is not None:
        result = split_off_result(sch, block)
    blocks = root_blocks(sch)
    members = group_of(result, blocks, {name, *waiting}, sch.mod["main"])
    if result.spatial and members and schedule_group(sch, result, members, machine):
        return {name, *(member.name for member in members)}
    if result is not block:
        sch.reverse_compute_inline(result.rv)
        root_reduction(sch, BlockInfo(rv := sch.get_sblock(name), sch.get(rv)), machine)
    elif block.spatial:
        schedule_elementwise(sch, block, machine)
    return {name}
