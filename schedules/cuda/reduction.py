"""Equations with a sum (or maximum, ...), and the map behind it: pooling, means, windows, products without a GEMM.

A thread owns a run of neighbouring results and keeps their partial sums in registers; the terms are read as vectors.
Where there are too few results to fill the GPU, or the terms of one result lie side by side, the terms of one result
are divided among `y` threads, which combine their partial sums in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import sym, tirx
from tvm.ir import Range, TensorLoad
from tvm.tirx import AllocBuffer, BufferLoad, BufferStore, Stmt, Var

from ..cpu.tir_tools import flat_index, sequence, stride_of, substitute
from .device import WARP, Gpu
from .elementwise import Share, share
from .emit import THREADS, UNROLLED, Run, barrier, lane_axis, registers, serial, unravel, when
from .equation import Equation, loads, map_loads, number, same
from .window import window_kernel

FEWEST = 4
"""Terms below which a thread is not worth its start."""
SHORTEST = 32
"""Terms below which a sum is not divided."""
MOST_SPLIT = 32
"""Threads that share one of many results side by side."""


def reduction_kernel(eq: Equation, behind: Equation | None, gpu: Gpu) -> Stmt:
    """The kernel of a sum, and of the equation `behind` it, which reads one element of it for each of its own."""
    result = eq_result(eq) if behind is None else behind
    (read,) = distinct(result.reads(eq.buffer))
    split, beside = division(eq, result, gpu)
    if split == 1 and (written := window_kernel(eq, result, read, gpu)) is not None:
        return written
    work = share(result, gpu, split, beside)
    acc = registers(work.width, str(eq.buffer.dtype), "sum")
    first = Run(work.lane, work.width, work.grid.analyzer)
    parts: list[Stmt] = [AllocBuffer(acc), first.each(lambda lane: BufferStore(acc, eq.init, [lane]))]
    parts.append(when(work.tests, accumulate(eq, follow(eq, read, work.at), acc, work, split)))
    tests = list(work.tests)
    if split > 1:
        parts += combine(eq, acc, work, split)
        tests.append(work.grid.row.equal(number(0)))
    last = Run(work.lane, work.width, work.grid.analyzer)

    def held(load: Any) -> Any:
        return BufferLoad(acc, [work.lane]) if load.source.same_as(eq.buffer) else load

    value = last.value(map_loads(substitute(result.value, work.at), held))
    last.store(result.buffer, work.place(result.indices), value)
    return work.grid.launch(sequence([*parts, when(tests, sequence(last.parts))]))


def eq_result(eq: Equation) -> Equation:
    """The map that stores a sum as it is."""
    axes, extents = tuple(a for a, _ in eq.spatial), tuple(e for _, e in eq.spatial)
    return Equation(eq.name, axes, extents, (False,) * len(axes), eq.buffer, eq.indices, load_self(eq), None)


def division(eq: Equation, result: Equation, gpu: Gpu) -> tuple[int, int | None]:
    """(threads that share a result, results side by side in a block; None for as many as fit).

    Terms that lie side by side, where results do not, are read by neighbouring threads of one result. Otherwise a
    result is shared where there are not enough of them for every multiprocessor, each thread keeping FEWEST terms.
    """
    if combiner(eq) is None or eq.depth < SHORTEST:
        return 1, None
    along, across = neighbours(eq, result)
    if along and not across and eq.depth >= WARP:
        return min(THREADS, 1 << (eq.depth // 2).bit_length() - 1), 1
    wanted = gpu.multiprocessors * THREADS // max(1, result.points)
    split = 1
    while split * 2 <= min(MOST_SPLIT, wanted) and eq.depth >= FEWEST * split * 2:
        split *= 2
    return split, None if split == 1 else max(WARP, THREADS // split)


def neighbours(eq: Equation, result: Equation) -> tuple[bool, bool]:
    """Whether the terms of one result lie side by side, and whether those of neighbouring results do."""
    analyzer = sym.Analyzer()
    for axis, extent in zip(eq.axes, eq.extents, strict=True):
        analyzer.bind(axis, Range(0, extent))
    spatial = list(eq.spatial)
    last = lane_axis(eq.indices, eq.buffer, spatial, load_self(eq))
    inner = [axis for axis, extent in eq.reduced if extent > 1]
    along = across = False
    for load in loads(eq.value):
        index = None if load.source.same_as(eq.buffer) else flat_index(load)
        if index is None:
            continue
        along |= bool(inner) and stride_of(index, inner[-1], analyzer) == 1
        across |= last is not None and stride_of(index, spatial[last][0], analyzer) == 1
    del result
    return along, across


Combine = Callable[[Any, Any], Any]


def combiner(eq: Equation) -> Combine | None:
    """How two partial results become one, where the equation says so: a sum from 0, a maximum, a minimum."""
    value = eq.value
    if not isinstance(value, tirx.Add | tirx.Max | tirx.Min):
        return None
    if not any(isinstance(side, TensorLoad) and side.source.same_as(eq.buffer) for side in (value.a, value.b)):
        return None
    if isinstance(value, tirx.Add) and float(getattr(eq.init, "value", 1)) != 0:
        return None
    kind = type(value)
    return lambda a, b: kind(a, b)


def combine(eq: Equation, acc: Any, work: Share, split: int) -> list[Stmt]:
    """The partial sums of the `split` threads of each result, added up in row 0's `acc`.

    The upper half of the rows hands its sums to the lower half, again and again; each time in shared memory of its own,
    so that one barrier a time is enough.
    """
    make = combiner(eq)
    assert make is not None
    beside, width, grid = work.grid.x, work.width, work.grid
    run = Run(work.lane, width, grid.analyzer)
    parts: list[Stmt] = []
    half = split // 2
    while half:
        held = tirx.decl_buffer([half * beside * width], str(acc.dtype), "partial", scope="shared")
        row = number(half)

        def at(first: Any, lane: Any) -> list[Any]:
            return [(first * number(beside) + grid.thread) * number(width) + lane]

        def give(lane: Any, held: Any = held, row: Any = row) -> Stmt:
            return BufferStore(held, BufferLoad(acc, [lane]), at(grid.row - row, lane))

        def take(lane: Any, held: Any = held) -> Stmt:
            return BufferStore(acc, make(BufferLoad(acc, [lane]), BufferLoad(held, at(grid.row, lane))), [lane])

        upper = [grid.row >= row, grid.row < row * number(2)]
        parts += [AllocBuffer(held), when(upper, run.each(give)), barrier(), when([grid.row < row], run.each(take))]
        half //= 2
    return parts


def load_self(eq: Equation) -> Any:
    """The sum itself, as a value."""
    return BufferLoad(eq.buffer, list(eq.indices))


def distinct(found: list[Any]) -> list[Any]:
    """The loads without those that are written alike."""
    kept: list[Any] = []
    for load in found:
        if not any(same(load, other) for other in kept):
            kept.append(load)
    return kept


def follow(eq: Equation, read: Any, at: dict[Var, Any]) -> dict[Var, Any]:
    """The spatial axes of `eq` where the reader's load `read` takes its element, the reader's axes being `at`."""
    found: dict[Var, Any] = {}
    for index, given in zip(eq.indices, read.indices, strict=True):
        if isinstance(index, Var):
            found[index] = substitute(given, at)
    for axis, extent in eq.spatial:
        if axis not in found:
            assert extent == 1, f"{eq.name}: axis {axis} does not index its result"
            found[axis] = 0
    return found


def accumulate(eq: Equation, terms: dict[Var, Any], acc: Any, work: Share, split: int) -> Stmt:
    """The loops over the reduction axes, each step adding a run of terms to `acc`; of `split` threads, every one takes
    each `split`-th step."""
    analyzer = work.grid.analyzer
    loops: list[tuple[Var, int]] = []
    where = dict(terms)
    tests: list[Any] = []
    if split > 1:
        var, count = Var("step", "int32"), -(-eq.depth // split)
        analyzer.bind(var, Range(0, count))
        position = var * number(split) + work.grid.row
        found = unravel(position, [extent for _, extent in eq.reduced], analyzer)
        where |= {axis: index for (axis, _), index in zip(eq.reduced, found, strict=True)}
        tests = [position < number(eq.depth)] if eq.depth % split else []
        loops = [(var, count)]
    else:
        for axis, extent in eq.reduced:
            var = Var(axis.name, "int32")
            analyzer.bind(var, Range(0, extent))
            where[axis] = var
            loops.append((var, extent))
    run = Run(work.lane, work.width, analyzer)

    def own(load: Any) -> Any:
        return BufferLoad(acc, [work.lane]) if load.source.same_as(eq.buffer) else load

    value = run.value(map_loads(substitute(eq.value, where), own))
    run.parts.append(run.each(lambda lane: BufferStore(acc, value, [lane])))
    body = when(tests, sequence(run.parts))
    inner = 1
    for var, extent in reversed(loops):
        inner *= extent
        body = serial(var, extent, body, unroll=inner <= UNROLLED)
    return body
