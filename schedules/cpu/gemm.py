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

from dataclasses import dataclass
from math import gcd, prod
from typing import Any

from tvm import s_tir

from ..machine import Machine

AXES_ANNOTATION = "gemmify.axes"
ROWS_ANNOTATION = "gemmify.rows"
RAGGED_ANNOTATION = "gemmify.ragged"

# Waking the other cores and waiting for them takes a few microseconds: a GEMM of fewer cycles runs on one core.
PARALLEL_CYCLES = 12_000


@dataclass(frozen=True)
class GemmKnobs:
    """What a tuner may choose beside the register tile: loop order and unrolling of the reduction.

    `panels_outside` runs all rows for one panel of B before the next panel (B stays in the cache); otherwise all panels
    for one row (A stays). `k_unroll` copies of the innermost reduction body are emitted.
    """

    panels_outside: bool = True
    k_unroll: int = 1


def find_gemm_block(sch: s_tir.Schedule, func_name: str = "main") -> Any | None:
    """The schedule's block that carries `gemmify.axes`, or None."""
    for block in sch.get_child_blocks(sch.get_sblock("root", func_name=func_name)):
        if AXES_ANNOTATION in sch.get(block).annotations:
            return block
    return None


def default_knobs(sch: s_tir.Schedule, block: Any, machine: Machine) -> GemmKnobs:
    """Panels outside unless all of B fits into half of a core's L2; the reduction unrolled to at least 4 steps."""
    # A layer whose every input element is padding reads nothing at all.
    fits = all(
        prod(int(extent) for extent in region.source.shape)
        * machine.vector_bytes
        // machine.lanes(str(region.source.dtype))
        <= machine.l2_bytes // 2
        for region in list(sch.get(block).reads)[-1:]
    )
    inner_k = [int(v.dom.extent) for v in sch.get(block).iter_vars if int(v.iter_type) == 2][-1]
    return GemmKnobs(panels_outside=not fits, k_unroll=inner_k if inner_k <= 4 else 1)


def schedule_gemm(sch: s_tir.Schedule, block: Any, machine: Machine, knobs: GemmKnobs | None = None) -> None:
    """Schedule the GEMM block and its one consumer in place; see the module for the steps."""
    knobs = knobs or default_knobs(sch, block, machine)
    axes = str(sch.get(block).annotations[AXES_ANNOTATION])
    consumers = sch.get_consumers(block)
    assert len(consumers) == 1, "a GEMM block has exactly one consumer, which writes the output"
    consumer = consumers[0]
    dtype = str(sch.get(block).writes[0].source.dtype)
    lanes = machine.lanes(dtype)
    notes = sch.get(block).annotations
    inner = int(notes[ROWS_ANNOTATION]) if ROWS_ANNOTATION in notes else _consumer_inner(sch, consumer)

    by_letter, reduction = tile_loops(sch, block, axes)
    partial = _extent(sch, by_letter["t"][0]) * _extent(sch, by_letter["i"][0]) != inner

    steps = prod(_extent(sch, loop) for loop in sch.get_loops(block))
    cycles = steps // (lanes * machine.fma_ports)

    # 1. loop order
    order = by_letter["p"] + by_letter["o"] if knobs.panels_outside else by_letter["o"] + by_letter["p"]
    sch.reorder(*order, *by_letter["t"], *reduction, *by_letter["i"], *by_letter["j"])
    # 2. the tile loop joins the parallel loop unless its last tile is split off (5)
    if partial:
        sch.annotate(by_letter["t"][0], "pragma_loop_partition_hint", True)
        at, shared = by_letter["t"][0], sch.fuse(*order)
    else:
        at = shared = sch.fuse(*order, *by_letter["t"])
    if cycles > PARALLEL_CYCLES:
        sch.parallel(shared)
    for loop in reduction[: int(notes.get(RAGGED_ANNOTATION, 0))]:
        sch.annotate(loop, "pragma_loop_partition_hint", True)
    # 3. accumulators in registers
    sch.set_scope(block, 0, "local")
    # 4. epilogue from registers
    sch.reverse_compute_at(consumer, at, preserve_unit_loops=True)
    if knobs.k_unroll > 1:
        innermost = reduction[-1]
        if knobs.k_unroll < _extent(sch, innermost):
            innermost = sch.split(innermost, [None, gcd(knobs.k_unroll, _extent(sch, innermost))])[1]
        sch.unroll(innermost)
    unroll_tile(sch, by_letter["i"][0], by_letter["j"][0], lanes)
    init = sch.decompose_reduction(block, reduction[0])
    init_i, init_j = sch.get_loops(init)[-2:]
    unroll_tile(sch, init_i, init_j, lanes)
    _schedule_store(sch, consumer, at, lanes)


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


def _consumer_inner(sch: s_tir.Schedule, consumer: Any) -> int:
    """Extent of the consumer's second to last axis: the rows that the tiles cover."""
    return int(sch.get(consumer).writes[0].source.shape[-2])


def _extent(sch: s_tir.Schedule, loop: Any) -> int:
    return int(sch.get(loop).extent)


__all__ = ["AXES_ANNOTATION", "GemmKnobs", "default_knobs", "find_gemm_block", "schedule_gemm"]
