"""Schedules of short chains of small linear maps around a GEMM, each held in registers.

A block annotated `gemmify.chain` names its axes with one letter each: `o` an outer axis, `p` an outer axis that is a
panel, `r` a serial one, `b` one of blocks (split by the sizes in `gemmify.block` into an `o` and an `r`), `u` one
that is
unrolled, `v` the one that is vectorised. `gemmify.once` marks a chain that is computed once ahead of everything, never
inside a GEMM's blocks. Its producers are small maps of the
same element; they are computed just before it, one vector at a time, in local buffers with constant indices, which LLVM
keeps in registers.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvm import s_tir

from ..machine import Machine

CHAIN_ANNOTATION = "gemmify.chain"
BLOCK_ANNOTATION = "gemmify.block"
ONCE_ANNOTATION = "gemmify.once"


def find_chain_blocks(sch: s_tir.Schedule, func_name: str = "main") -> list[Any]:
    """The blocks that carry `gemmify.chain`, in program order."""
    root = sch.get_sblock("root", func_name=func_name)
    return [b for b in sch.get_child_blocks(root) if CHAIN_ANNOTATION in sch.get(b).annotations]


def schedule_chain(
    sch: s_tir.Schedule, block: Any, machine: Machine, stop: Any | None = None, at: Any | None = None
) -> tuple[list[Any], Any]:
    """Schedule `block` and its producers up to the block `stop` (or the inputs).

    Returns (its outer loops, the loop over vectors at which the producers were placed). Where `at` is given, the block
    has been placed below that loop already and its outer loops are not touched.
    """
    letters = str(sch.get(block).annotations[CHAIN_ANNOTATION])
    lanes = machine.lanes(str(sch.get(block).writes[0].source.dtype))
    loops = sch.get_loops(block)[-len(letters) :] if at is None else _loops_below(sch, block, at, len(letters))
    by_letter: dict[str, list[Any]] = {letter: [] for letter in "opruv"}
    sizes = [int(size) for size in sch.get(block).annotations.get(BLOCK_ANNOTATION, ())]
    for loop, letter in zip(loops, letters, strict=True):
        if letter == "b":
            grid, within = sch.split(loop, [None, sizes.pop(0)])
            by_letter["o"].append(grid)
            by_letter["r"].append(within)
        else:
            by_letter[letter].append(loop)
    producers = _producers(sch, block, stop)
    v = by_letter["v"][0]
    vector = gcd(int(sch.get(v).extent), lanes)
    outer_v, lane = sch.split(v, [None, vector])
    sch.reorder(*by_letter["o"], *by_letter["p"], *by_letter["r"], outer_v, *by_letter["u"], lane)
    for loop in by_letter["u"]:
        sch.unroll(loop)
    sch.vectorize(lane)
    for producer in producers:
        sch.compute_at(producer, outer_v, preserve_unit_loops=True)
        sch.set_scope(producer, 0, "local")
        below = _loops_below(sch, producer, outer_v)
        for loop in below[:-1]:
            sch.unroll(loop)
        sch.vectorize(below[-1])
    return [*by_letter["o"], *by_letter["p"]], outer_v


def place_consumer(sch: s_tir.Schedule, consumer: Any, at: Any, lanes: int) -> None:
    """Compute the store of a chain's result at the loop `at`, unrolled, in vector runs inside the output."""
    sch.reverse_compute_at(consumer, at, preserve_unit_loops=True)
    below = _loops_below(sch, consumer, at)
    run = gcd(int(sch.get(consumer).writes[0].source.shape[-1]), int(sch.get(below[-1]).extent))
    for loop in below[:-1]:
        sch.unroll(loop)
    vectors, lane = sch.split(below[-1], [None, gcd(run, lanes)])
    sch.unroll(vectors)
    sch.vectorize(lane)


def _producers(sch: s_tir.Schedule, block: Any, stop: Any | None) -> list[Any]:
    """The blocks that `block` is computed from, nearest first, without `stop` and what lies behind it."""
    found: list[Any] = []
    frontier = [block]
    while frontier:
        for producer in sch.get_producers(frontier.pop()):
            if stop is not None and sch.get(producer).name_hint == sch.get(stop).name_hint:
                continue
            found.append(producer)
            frontier.append(producer)
    return found


def _loops_below(sch: s_tir.Schedule, block: Any, at: Any, count: int | None = None) -> list[Any]:
    """The loops of `block` inside the loop `at`; the innermost `count` of them where given."""
    loops = sch.get_loops(block)
    depth = next(d for d, loop in enumerate(loops) if sch.get(loop).loop_var.same_as(sch.get(at).loop_var))
    return loops[depth + 1 :] if count is None else loops[-count:]
