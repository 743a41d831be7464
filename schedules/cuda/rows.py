"""Groups of equations that agree on their rows (softmax, normalisations): a block of threads takes a row through all.

1. the axes along which a piece of the result needs its own piece of every tensor before it tell rows apart: one block
   a row;
2. one equation after another, each tensor of a row in shared memory; a sum over the row is divided among the threads,
   which combine their parts there;
3. the last equation writes the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx
from tvm.ir import Range
from tvm.tirx import AllocBuffer, BufferLoad, BufferStore, Stmt, Var

from ..cpu.tir_tools import sequence, substitute
from .chain import follows, is_kept, plain, readers_of
from .device import WARP
from .emit import THREADS, Grid, barrier, registers, serial, unravel, when
from .equation import Equation, bits_of, map_loads, number
from .reduction import combiner

SHARED_BYTES = 40 << 10
"""What the tensors of a row may take: every GPU gives a block 48 KiB, a part of it holds partial sums."""
A_THREAD = 4
"""Elements of a row for one thread of its block."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The equations in order, the last one the result; for each, the dimensions that are a row's own axes (by the axis
    of the result that they follow), None for a dimension within the row."""

    equations: tuple[Equation, ...]
    rows: dict[str, tuple[int | None, ...]]

    @property
    def result(self) -> Equation:
        return self.equations[-1]

    def within(self, eq: Equation) -> list[int]:
        """The dimensions of a result that lie within the row."""
        return [d for d, row in enumerate(self.rows[eq.name]) if row is None]

    def shape(self, eq: Equation) -> list[int]:
        """Their extents."""
        extents = dict(zip(eq.axes, eq.extents, strict=True))
        return [extents[eq.indices[d]] for d in self.within(eq)]


def find_rows(eq: Equation, before: list[Equation], everyone: list[Equation], kept: list[Any]) -> Rows | None:
    """The group that ends in `eq`, out of the equations `before`, where sums are among them; None for none."""
    if eq.reduced or not plain(eq):
        return None
    members = [eq]
    found: dict[str, tuple[int | None, ...]] = {eq.name: tuple(range(len(eq.axes)))}
    for one in reversed(before):
        readers = readers_of(one, everyone)
        if not readers or any(r.name not in found for r in readers) or is_kept(one, kept) or not _indexed(one):
            continue
        found[one.name] = follows(one, readers, found)
        members.insert(0, one)
    if not any(m.reduced for m in members) or any(m.reduced and not _single(m) for m in members):
        return None
    shared = {i for i in range(len(eq.axes)) if all(i in found[m.name] for m in members)}
    rows = {name: tuple(i if i in shared else None for i in dims) for name, dims in found.items()}
    group = Rows(tuple(members), rows)
    if not shared or any(combiner(m) is None for m in members if m.reduced):
        return None
    held = sum(prod(group.shape(m)) * bits_of(m.buffer.dtype) // 8 for m in members[:-1])
    return group if held <= SHARED_BYTES else None


def _indexed(eq: Equation) -> bool:
    """Whether every dimension of the result is an axis."""
    return all(isinstance(i, Var) and any(i.same_as(axis) for axis, _ in eq.spatial) for i in eq.indices)


def _single(eq: Equation) -> bool:
    return len(eq.spatial) == len(eq.indices)


def rows_kernel(group: Rows) -> Stmt:
    """The kernel of a group."""
    return _Writer(group).write()


class _Writer:
    """Writes one group."""

    def __init__(self, group: Rows) -> None:
        self.group = group
        result = group.result
        own = [i for i, row in enumerate(group.rows[result.name]) if row is not None]
        longest = max(prod(group.shape(eq)) * eq.depth for eq in group.equations)
        self.threads = WARP
        while self.threads < THREADS and longest > A_THREAD * self.threads:
            self.threads *= 2
        self.grid = Grid(prod(result.extents[i] for i in own), self.threads)
        where = unravel(self.grid.block, [result.extents[i] for i in own], self.grid.analyzer)
        self.row = dict(zip(own, where, strict=True))
        self.held = {
            eq.name: tirx.decl_buffer([max(1, prod(group.shape(eq)))], str(eq.buffer.dtype), eq.name, scope="shared")
            for eq in group.equations[:-1]
        }

    def write(self) -> Stmt:
        parts: list[Stmt] = [AllocBuffer(buffer) for buffer in self.held.values()]
        for eq in self.group.equations:
            parts += self._sum(eq) if eq.reduced and not self._many(eq) else [self._each(eq)]
            if eq is not self.group.result:
                parts.append(barrier())
        return self.grid.launch(sequence(parts))

    def _many(self, eq: Equation) -> bool:
        """Whether a row holds more than one of the sums: then a thread makes whole ones."""
        return prod(self.group.shape(eq)) > 1

    def _row_axes(self, eq: Equation) -> dict[Var, Any]:
        dims = zip(eq.indices, self.group.rows[eq.name], strict=True)
        return {index: self.row[row] for index, row in dims if row is not None}

    def _value(self, expr: Any, at: dict[Var, Any]) -> Any:
        def held(load: Any) -> Any:
            eq = next((e for e in self.group.equations[:-1] if load.source.same_as(e.buffer)), None)
            return load if eq is None else BufferLoad(self.held[eq.name], [self._flat(eq, list(load.indices))])

        return substitute(map_loads(expr, held), at)

    def _flat(self, eq: Equation, indices: list[Any]) -> Any:
        index: Any = number(0)
        for d, extent in zip(self.group.within(eq), self.group.shape(eq), strict=True):
            index = index * number(extent) + indices[d]
        return index

    def _store(self, eq: Equation, at: dict[Var, Any], value: Any) -> Stmt:
        indices = [substitute(i, at) for i in eq.indices]
        if eq.name in self.held:
            return BufferStore(self.held[eq.name], value, [self._flat(eq, indices)])
        return BufferStore(eq.buffer, value, indices)

    def _steps(self, count: int, make: Any) -> Stmt:
        """`make(position)` for positions below `count`, neighbouring threads at neighbouring ones."""
        step, steps = Var("step", "int32"), -(-count // self.threads)
        self.grid.analyzer.bind(step, Range(0, steps))
        position = step * number(self.threads) + self.grid.thread
        tests = [position < number(count)] if count % self.threads else []
        return serial(step, steps, when(tests, make(position)))

    def _each(self, eq: Equation) -> Stmt:
        """Every element of the row by a thread; a sum is made by one."""
        dims, shape = self.group.within(eq), self.group.shape(eq)

        def make(position: Any) -> Stmt:
            where = unravel(position, shape, self.grid.analyzer)
            at = self._row_axes(eq) | {eq.indices[d]: i for d, i in zip(dims, where, strict=True)}
            if not eq.reduced:
                return self._store(eq, at, self._value(eq.value, at))
            acc = registers(1, str(eq.buffer.dtype), "sum")
            loops = {axis: Var(axis.name, "int32") for axis, _ in eq.reduced}
            body: Stmt = BufferStore(acc, self._term(eq, acc, at | loops), [number(0)])
            for axis, extent in reversed(eq.reduced):
                body = serial(loops[axis], extent, body)
            start, load = BufferStore(acc, eq.init, [number(0)]), BufferLoad(acc, [number(0)])
            return sequence([AllocBuffer(acc), start, body, self._store(eq, at, load)])

        return self._steps(prod(shape), make)

    def _term(self, eq: Equation, acc: Any, at: dict[Var, Any]) -> Any:
        own = BufferLoad(acc, [number(0)])
        return self._value(map_loads(eq.value, lambda l: own if l.source.same_as(eq.buffer) else l), at)

    def _sum(self, eq: Equation) -> list[Stmt]:
        """One sum of the row by all threads."""
        acc = registers(1, str(eq.buffer.dtype), "sum")
        partial = tirx.decl_buffer([self.threads], str(eq.buffer.dtype), "partial", scope="shared")
        at = self._row_axes(eq) | {eq.indices[d]: number(0) for d in self.group.within(eq)}
        extents = [extent for _, extent in eq.reduced]

        def make(position: Any) -> Stmt:
            where = unravel(position, extents, self.grid.analyzer)
            point = at | {axis: i for (axis, _), i in zip(eq.reduced, where, strict=True)}
            return BufferStore(acc, self._term(eq, acc, point), [number(0)])

        make_one = combiner(eq)
        assert make_one is not None
        thread = self.grid.thread
        parts: list[Stmt] = [
            AllocBuffer(acc),
            AllocBuffer(partial),
            BufferStore(acc, eq.init, [number(0)]),
            self._steps(eq.depth, make),
            BufferStore(partial, BufferLoad(acc, [number(0)]), [thread]),
        ]
        half = self.threads // 2
        while half:
            both = make_one(BufferLoad(partial, [thread]), BufferLoad(partial, [thread + number(half)]))
            parts += [barrier(), when([thread < number(half)], BufferStore(partial, both, [thread]))]
            half //= 2
        parts.append(when([thread.equal(number(0))], self._store(eq, at, BufferLoad(partial, [number(0)]))))
        return parts
