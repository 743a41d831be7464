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
from .gemm import block_order, schedule_gemm, tile_loops, unroll_reduction, unroll_tile
from .gemm_knobs import GemmSizes, Knobs
from .parallel import extent, parallelize
from .prefetch import prefetch_panels
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


def schedule_blocked(sch: s_tir.Schedule, copy: Any, gemm: Any | None, machine: Machine, knobs: Knobs) -> PrimFunc:
    """The function of the schedule with its copy and the GEMM behind it scheduled, the copy's loops in vectors."""
    where = str(sch.get(copy).annotations[COPY_ANNOTATION])
    buffer = str(sch.get(copy).writes[0].source.name)
    assert gemm is not None or where == WHOLE, "a copy of blocks stands with its GEMM"
    guarded = None
    if where == WHOLE:
        _split_copy(sch, copy, sch.get_loops(copy), machine, parallel=True)
        if gemm is not None:
            schedule_gemm(sch, gemm, machine, knobs)
    else:
        guarded = _partial_output(sch, gemm)
        _schedule_in_blocks(sch, copy, gemm, machine, where == SHARED, knobs)
    func = vectorize_copies(lower_blocks(prefetch_panels(sch.mod["main"])), buffer, machine)
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


def _schedule_in_blocks(
    sch: s_tir.Schedule, copy: Any, gemm: Any, machine: Machine, shared: bool, knobs: Knobs
) -> None:
    (consumer,) = sch.get_consumers(gemm)
    # 2.
    sizes = blocked_sizes(sch.get(gemm), sch.mod["main"], machine, shared)
    by_letter, reduction = tile_loops(sch, gemm, sizes.letters)
    block = by_letter["o"].pop(0)
    (tile,) = by_letter["t"]
    partial = not sizes.full
    order = block_order(sch, by_letter, sizes, knobs)
    tiles = [] if sizes.over_tiles else [tile]
    sch.reorder(block, *order, *tiles, *reduction, *by_letter["i"], *by_letter["j"])
    at = order[-1] if sizes.over_tiles else tile
    if partial:
        sch.annotate(tile, "pragma_loop_partition_hint", True)
    if shared:
        within = sch.fuse(*order) if partial else sch.fuse(*order, *tiles)
        at = tile if partial else within
        sch.parallel(within)
    else:
        sch.parallel(block)
    sch.set_scope(gemm, 0, "local")
    place_consumer(sch, consumer, at, sizes.lanes)
    unroll_reduction(sch, reduction, sizes, knobs)
    unroll_tile(sch, by_letter["i"][0], by_letter["j"][0], sizes.lanes)
    init = sch.decompose_reduction(gemm, reduction[0])
    init_i, init_j = sch.get_loops(init)[-2:]
    unroll_tile(sch, init_i, init_j, sizes.lanes)
    # 3.
    sch.compute_at(copy, block, preserve_unit_loops=True)
    _split_copy(sch, copy, sch.get_loops(copy)[1:], machine, parallel=shared)


def blocked_sizes(gemm: Any, func: PrimFunc, machine: Machine, shared: bool) -> GemmSizes:
    """The sizes of the GEMM of one block, whose rows are what the first axis does not count."""
    return GemmSizes(gemm, func, machine, lead=1, serial=not shared)


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
