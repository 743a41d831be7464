"""A GEMM one of whose operands is copied together first, a block at a time: the copy and the GEMM of a block in turn.

The block that copies carries the annotation `gemmify.copy`, which says where the copy lives:

    "whole"    it is all copied before anything else; it may also stand alone, its GEMM in another function
    "shared"   one block of it: the cores copy a block together, then multiply it together, block after block
    "private"  one block of it a core: blocks in parallel, each core copies its own and multiplies it

The first axis of the copy and of the GEMM (its first `o`) counts the blocks. `gemmify.period`, where the copy has it,
is the number of steps of the second axis after which its addresses repeat but for a constant: so many steps are written
out, in the innermost place but one. `gemmify.unblock` marks an elementwise block that cuts the blocked result to size.

  1. the block that cuts to size is merged into the store of the GEMM's tiles
  2. the GEMM: blocks, panels, tiles, the reduction, the register tile
  3. the copy moves in front of the GEMM of its block
  4. after lowering to loops, the copy's conditions and runs are cut apart and vectorised (runs.py)
"""

from __future__ import annotations

from math import prod
from typing import Any

import tvm_ffi
from tvm import s_tir
from tvm.tirx import BufferStore, IfThenElse, PrimFunc, Stmt

from ..machine import Machine
from .chain import place_consumer
from .gemm import AXES_ANNOTATION, default_knobs, schedule_gemm, tile_loops, unroll_tile
from .parallel import extent, parallelize
from .runs import vectorize_copies
from .tir_tools import in_root_block, lower_blocks

COPY_ANNOTATION = "gemmify.copy"
PERIOD_ANNOTATION = "gemmify.period"
UNBLOCK_ANNOTATION = "gemmify.unblock"
WHOLE, SHARED, PRIVATE = "whole", "shared", "private"


def find_copy_block(sch: s_tir.Schedule, func_name: str = "main") -> Any | None:
    """The schedule's block that carries `gemmify.copy`, or None."""
    for block in sch.get_child_blocks(sch.get_sblock("root", func_name=func_name)):
        if COPY_ANNOTATION in sch.get(block).annotations:
            return block
    return None


def merge_unblock(sch: s_tir.Schedule) -> None:
    """Step 1, for a GEMM without a copy too: every block marked `gemmify.unblock` goes into the one that it reads."""
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if UNBLOCK_ANNOTATION in sch.get(block).annotations:
            sch.reverse_compute_inline(block)


def schedule_blocked(sch: s_tir.Schedule, copy: Any, gemm: Any | None, machine: Machine) -> PrimFunc:
    """The function of the schedule with its copy and the GEMM behind it scheduled, the copy's loops in vectors."""
    where = str(sch.get(copy).annotations[COPY_ANNOTATION])
    buffer = str(sch.get(copy).writes[0].source.name)
    assert gemm is not None or where == WHOLE, "a copy of blocks stands with its GEMM"
    guarded = None
    if where == WHOLE:
        _split_copy(sch, copy, sch.get_loops(copy), machine, parallel=True)
        if gemm is not None:
            schedule_gemm(sch, gemm, machine)
    else:
        guarded = _partial_output(sch, gemm)
        _schedule_in_blocks(sch, copy, gemm, machine, where == SHARED)
    func = vectorize_copies(lower_blocks(sch.mod["main"]), buffer, machine)
    return in_root_block(func if guarded is None else _guard_stores(func, guarded))


def _partial_output(sch: s_tir.Schedule, gemm: Any) -> str | None:
    """The name of the output where the last block reaches past its end, else None."""
    (consumer,) = sch.get_consumers(gemm)
    output = sch.get(consumer).writes[0].source
    points = prod(int(v.dom.extent) for v in sch.get(consumer).iter_vars)
    return None if points == prod(int(size) for size in output.shape) else str(output.name)


def _guard_stores(func: PrimFunc, name: str) -> PrimFunc:
    """Every store to the buffer `name` under the condition that its first index lies inside: `reverse_compute_at` keeps
    no predicate of the block that it moves."""

    def guard(store: BufferStore) -> Stmt:
        if store.buffer.name != name:
            return store
        return IfThenElse(store.indices[0] < store.buffer.shape[0], store, None)

    return func.with_body(tvm_ffi.structural_map(func.body, (BufferStore, guard)))


def _schedule_in_blocks(sch: s_tir.Schedule, copy: Any, gemm: Any, machine: Machine, shared: bool) -> None:
    (consumer,) = sch.get_consumers(gemm)
    # 2.
    dtype = str(sch.get(gemm).writes[0].source.dtype)
    lanes = machine.lanes(dtype)
    rows = int(sch.get(consumer).iter_vars[-2].dom.extent)
    by_letter, reduction = tile_loops(sch, gemm, str(sch.get(gemm).annotations[AXES_ANNOTATION]))
    block, *outer = by_letter["o"]
    (tile,) = by_letter["t"]
    partial = extent(sch, tile) * extent(sch, by_letter["i"][0]) != rows
    panels_outside = shared and default_knobs(sch, gemm, machine).panels_outside
    order = [*by_letter["p"], *outer] if panels_outside else [*outer, *by_letter["p"]]
    sch.reorder(block, *order, tile, *reduction, *by_letter["i"], *by_letter["j"])
    at = tile
    if partial:
        sch.annotate(tile, "pragma_loop_partition_hint", True)
    if shared:
        within = sch.fuse(*order) if partial else sch.fuse(*order, tile)
        at = tile if partial else within
        sch.parallel(within)
    else:
        sch.parallel(block)
    sch.set_scope(gemm, 0, "local")
    place_consumer(sch, consumer, at, lanes)
    _unroll_short(sch, reduction[-1])
    unroll_tile(sch, by_letter["i"][0], by_letter["j"][0], lanes)
    init = sch.decompose_reduction(gemm, reduction[0])
    init_i, init_j = sch.get_loops(init)[-2:]
    unroll_tile(sch, init_i, init_j, lanes)
    # 3.
    sch.compute_at(copy, block, preserve_unit_loops=True)
    _split_copy(sch, copy, sch.get_loops(copy)[1:], machine, parallel=shared)


def _unroll_short(sch: s_tir.Schedule, loop: Any) -> None:
    if extent(sch, loop) <= 4:
        sch.unroll(loop)


def _split_copy(sch: s_tir.Schedule, copy: Any, loops: list[Any], machine: Machine, parallel: bool) -> None:
    """The loops of a copy, its first axes over the cores where asked; a period written out innermost but one."""
    axes = len(sch.get(copy).iter_vars)
    blocks = loops[: len(loops) - axes + 1]
    loops = loops[len(blocks) :]
    work = 1
    for loop in (*blocks, *loops):
        work *= extent(sch, loop)
    period = sch.get(copy).annotations.get(PERIOD_ANNOTATION)
    if period is not None:
        many, few = sch.split(loops[0], [None, int(period)])
        order = [many, *loops[1:-1]] if extent(sch, loops[1]) < 4 * machine.cores else [loops[1], many, *loops[2:-1]]
        sch.reorder(*order, few, loops[-1])
        sch.unroll(few)
        loops = order
    else:
        loops = loops[:-1]
    if parallel:
        parallelize(sch, [*blocks, *loops[:2]], work, machine)
