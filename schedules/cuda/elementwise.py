"""Equations without a sum: arithmetic, padding, concatenation, slices, resizing, patches.

1. the axes in the order in which the result is stored, the last one in runs of a vector: neighbouring threads write
   neighbouring vectors;
2. loads that are neighbours along the same axis are vectors, too (emit.py); one that is a neighbour along another axis
   is left to transpose.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx import Stmt, Var

from ..cpu.tir_tools import sequence, substitute, uses
from .device import Gpu
from .emit import Grid, Run, block_threads, lane_axis, run_width, unravel, when
from .equation import Equation, number


def map_kernel(eq: Equation, gpu: Gpu) -> Stmt:
    """The kernel of an equation whose axes are all spatial."""
    work = share(eq, gpu)
    run = Run(work.lane, work.width, work.grid.analyzer)
    value = run.value(substitute(eq.value, work.at))
    run.store(eq.buffer, work.place(eq.indices), value)
    return work.grid.launch(when(work.tests, sequence(run.parts)))


@dataclass
class Share:
    """What one thread of `grid` computes: `at` gives each spatial axis, the last one by `lane`, one of `width`
    neighbours; there is nothing to do where one of `tests` does not hold. An axis of which a thread takes several
    values holds `pixel`."""

    grid: Grid
    at: dict[Var, Any]
    lane: Var
    width: int
    tests: list[Any]
    pixel: Var

    def place(self, indices: Sequence[Any]) -> list[Any]:
        """`indices` of the thread."""
        return [self.grid.analyzer.simplify(substitute(i, self.at)) for i in indices]


def share(
    eq: Equation, gpu: Gpu, split: int = 1, beside: int | None = None, several: tuple[Var, int] | None = None
) -> Share:
    """The results of `eq` divided among threads, runs of neighbours that are stored side by side to neighbouring ones.

    `split` threads (along threadIdx.y) share each result; `beside` of them stand along threadIdx.x. A thread takes
    several values, side by side, of the axis that `several` names; their number divides it.
    """
    axes = stored_order(eq)
    last = lane_axis(eq.indices, eq.buffer, axes, eq.value)
    lane = Var("lane", "int32")
    width = 1 if last is None else run_width(axes[last][1], eq.buffer.dtype, eq.points * split, gpu)
    if last is not None:
        axes.append(axes.pop(last))
    extents = [extent for _, extent in axes]
    if extents:
        extents[-1] //= width
    pixel, pixels = Var("pixel", "int32"), 1
    if several is not None:
        pixels = several[1]
        extents = [e // pixels if axis.same_as(several[0]) else e for (axis, _), e in zip(axes, extents, strict=True)]
    threads = eq.points // width // pixels
    size = block_threads(threads, gpu) if beside is None else min(beside, threads)
    grid = Grid(-(-threads // size), size, split)
    position = grid.block * number(size) + grid.thread
    where = unravel(position, extents, grid.analyzer)
    at = {var: index for (var, _), index in zip(axes, where, strict=True)}
    if width > 1:
        var = axes[-1][0]
        at[var] = at[var] * number(width) + lane
    if several is not None:
        at[several[0]] = at[several[0]] * number(pixels) + pixel
    tests = [] if threads % size == 0 else [position < number(threads)]
    return Share(grid, at, lane, width, tests, pixel)


def stored_order(eq: Equation) -> list[tuple[Var, int]]:
    """The spatial axes, those that index the result in its order; the others first."""

    def position(pair: tuple[Var, int]) -> int:
        found = [i for i, index in enumerate(eq.indices) if uses(index, [pair[0]])]
        return found[0] if found else -1

    return sorted(eq.spatial, key=position)
