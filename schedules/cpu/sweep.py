"""Schedules of separable maps: a tile swept along one axis, then along the other, each line of it held in registers.

A block annotated `gemmify.sweep` ends a sweep and names its axes with one letter each: `o` an outer axis, `r` one line
after another, `u` the elements of a line, unrolled, `v` the channels, vectorised. The blocks that carry `gemmify.step`
are small maps of the same line. The second of two sweeps also carries `gemmify.chunk`, how many channels are kept
between the two, and `gemmify.stored` where its own result is what is stored.

  1. loops of the second sweep: outer and chunks of channels, fused and parallel; its lines; vectors of the chunk; the
     line, unrolled
  2. its steps are computed one line and vector at a time in local buffers with constant indices: registers
  3. the first sweep is computed once a chunk into a buffer of that core, its steps as in 2
  4. what is done to the result behind the second sweep (an epilogue and the store) is computed a line at a time
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir

from ..machine import Machine
from .chain import place_consumer

SWEEP_ANNOTATION = "gemmify.sweep"
CHUNK_ANNOTATION = "gemmify.chunk"
STEP_ANNOTATION = "gemmify.step"
STORED_ANNOTATION = "gemmify.stored"


_LINE_BYTES = 64


def find_sweeps(sch: s_tir.Schedule, func_name: str = "main") -> list[Any]:
    """The blocks that end a second sweep, in program order."""
    root = sch.get_sblock("root", func_name=func_name)
    return [b for b in sch.get_child_blocks(root) if CHUNK_ANNOTATION in sch.get(b).annotations]


def schedule_sweeps(sch: s_tir.Schedule, second: Any, machine: Machine) -> None:
    """Schedule the two sweeps that end in the block `second`, and what consumes its result elsewhere, in place."""
    # A chunk in one vector; where a register holds less, LLVM makes several of it. With several vectors a chunk in the
    # schedule the results were wrong on narrow machines (the cause was not found).
    lanes = max(machine.lanes(str(sch.get(second).writes[0].source.dtype)), _LINE_BYTES * 8 // _bits(sch, second))
    chunk = int(sch.get(second).annotations[CHUNK_ANNOTATION])
    stored = STORED_ANNOTATION in sch.get(second).annotations
    steps, first = _steps(sch, second)
    assert first is not None, "a second sweep reads a first one"
    first_steps, _ = _steps(sch, first)
    # 1.
    by_letter = _by_letter(sch, second, sch.get_loops(second))
    chunks, within = sch.split(by_letter["v"][0], [None, chunk])
    vectors, lane = _split_vector(sch, within, lanes)
    sch.reorder(*by_letter["o"], chunks, *by_letter["r"], vectors, *by_letter["u"], lane)
    at = sch.fuse(*by_letter["o"], chunks)
    sch.parallel(at)
    _unroll_line(sch, by_letter["u"], lane)
    # 2.
    _place_steps(sch, steps, vectors)
    # 3.
    sch.compute_at(first, at, preserve_unit_loops=True)
    by_letter = _by_letter(sch, first, sch.get_loops(first)[1:])
    vectors_first, lane = _split_vector(sch, by_letter["v"][0], lanes)
    sch.reorder(*by_letter["o"], *by_letter["r"], vectors_first, *by_letter["u"], lane)
    _unroll_line(sch, by_letter["u"], lane)
    _place_steps(sch, first_steps, vectors_first)
    # 4.
    if not stored:
        (store,) = sch.get_consumers(second)
        place_consumer(sch, store, vectors, lanes)
        sch.set_scope(second, 0, "local")


def _bits(sch: s_tir.Schedule, block: Any) -> int:
    return int(tvm.DataType(str(sch.get(block).writes[0].source.dtype)).bits)


def _steps(sch: s_tir.Schedule, block: Any) -> tuple[list[Any], Any | None]:
    """The steps that `block` is computed from, nearest first, and the sweep before them, if there is one."""
    steps: list[Any] = []
    sweep = None
    frontier = [block]
    while frontier:
        for producer in sch.get_producers(frontier.pop(0)):
            annotations = sch.get(producer).annotations
            if STEP_ANNOTATION in annotations:
                steps.append(producer)
                frontier.append(producer)
            elif SWEEP_ANNOTATION in annotations:
                sweep = producer
    return steps, sweep


def _by_letter(sch: s_tir.Schedule, block: Any, loops: list[Any]) -> dict[str, list[Any]]:
    letters = str(sch.get(block).annotations[SWEEP_ANNOTATION])
    return {letter: [l for l, a in zip(loops, letters, strict=True) if a == letter] for letter in "oruv"}


def _split_vector(sch: s_tir.Schedule, loop: Any, lanes: int) -> list[Any]:
    """The loop as (vectors, lanes of one); fewer channels than a vector holds are one odd vector."""
    extent = int(sch.get(loop).extent)
    width = extent if extent <= lanes else next(d for d in range(lanes, 0, -1) if extent % d == 0)
    return list(sch.split(loop, [None, width]))


def _unroll_line(sch: s_tir.Schedule, line: list[Any], lane: Any) -> None:
    for loop in line:
        sch.unroll(loop)
    sch.vectorize(lane)


def _place_steps(sch: s_tir.Schedule, steps: list[Any], at: Any) -> None:
    for step in steps:
        sch.compute_at(step, at, preserve_unit_loops=True)
        sch.set_scope(step, 0, "local")
        loops = sch.get_loops(step)
        depth = next(d for d, loop in enumerate(loops) if sch.get(loop).loop_var.same_as(sch.get(at).loop_var))
        _unroll_line(sch, loops[depth + 1 : -1], loops[-1])
