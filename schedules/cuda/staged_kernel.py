"""The kernel of a product between two chains, see staged.py: V into shared memory, products, the chain behind."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from tvm import sym, tirx
from tvm.ir import Range, TensorLoad
from tvm.tirx import AllocBuffer, BufferLoad, BufferStore, ForKind, Stmt, Var

from ..cpu.tir_tools import constant, flat_index, loop, sequence, stride_of, substitute
from .chain import ChainBody, letters_of
from .device import Gpu
from .emit import THREADS, VECTOR_BITS, Grid, barrier, registers, serial, unravel, when
from .equation import Equation, map_loads, number
from .staged import Extents, Staged, copied, size_of

TILE = 4
"""Rows and columns of the products of one thread."""
WAVES = 2
"""Blocks for each multiprocessor from which on n is not divided among blocks: each would compute V again."""


def staged_kernel(staged: Staged, gpu: Gpu) -> Stmt:
    """The kernel of a product between chains."""
    return _Writer(staged, gpu).write()


class _Writer:
    """Writes one kernel."""

    def __init__(self, staged: Staged, gpu: Gpu) -> None:
        self.staged = staged
        blocks, chunks = size_of(staged.block), -(-size_of(staged.n) // staged.channels)
        self.chunks = -(-chunks // min(chunks, max(1, WAVES * gpu.multiprocessors // blocks)))
        parts = -(-chunks // self.chunks)
        self.grid = Grid(blocks * parts, THREADS)
        analyzer = self.grid.analyzer
        self.part = analyzer.simplify(tirx.floormod(self.grid.block, number(parts)))
        where = tirx.floordiv(self.grid.block, number(parts))
        places = unravel(where, [extent for _, extent in staged.block], analyzer)
        self.block: dict[Var, Any] = {axis: i for (axis, _), i in zip(staged.block, places, strict=True)}
        dtype = str(staged.total.buffer.dtype)
        self.tiles, self.products = (
            tirx.decl_buffer([elements], dtype, name, scope="shared")
            for name, elements in (("tiles", staged.v_elements), ("products", staged.p_elements))
        )
        self.base = Var("base", "int32")

    def write(self) -> Stmt:
        sync = barrier()
        chunk = Var("chunk", "int32")
        self.grid.analyzer.bind(chunk, Range(0, self.chunks))
        base = (self.part * number(self.chunks) + chunk) * number(self.staged.channels)
        # The barrier at the end: the next products may not replace these before they are read.
        body = sequence([self._multiply(), sync, self._behind(), *([sync] if self.chunks > 1 else [])])
        chunks = serial(chunk, self.chunks, substitute(body, {self.base: base}))
        return self.grid.launch(
            sequence([AllocBuffer(self.tiles), AllocBuffer(self.products), self._ahead(), sync, chunks])
        )

    def _each(self, count: int, make: Any) -> Stmt:
        """`make(position)` for positions below `count`, neighbouring threads at neighbouring ones."""
        step, steps = Var("step", "int32"), -(-count // THREADS)
        self.grid.analyzer.bind(step, Range(0, steps))
        position = step * number(THREADS) + self.grid.thread
        tests = [position < number(count)] if count % THREADS else []
        return serial(step, steps, when(tests, make(position)))

    def _v_index(self, indices: Any) -> Any:
        """Where an element of V lies in shared memory."""
        last = self.staged.ahead.last
        dims = self.staged.v_dims
        index: Any = number(0)
        for d in dims[:-1]:
            index = index * number(last.extents[d]) + indices[d]
        return index * number(self.staged.row) + indices[dims[-1]]

    def _ahead(self) -> Stmt:
        """1."""
        chain, last = self.staged.ahead, self.staged.ahead.last
        here = {d: self.block.get(index, number(0)) for d, index in enumerate(self.staged.v.indices)}
        letters = letters_of(last) or ""
        outer = {d: here[d] for d, letter in enumerate(letters) if letter == "o"}
        threads = [d for d, letter in enumerate(letters) if letter not in "ou"]
        shared = replace(last, buffer=self.tiles, indices=(self._v_index(last.indices),))
        inside = replace(chain, steps=(*chain.steps[:-1], shared))

        def make(position: Any) -> Stmt:
            where = unravel(position, [last.extents[d] for d in threads], self.grid.analyzer)
            at = outer | dict(zip(threads, where, strict=True))
            return ChainBody(inside, at, self.grid.analyzer).write()

        return self._each(prod(last.extents[d] for d in threads), make)

    def _multiply(self) -> Stmt:
        """2."""
        staged = self.staged
        rows, columns = size_of(staged.m), staged.channels
        high, wide = min(TILE, rows), min(TILE, columns)
        beside = [size_of(staged.batch), -(-rows // high), -(-columns // wide)]
        dtype = str(staged.total.buffer.dtype)

        def make(position: Any) -> Stmt:
            batch, row, column = unravel(position, beside, self.grid.analyzer)
            # Rows and columns of a thread lie apart, those of neighbouring threads side by side.
            q = [row + number(i * beside[1]) for i in range(high)]
            c = [column + number(j * beside[2]) for j in range(wide)]
            sums = registers(high * wide, dtype, "sums")
            parts: list[Stmt] = [AllocBuffer(sums)]
            zero = tirx.const(0, dtype)
            parts += [BufferStore(sums, zero, [number(i)]) for i in range(high * wide)]
            parts.append(self._sum(sums, batch, q, c))
            for i in range(high):
                for j in range(wide):
                    tests = [q[i] < number(rows)] if rows % high else []
                    tests += [c[j] < number(columns)] if columns % wide else []
                    to = self._product_index(batch, q[i], c[j])
                    parts.append(when(tests, BufferStore(self.products, sums[number(i * wide + j)], [to])))
            return sequence(parts)

        return self._each(prod(beside), make)

    def _product_index(self, batch: Any, row: Any, column: Any) -> Any:
        return (batch * number(size_of(self.staged.m)) + row) * number(self.staged.channels) + column

    def _sum(self, sums: Any, batch: Any, q: list[Any], c: list[Any]) -> Stmt:
        """The products of a thread over all of k, as many steps at once as a vector holds. Rows and columns past the
        end are read as the last one."""
        staged, analyzer = self.staged, self.grid.analyzer
        rows, columns, dtype = size_of(staged.m), size_of(staged.n), str(sums.dtype)
        (axis, depth), step = staged.total.reduced[0], Var("k", "int32")
        width = self._width()
        analyzer.bind(step, Range(0, depth // width))
        at: dict[Var, Any] = dict(self.block) | self._unraveled(staged.batch, batch)
        at |= {a: number(0) for a, extent in staged.total.spatial if extent == 1} | {axis: step * number(width)}
        a, b = registers(len(q) * width, dtype, "rows"), registers(len(c) * width, dtype, "columns")
        parts: list[Stmt] = []
        for i, row in enumerate(q):
            there = at | self._unraveled(staged.m, tirx.min(row, number(rows - 1)))
            start = substitute(self._v_index(list(staged.v.indices)), there)
            parts.append(_copy(a, i, width, lambda j, start=start: self.tiles[start + j]))
        for i, column in enumerate(c):
            there = at | self._unraveled(staged.n, tirx.min(self.base + column, number(columns - 1)))
            place = [substitute(index, there) for index in staged.u.indices]
            # The run may leave the last dimension (an axis of one element stands there): the address is right.
            parts.append(_copy(b, i, width, lambda j, p=place: BufferLoad(staged.u.source, [*p[:-1], p[-1] + j])))
        for w in range(width):
            for i in range(len(q)):
                for j in range(len(c)):
                    own = number(i * len(c) + j)
                    term = a[number(i * width + w)] * b[number(j * width + w)]
                    parts.append(BufferStore(sums, sums[own] + term, [own]))
        return sequence([AllocBuffer(a), AllocBuffer(b), serial(step, depth // width, sequence(parts))])

    def _unraveled(self, axes: Extents, position: Any) -> dict[Var, Any]:
        places = unravel(position, [extent for _, extent in axes], self.grid.analyzer)
        return {axis: place for (axis, _), place in zip(axes, places, strict=True)}

    def _width(self) -> int:
        """Steps of k that are read at once: those of U lie side by side, and every run is aligned."""
        staged = self.staged
        (axis, depth), analyzer = staged.total.reduced[0], sym.Analyzer()
        for var, extent in (*staged.total.spatial, (axis, depth)):
            analyzer.bind(var, Range(0, extent))
        width, index = VECTOR_BITS // staged.bits, flat_index(staged.u)
        if depth % width or index is None or stride_of(index, axis, analyzer) != 1:
            return 1
        start = analyzer.simplify(tirx.floormod(substitute(index, {axis: number(0)}), number(width)))
        return width if constant(start) == 0 else 1

    def _behind(self) -> Stmt:
        """3."""
        staged, chain = self.staged, self.staged.behind
        channels, columns = staged.channels, size_of(staged.n)
        within = [i for i, (_, low) in staged.places.items() if low > 1]
        extents = [*(staged.places[i][1] for i in within), channels]

        def make(position: Any) -> Stmt:
            *low, local = unravel(position, extents, self.grid.analyzer)
            column = self.base + local
            outer = self.block | self._unraveled(staged.n, column)
            at: dict[int, Any] = {}
            for i, (axis, size) in staged.places.items():
                at[i] = number(0) if axis is None else outer[axis]
                if i in within:
                    at[i] = at[i] * number(size) + low[within.index(i)]
            steps = tuple(self._from_shared(step, local) for step in chain.steps)
            body = ChainBody(replace(chain, steps=steps), at, self.grid.analyzer)
            return when([column < number(columns)], body.write())

        return self._each(prod(extents), make)

    def _from_shared(self, step: Equation, column: Any) -> Equation:
        """The step with the products read from shared memory, of the column that the thread is at."""
        staged = self.staged
        axis_of = copied(staged.total, staged.stored)
        assert axis_of is not None

        def read(load: TensorLoad) -> Any:
            if not load.source.same_as(staged.stored.buffer):
                return load
            at = {axis: index for axis, index in zip(axis_of, load.indices, strict=True) if axis is not None}
            batch, row = _flat(staged.batch, at), _flat(staged.m, at)
            return BufferLoad(self.products, [self._product_index(batch, row, column)])

        return replace(step, value=map_loads(step.value, read))


def _flat(axes: Extents, at: dict[Var, Any]) -> Any:
    index: Any = number(0)
    for axis, extent in axes:
        index = index * number(extent) + at[axis]
    return index


def _copy(to: Any, run: int, width: int, read: Any) -> Stmt:
    """`to[run width + j] = read(j)` for j < width, in one access."""
    if width == 1:
        return BufferStore(to, read(number(0)), [number(run)])
    j = Var("j", "int32")
    return loop(j, width, ForKind.VECTORIZED, BufferStore(to, read(j), [number(run * width) + j]))
