"""Kernels written as TIR: the grid, the thread's share of the axes, runs of elements that move as one vector.

A thread computes `width` neighbouring elements. What it loads beside each other is loaded as 16-byte vectors (or the
widest that divides) into registers first, under the conditions that guard the load; then the arithmetic is written out
element by element; then the results are stored as vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import sym, tirx
from tvm.ir import Range, TensorLoad
from tvm.tirx import AllocBuffer, AttrStmt, BufferLoad, BufferStore, ForKind, IfThenElse, IterVar, Stmt, Var

from ..cpu.tir_tools import constant, flat_index, loop, sequence, stride_of, substitute, uses
from .device import Gpu
from .equation import Condition, bits_of, guarded_loads, map_loads, number, same

VECTOR_BITS = 128
"""The widest access of a thread."""
THREADS = 256
"""Threads of a block where nothing asks for another number."""
UNROLLED = 32
"""Steps of a reduction that are written out."""


@dataclass
class Grid:
    """One kernel: `blocks` along blockIdx.x (no more than 2^31 - 1) of `x` by `y` threads."""

    blocks: int
    x: int
    y: int = 1

    def __post_init__(self) -> None:
        self.block, self.thread, self.row = (Var(n, "int32") for n in ("block", "thread", "row"))
        self.analyzer = sym.Analyzer()
        for var, extent in ((self.block, self.blocks), (self.thread, self.x), (self.row, self.y)):
            self.analyzer.bind(var, Range(0, extent))

    def launch(self, body: Stmt) -> Stmt:
        """The kernel around what one thread does."""
        tags = [(self.block, self.blocks, "blockIdx.x"), (self.thread, self.x, "threadIdx.x")]
        if self.y > 1:
            tags.append((self.row, self.y, "threadIdx.y"))
        else:
            body = substitute(body, {self.row: number(0)})
        for var, extent, tag in reversed(tags):
            axis = IterVar(Range(0, extent), var, IterVar.ThreadIndex, tag)
            body = AttrStmt(axis, "thread_extent", number(extent), body)
        return body


def serial(var: Var, extent: int, body: Stmt, unroll: bool = False) -> Stmt:
    """A loop; one of a single step is none."""
    if extent == 1:
        return substitute(body, {var: number(0)})
    return loop(var, extent, ForKind.UNROLLED if unroll else ForKind.SERIAL, body)


def barrier() -> Stmt:
    """All threads of the block wait for each other, and see what the others wrote to shared memory."""
    return tirx.Evaluate(tirx.call_intrin("int32", "tirx.tvm_storage_sync", "shared"))


def registers(elements: int, dtype: str, name: str) -> Any:
    """A buffer of the thread."""
    return tirx.decl_buffer([max(1, elements)], dtype, name, scope="local")


def unravel(position: Any, extents: Sequence[int], analyzer: sym.Analyzer) -> list[Any]:
    """The row-major index of `position` in a box of `extents`."""
    index: list[Any] = []
    rest = prod(extents)
    for i, extent in enumerate(extents):
        rest //= extent
        at = position if rest == 1 else tirx.floordiv(position, number(rest))
        if extent == 1:
            at = number(0)
        elif i and prod(extents[:i]) > 1:
            at = tirx.floormod(at, number(extent))
        index.append(analyzer.simplify(at))
    return index


def when(tests: Sequence[Any], body: Stmt) -> Stmt:
    """`body` where all of `tests` hold."""
    return IfThenElse(tirx.all(*tests), body, None) if tests else body


@dataclass
class Run:
    """`width` neighbouring elements, the lane `lane` of them; emits statements into `parts`.

    All parts are executed one after the other: a run that is loaded once serves every value after it.
    """

    lane: Var
    width: int
    analyzer: sym.Analyzer

    def __post_init__(self) -> None:
        self.parts: list[Stmt] = []
        self.held: dict[Any, list[tuple[Any, list[Any], list[Any], Any]]] = {}
        if self.width > 1:
            self.analyzer.bind(self.lane, Range(0, self.width))

    def value(self, expr: Any) -> Any:
        """`expr` with the loads that are neighbours along the lane taken from registers, whose filling is emitted."""
        if self.width == 1:
            return substitute(expr, {self.lane: number(0)})
        ways: list[tuple[TensorLoad, list[Condition]]] = []
        for load, conditions in guarded_loads(expr):
            known = next((entry for entry in ways if same(entry[0], load)), None)
            if known is None:
                ways.append((load, [conditions]))
            else:
                known[1].append(conditions)
        staged = [(load, self._stage(load, found)) for load, found in ways]

        def change(load: TensorLoad) -> Any:
            held = next((buffer for known, buffer in staged if same(known, load)), None)
            return load if held is None else BufferLoad(held, [self.lane])

        return map_loads(expr, change)

    def _stage(self, load: TensorLoad, ways: list[Condition]) -> Any | None:
        """Registers that hold the run of `load`, or None where it is no run or is guarded element by element."""
        conditions = next((way for way in ways if not way), ways[0])
        if conditions and any(len(way) != len(conditions) or not all(map(same, way, conditions)) for way in ways):
            return None  # one load under different conditions
        tests = [self._plain(test) for test in conditions]
        if any(uses(test, [self.lane]) for test in tests) or load.source.scope() == "local":
            return None
        width = self.vector(load)
        if width == 1:
            return None
        indices = [self.analyzer.simplify(i) for i in load.indices]
        key = (str(load.source.name), str(indices), str(tests))
        for source, at, under, held in self.held.setdefault(key, []):
            if source.same_as(load.source) and all(map(same, at, indices)) and all(map(same, under, tests)):
                return held
        held = registers(self.width, str(load.source.dtype), "run")
        self.held[key].append((load.source, indices, tests, held))
        self.parts.append(AllocBuffer(held))
        move = self._moves(width, lambda at, j: BufferStore(held, self._at(load, at, j), [at + j]))
        self.parts.append(when(tests, move))
        return held

    def _plain(self, test: Any) -> Any:
        """The condition simplified: `64 <= 4 v + lane` only loses its lane when it is turned round."""
        straight = self.analyzer.simplify(test)
        if not uses(straight, [self.lane]):
            return straight
        turned = self.analyzer.simplify(tirx.Not(straight))
        return straight if uses(turned, [self.lane]) else tirx.Not(turned)

    def vector(self, access: TensorLoad | BufferStore) -> int:
        """How many elements of the access move at once: 1 where they are no neighbours or not aligned."""
        buffer = access.buffer if isinstance(access, BufferStore) else access.source
        index = flat_index(access)
        if index is None or stride_of(index, self.lane, self.analyzer) != 1:
            return 1
        first = self.analyzer.simplify(substitute(index, {self.lane: number(0)}))
        width = min(self.width, VECTOR_BITS // bits_of(buffer.dtype))
        while width > 1 and constant(self.analyzer.simplify(tirx.floormod(first, number(width)))) != 0:
            width //= 2
        return width

    def _at(self, access: Any, at: Any, j: Any) -> Any:
        return BufferLoad(access.source, self._shifted(access.indices, at, j))

    def _shifted(self, indices: Sequence[Any], at: Any, j: Any) -> list[Any]:
        first = [self.analyzer.simplify(substitute(i, {self.lane: number(0)})) for i in indices]
        return [*first[:-1], self.analyzer.simplify(first[-1] + at + j) if constant(at) != 0 else first[-1] + j]

    def _moves(self, width: int, make: Any) -> Stmt:
        moved = []
        for at in range(0, self.width, width):
            j = Var("j", "int32")
            moved.append(loop(j, width, ForKind.VECTORIZED, make(number(at), j)))
        return sequence(moved)

    def each(self, make: Any) -> Stmt:
        """`make(lane)` for every lane, written out."""
        return serial(self.lane, self.width, make(self.lane), unroll=True)

    def store(self, buffer: Any, indices: Sequence[Any], value: Any, tests: Sequence[Any] = ()) -> None:
        """Emit `buffer[indices] = value` for the run, where `tests` hold (they may not depend on the lane)."""
        plain = BufferStore(buffer, value, list(indices))
        width = self.vector(plain) if self.width > 1 else 1
        if width == 1:
            self.parts.append(when(tests, self.each(lambda lane: plain)))
            return
        held = registers(self.width, str(buffer.dtype), "result")
        self.parts.append(AllocBuffer(held))
        self.parts.append(self.each(lambda lane: BufferStore(held, value, [lane])))

        def move(at: Any, j: Any) -> Stmt:
            return BufferStore(buffer, BufferLoad(held, [at + j]), self._shifted(indices, at, j))

        self.parts.append(when(tests, self._moves(width, move)))


def lane_axis(indices: Sequence[Any], buffer: Any, axes: Sequence[tuple[Var, int]], value: Any) -> int | None:
    """The position in `axes` of the one along which the buffer's elements are neighbours."""
    analyzer = sym.Analyzer()
    for var, extent in axes:
        analyzer.bind(var, Range(0, extent))
    index = flat_index(BufferStore(buffer, value, list(indices)))
    for at, (var, extent) in enumerate(axes):
        if extent > 1 and index is not None and stride_of(index, var, analyzer) == 1:
            return at
    return None


def run_width(extent: int, dtype: Any, points: int, gpu: Gpu) -> int:
    """Elements of one thread along an axis of `extent`: a whole vector, fewer where all would not fill the GPU."""
    width = VECTOR_BITS // bits_of(dtype)
    while width > 1 and (extent % width or points // width < gpu.multiprocessors * THREADS // 2):
        width //= 2
    return width


def block_threads(threads: int, gpu: Gpu) -> int:
    """Threads of a block of a kernel of `threads`: fewer where the multiprocessors would otherwise have none."""
    size = THREADS
    while size > 64 and threads < size * gpu.multiprocessors:
        size //= 2
    return size
