"""The GEMM schedule: a register tile of C, its reduction inside it, its epilogue written from the same registers.

It finds the block whose annotation `gemmify.axes` names its spatial axes (`o` outer, `t` tile, `p` panel, `i` row, `j`
column of the tile) and knows nothing else of what is computed.

  1. loops: outer, panel and tile outside; the reduction; the `mr x nr` tile innermost, unrolled and vectorised
  2. parallel over the outer loops, as many as it takes to feed every core
  3. the accumulators go to a local buffer, which LLVM keeps in registers once every index is constant
  4. the consumer (epilogue and store) is computed at the tile, from the registers
  5. a partial last tile is split off by loop partitioning, so that full tiles carry no condition; likewise the end of a
     reduction axis that some outer rows do not run to (`gemmify.ragged`)

Needs `mr (nr / lanes) + nr / lanes + 1` vector registers: 14 x 32 float32 uses 31 of AVX-512's 32.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvm import s_tir

from ..machine import Machine
from .borders import BORDERS_ANNOTATION
from .gemm_knobs import AXES_ANNOTATION, PARALLEL_CYCLES, PREFETCH_BYTES, GemmSizes, Knobs, divisor, one_of
from .prefetch import PREFETCH_ANNOTATION

RAGGED_ANNOTATION = "gemmify.ragged"


def find_gemm_block(sch: s_tir.Schedule, func_name: str = "main") -> Any | None:
    """The schedule's block that carries `gemmify.axes`, or None."""
    for block in sch.get_child_blocks(sch.get_sblock("root", func_name=func_name)):
        if AXES_ANNOTATION in sch.get(block).annotations:
            return block
    return None


def schedule_gemm(sch: s_tir.Schedule, block: Any, machine: Machine, knobs: Knobs | None = None) -> None:
    """Schedule the GEMM block and its one consumer in place; see the module for the steps, `knobs.py` for the knobs.

    Raises ValueError for a value of a knob that this GEMM cannot have.
    """
    knobs, sizes = knobs or {}, GemmSizes(sch.get(block), sch.mod["main"], machine)
    consumers = sch.get_consumers(block)
    assert len(consumers) == 1, "a GEMM block has exactly one consumer, which writes the output"
    consumer = consumers[0]
    notes = sch.get(block).annotations

    by_letter, reduction = tile_loops(sch, block, sizes.letters)

    # 1. loop order
    order = block_order(sch, by_letter, sizes, knobs)
    sch.reorder(*order, *([] if sizes.over_tiles else by_letter["t"]), *reduction, *by_letter["i"], *by_letter["j"])
    # 2. the tile loop joins the parallel loop unless its last tile is split off (5)
    if not sizes.full:
        if BORDERS_ANNOTATION not in notes:
            sch.annotate(by_letter["t"][0], "pragma_loop_partition_hint", True)
        at, shared = by_letter["t"][0], sch.fuse(*order)
    else:
        at = shared = sch.fuse(*order, *([] if sizes.over_tiles else by_letter["t"]))
    if sizes.cycles > PARALLEL_CYCLES:
        sch.parallel(shared)
    for loop in reduction[: int(notes.get(RAGGED_ANNOTATION, 0))]:
        sch.annotate(loop, "pragma_loop_partition_hint", True)
    # 3. accumulators in registers
    sch.set_scope(block, 0, "local")
    # 4. epilogue from registers
    sch.reverse_compute_at(consumer, at, preserve_unit_loops=True)
    unroll_reduction(sch, reduction, sizes, knobs)
    unroll_tile(sch, by_letter["i"][0], by_letter["j"][0], sizes.lanes)
    init = sch.decompose_reduction(block, reduction[0])
    init_i, init_j = sch.get_loops(init)[-2:]
    unroll_tile(sch, init_i, init_j, sizes.lanes)
    _schedule_store(sch, consumer, at, sizes.lanes)


def block_order(sch: s_tir.Schedule, by_letter: dict[str, list[Any]], sizes: GemmSizes, knobs: Knobs) -> list[Any]:
    """The loops around the tiles, outermost first: blocks of panels, blocks of rows, panels, rows."""
    row_block = divisor(knobs, "row_block", sizes.rows, "rows", sizes.row_block)
    panel_block = divisor(knobs, "panel_block", sizes.panels, "panels", sizes.panels)
    outer, panels, tiles = by_letter["o"], by_letter["p"], by_letter["t"] if sizes.over_tiles else []
    if (row_block, panel_block) == (sizes.row_block, sizes.panels):
        return [*(panels + outer if sizes.large_b else outer + panels), *tiles]
    # Side by side first: fused are loops that have nothing between them.
    sch.reorder(*outer, *by_letter["t"], *panels)
    row_order = _in_blocks(sch, [*outer, *tiles], sizes.rows, row_block)
    panel_order = _in_blocks(sch, panels, sizes.panels, panel_block)
    return [*panel_order[0], *row_order[0], *panel_order[1], *row_order[1]]


def _in_blocks(sch: s_tir.Schedule, loops: list[Any], extent: int, block: int) -> tuple[list[Any], list[Any]]:
    """(loops over the blocks, loops within one) of nested loops of `extent` steps in all."""
    if block == extent:
        return [], loops
    if block == 1:
        return loops, []
    many, few = sch.split(sch.fuse(*loops), [None, block])
    return [many], [few]


def unroll_reduction(sch: s_tir.Schedule, reduction: list[Any], sizes: GemmSizes, knobs: Knobs) -> None:
    """Write out `k_unroll` steps of the innermost reduction loop; ask for the panel of B `prefetch` bytes ahead.

    Where the loop is split, `reduction` ends in its two parts afterwards.
    """
    innermost = reduction[-1]
    steps = divisor(knobs, "k_unroll", _extent(sch, innermost), "steps of the innermost reduction", sizes.k_unroll)
    ahead = one_of(knobs, "prefetch", (0, *PREFETCH_BYTES), 0)
    outer = innermost
    if 1 < steps < _extent(sch, innermost):
        reduction[-1:] = outer, innermost = sch.split(innermost, [None, steps])
    if steps > 1:
        sch.unroll(innermost)
    if ahead:
        sch.annotate(outer, PREFETCH_ANNOTATION, ahead)


def tile_loops(sch: s_tir.Schedule, block: Any, axes: str) -> tuple[dict[str, list[Any]], list[Any]]:
    """The innermost loops of a GEMM block: the spatial ones by their letter in `axes`, and those of the reduction."""
    reductions = sum(int(v.iter_type) == 2 for v in sch.get(block).iter_vars)
    loops = sch.get_loops(block)[-(len(axes) + reductions) :]
    spatial = loops[: len(axes)]
    by_letter = {letter: [l for l, a in zip(spatial, axes, strict=True) if a == letter] for letter in "otpij"}
    return by_letter, loops[len(axes) :]


def unroll_tile(sch: s_tir.Schedule, i: Any, j: Any, lanes: int) -> None:
    """Rows and vectors of the tile unrolled, one vector register at a time: odd widths then cost nothing extra."""
    sch.unroll(i)
    extent = _extent(sch, j)
    if extent <= lanes:
        sch.vectorize(j)
        return
    vectors, lane = sch.split(j, [None, lanes if extent % lanes == 0 else gcd(extent, lanes)])
    sch.unroll(vectors)
    sch.vectorize(lane)


def _schedule_store(sch: s_tir.Schedule, consumer: Any, at: Any, lanes: int) -> None:
    """Vectorise the epilogue along the output's last axis in runs that lie wholly inside or outside the output."""
    loops = sch.get_loops(consumer)
    depth = next(d for d, l in enumerate(loops) if sch.get(l).loop_var.same_as(sch.get(at).loop_var))
    inner = loops[depth + 1 :]
    output = sch.get(consumer).writes[0].source
    run = gcd(int(output.shape[-1]), lanes)
    for loop in inner[:-1]:
        sch.unroll(loop)
    last = inner[-1]
    run = gcd(run, _extent(sch, last))
    vectors, lane = sch.split(last, [None, run])
    sch.unroll(vectors)
    if run > 1:
        sch.vectorize(lane)


def _extent(sch: s_tir.Schedule, loop: Any) -> int:
    return int(sch.get(loop).extent)


__all__ = ["AXES_ANNOTATION", "find_gemm_block", "schedule_gemm"]
