"""Sums over a short window (pooling, depthwise layers, local normalisation): every step written out.

1. a thread takes a run of channels, and several neighbouring pixels where their windows overlap: what two of them read
   is loaded once;
2. factors that lie side by side for the steps of one channel (a depthwise layer's weights, [channel][step]) are read
   as vectors, all steps of the run at once, before the first step.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

from tvm import sym
from tvm.ir import Range, TensorLoad
from tvm.tirx import AllocBuffer, BufferLoad, BufferStore, ForKind, Stmt, Var

from ..cpu.tir_tools import constant, flat_index, loop, sequence, substitute, uses
from .device import Gpu
from .elementwise import Share, share, stored_order
from .emit import THREADS, VECTOR_BITS, Run, registers, when
from .equation import Equation, bits_of, guarded_loads, map_loads, number, same

MOST_STEPS = 64
"""Steps of a window that are written out."""
MOST_PIXELS = 4
MOST_UPDATES = 1024
"""Additions of a thread that are written out."""
FACTOR_BYTES = 400
"""Registers for the factors of all steps."""


def window_kernel(eq: Equation, result: Equation, read: Any, gpu: Gpu) -> Stmt | None:
    """The kernel of a sum over a window and of the map `result` that reads it by `read`; None for another sum."""
    if not 1 < eq.depth <= MOST_STEPS:
        return None
    work = share(result, gpu)
    if work.width == 1:
        return None
    if (axis := overlapping(eq, result, read)) is not None:
        extent = dict(result.spatial)[axis]
        pixels = pixels_of(extent, result.points // work.width, eq.depth * work.width, gpu)
        work = share(result, gpu, several=(axis, pixels))
        return _Window(eq, result, read, work, pixels).write()
    return _Window(eq, result, read, work, 1).write()


def overlapping(eq: Equation, result: Equation, read: Any) -> Var | None:
    """The last axis but one of what is stored, where the windows of its neighbours overlap."""
    axes = [axis for axis, extent in stored_order(result) if extent > 1]
    if len(axes) < 2:
        return None
    follows = [own for own, given in zip(eq.indices, read.indices, strict=True) if uses(given, [axes[-2]])]
    for load, _ in guarded_loads(eq.value):
        for index in load.indices if not load.source.same_as(eq.buffer) else ():
            if uses(index, follows) and uses(index, [axis for axis, extent in eq.reduced if extent > 1]):
                return axes[-2]
    return None


def pixels_of(extent: int, threads: int, updates: int, gpu: Gpu) -> int:
    """Neighbouring pixels of one thread: they divide the axis, and leave every multiprocessor a block."""
    pixels = MOST_PIXELS
    while pixels > 1 and (
        extent % pixels or threads < pixels * THREADS * gpu.multiprocessors or pixels * updates > MOST_UPDATES
    ):
        pixels //= 2
    return pixels


class _Window:
    """Writes one kernel."""

    def __init__(self, eq: Equation, result: Equation, read: Any, work: Share, pixels: int) -> None:
        self.eq, self.result, self.read, self.work, self.pixels = eq, result, read, work, pixels
        self.run = Run(work.lane, work.width, work.grid.analyzer)
        if pixels > 1:
            work.grid.analyzer.bind(work.pixel, Range(0, pixels))
        self.sums = registers(pixels * work.width, str(eq.buffer.dtype), "sum")
        self.factors: list[tuple[TensorLoad, Any]] = []

    def write(self) -> Stmt:
        run, width = self.run, self.work.width
        run.parts.append(AllocBuffer(self.sums))
        for pixel in range(self.pixels):
            start = number(pixel * width)
            run.parts.append(run.each(lambda lane, start=start: BufferStore(self.sums, self.eq.init, [start + lane])))
        self._load_factors()
        for step in product(*(range(extent) for _, extent in self.eq.reduced)):
            for pixel in range(self.pixels):
                self._update(step, pixel)
        for pixel in range(self.pixels):
            self._finish(pixel)
        return self.work.grid.launch(when(self.work.tests, sequence(run.parts)))

    def _at(self, pixel: int) -> dict[Var, Any]:
        return {axis: substitute(i, {self.work.pixel: number(pixel)}) for axis, i in self.work.at.items()}

    def _spatial(self, pixel: int) -> dict[Var, Any]:
        from .reduction import follow

        return follow(self.eq, self.read, self._at(pixel))

    def _sum(self, pixel: int) -> Any:
        return BufferLoad(self.sums, [number(pixel * self.work.width) + self.work.lane])

    def _update(self, step: tuple[int, ...], pixel: int) -> None:
        axes = {axis: number(i) for (axis, _), i in zip(self.eq.reduced, step, strict=True)}
        flat = 0
        for (_, extent), i in zip(self.eq.reduced, step, strict=True):
            flat = flat * extent + i

        def held(load: Any) -> Any:
            if load.source.same_as(self.eq.buffer):
                return self._sum(pixel)
            factor = next((buffer for known, buffer in self.factors if same(known, load)), None)
            return (
                load if factor is None else BufferLoad(factor, [self.work.lane * number(self.eq.depth) + number(flat)])
            )

        value = substitute(map_loads(self.eq.value, held), self._spatial(pixel) | axes)
        value = self.run.value(self.work.grid.analyzer.simplify(value))
        target = number(pixel * self.work.width)
        self.run.parts.append(self.run.each(lambda lane: BufferStore(self.sums, value, [target + lane])))

    def _finish(self, pixel: int) -> None:
        at = self._at(pixel)

        def held(load: Any) -> Any:
            return self._sum(pixel) if load.source.same_as(self.eq.buffer) else load

        value = self.run.value(substitute(map_loads(self.result.value, held), at))
        simplify = self.work.grid.analyzer.simplify
        self.run.store(self.result.buffer, [simplify(substitute(i, at)) for i in self.result.indices], value)

    # --- 2. factors ----------------------------------------------------------------------------------------------

    def _load_factors(self) -> None:
        """Every load whose element is `base + lane * steps + step`, and the same for all pixels, into registers."""
        spatial, width, depth = self._spatial(0), self.work.width, self.eq.depth
        analyzer = sym.Analyzer()
        for axis, extent in (*self.eq.reduced, (self.work.lane, width)):
            analyzer.bind(axis, Range(0, extent))
        for var, extent in ((self.work.grid.block, self.work.grid.blocks), (self.work.grid.thread, self.work.grid.x)):
            analyzer.bind(var, Range(0, extent))
        place: Any = self.work.lane * number(depth)
        for i, (axis, _) in enumerate(self.eq.reduced):
            place = place + axis * number(prod(extent for _, extent in self.eq.reduced[i + 1 :]))
        origin = {self.work.lane: number(0), **{axis: number(0) for axis, _ in self.eq.reduced}}
        for load, conditions in guarded_loads(self.eq.value):
            if conditions or load.source.same_as(self.eq.buffer) or any(same(load, known) for known, _ in self.factors):
                continue
            bits = bits_of(load.source.dtype)
            index = flat_index(load)
            if index is None or width * depth * bits > 8 * FACTOR_BYTES:
                continue
            index = analyzer.simplify(substitute(index, spatial))
            base = analyzer.simplify(substitute(index, origin))
            if uses(base, [self.work.pixel]) or constant(analyzer.simplify(index - base - place)) != 0:
                continue
            self._fill(load, spatial | {axis: number(0) for axis, _ in self.eq.reduced}, base, bits, analyzer)

    def _fill(self, load: TensorLoad, at: dict[Var, Any], base: Any, bits: int, analyzer: Any) -> None:
        count, vector = self.work.width * self.eq.depth, VECTOR_BITS // bits
        while vector > 1 and (count % vector or constant(analyzer.simplify(base % number(vector))) != 0):
            vector //= 2
        held = registers(count, str(load.source.dtype), "factors")
        first = {**at, self.work.lane: number(0)}
        indices = [analyzer.simplify(substitute(substitute(i, at), first)) for i in load.indices]
        self.run.parts.append(AllocBuffer(held))
        for start in range(0, count, vector):
            j = Var("j", "int32")
            where = [*indices[:-1], indices[-1] + number(start) + j]
            store = BufferStore(held, BufferLoad(load.source, where), [number(start) + j])
            kind = ForKind.VECTORIZED if vector > 1 else ForKind.UNROLLED
            self.run.parts.append(loop(j, vector, kind, store))
        self.factors.append((load, held))
