"""Chains of small maps (the transforms of a tile, or of a line of it): a thread takes one tile through all of them.

The last block of a chain names its axes (`gemmify.chain`, `gemmify.sweep`): those lettered `u` lie within the tile, the
others tell tiles apart. A thread

1. owns one point of the axes that tell tiles apart, channels across neighbouring threads;
2. computes step after step of its tile, each into registers, every element written out;
3. stores the result, or maps it on at once where one equation behind the chain reads each element once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import sym, tirx
from tvm.ir import Range
from tvm.tirx import AllocBuffer, BufferLoad, BufferStore, Stmt, Var

from ..cpu.tir_tools import constant, sequence, substitute, uses
from .device import Gpu
from .emit import Grid, block_threads, registers, serial, unravel, when
from .equation import Equation, map_loads, number, same

LETTERS = ("gemmify.chain", "gemmify.sweep")
MOST_ELEMENTS = 128
"""Registers that one step of a tile may take; a thread has 255."""


@dataclass(frozen=True, eq=False)
class Chain:
    """The steps in order, the last one lettered; what maps its result on; for each step, which of its dimensions are
    axes of the last one that tell tiles apart (by position there), None for a dimension within the tile."""

    steps: tuple[Equation, ...]
    behind: Equation | None
    tiles: dict[str, tuple[int | None, ...]]

    @property
    def last(self) -> Equation:
        return self.steps[-1]


def letters_of(eq: Equation) -> str | None:
    """The letters of the axes of a chain's last equation."""
    return next((str(eq.annotations[name]) for name in LETTERS if name in eq.annotations), None)


def find_chain(eq: Equation, before: list[Equation], everyone: list[Equation], kept: list[Any]) -> Chain | None:
    """The chain that ends in `eq` or just before it, out of the equations `before`; None where there is none.

    `kept` are buffers that others see: a step that writes one of them ends the chain there.
    """
    last, behind = eq, None
    if letters_of(eq) is None:
        ahead = [b for b in before if letters_of(b) is not None and eq.reads(b.buffer)]
        if eq.reduced or len(ahead) != 1 or is_kept(ahead[0], kept) or len(readers_of(ahead[0], everyone)) != 1:
            return None
        last, behind = ahead[0], eq
        if placed(last, behind) is None:
            return None
    letters = letters_of(last)
    assert letters is not None
    tiles: dict[str, tuple[int | None, ...]] = {
        last.name: tuple(None if letter == "u" else i for i, letter in enumerate(letters))
    }
    steps = [last]
    for step in reversed([b for b in before if b is not last]):
        readers = readers_of(step, everyone)
        if not readers or any(r.name not in tiles for r in readers) or is_kept(step, kept) or step.reduced:
            continue
        if letters_of(step) is not None or not plain(step):
            continue
        tiles[step.name] = follows(step, readers, tiles)
        steps.insert(0, step)
    chain = Chain(tuple(steps), behind, tiles)
    return chain if all(_elements(chain, step) <= MOST_ELEMENTS for step in steps) else None


def readers_of(eq: Equation, everyone: list[Equation]) -> list[Equation]:
    """The other equations that read what `eq` computes."""
    return [other for other in everyone if other is not eq and other.reads(eq.buffer)]


def is_kept(eq: Equation, kept: list[Any]) -> bool:
    """Whether `eq` writes one of the buffers `kept`."""
    return any(eq.buffer.same_as(other) for other in kept)


def plain(eq: Equation) -> bool:
    """Whether each dimension of the result is an axis."""
    return len(eq.indices) == len(eq.axes) and all(i.same_as(a) for i, a in zip(eq.indices, eq.axes, strict=True))


def follows(
    step: Equation, readers: list[Equation], tiles: dict[str, tuple[int | None, ...]]
) -> tuple[int | None, ...]:
    """Which axis of the last equation each dimension of `step` is, where all readers agree that it is one."""
    found: list[int | None] = []
    for d in range(len(step.indices)):
        seen: set[int | None] = set()
        for reader in readers:
            for load in reader.reads(step.buffer):
                at = [i for i, index in enumerate(reader.indices) if load.indices[d].same_as(index)]
                seen.add(tiles[reader.name][at[0]] if at else None)
        found.append(seen.pop() if len(seen) == 1 else None)
    return tuple(found)


def _within(chain: Chain, step: Equation) -> list[int]:
    return [d for d, tile in enumerate(chain.tiles[step.name]) if tile is None]


def _elements(chain: Chain, step: Equation) -> int:
    return prod(step.extents[d] for d in _within(chain, step))


def placed(last: Equation, behind: Equation) -> tuple[dict[Var, Any], list[Any]] | None:
    """(the axes of `behind` for a point of `last`, tests that it has one), or None where that cannot be told.

    `behind` reads `last[.., y // m, y % m, ..]`: then y = m i + j.
    """
    reads = behind.reads(last.buffer)
    if not reads or any(not same(read, reads[0]) for read in reads):
        return None
    analyzer = sym.Analyzer()
    for axis, extent in behind.spatial:
        analyzer.bind(axis, Range(0, extent))
    own = list(zip(last.axes, last.extents, strict=True))
    given = [analyzer.simplify(i) for i in reads[0].indices]
    found: dict[Var, Any] = {}
    tests: list[Any] = []
    used: set[int] = set()
    for axis, extent in behind.spatial:
        if extent == 1:
            found[axis] = number(0)
            continue
        digits = _digits(axis, given)
        if digits is None:
            return None
        value = sum((own[d][0] * number(factor) for d, factor in digits), number(0))
        used |= {d for d, _ in digits}
        found[axis] = value
        if sum((own[d][1] - 1) * factor for d, factor in digits) >= extent:
            tests.append(value < number(extent))
    for d, (axis, extent) in enumerate(own):
        if d in used:
            continue
        if constant(given[d]) is None:
            return None
        if extent > 1:
            tests.append(axis.equal(given[d]))
    return found, tests


def _digits(axis: Var, given: list[Any]) -> list[tuple[int, int]] | None:
    """The dimensions that `axis` is made of, with their factors."""
    whole = [(d, 1) for d, index in enumerate(given) if index.same_as(axis)]
    if whole:
        return whole[:1]
    high = [(d, constant(i.b)) for d, i in enumerate(given) if isinstance(i, tirx.FloorDiv) and i.a.same_as(axis)]
    low = [(d, constant(i.b)) for d, i in enumerate(given) if isinstance(i, tirx.FloorMod) and i.a.same_as(axis)]
    if len(high) == 1 and len(low) == 1 and high[0][1] == low[0][1] and high[0][1] is not None:
        return [(high[0][0], high[0][1]), (low[0][0], 1)]
    return None


def chain_kernel(chain: Chain, gpu: Gpu) -> Stmt:
    """The kernel of a chain."""
    last, tiles = chain.last, chain.tiles[chain.last.name]
    outer = [d for d, tile in enumerate(tiles) if tile is not None]
    outer.sort(key=lambda d: _stored_at(chain, d))
    threads = prod(last.extents[d] for d in outer)
    size = block_threads(threads, gpu)
    grid = Grid(-(-threads // size), size)
    position = grid.block * number(size) + grid.thread
    tests = [] if threads % size == 0 else [position < number(threads)]
    where = unravel(position, [last.extents[d] for d in outer], grid.analyzer)
    return grid.launch(when(tests, ChainBody(chain, dict(zip(outer, where, strict=True)), grid.analyzer).write()))


def _stored_at(chain: Chain, d: int) -> int:
    """Where axis `d` of the last equation stands in what is stored."""
    axis, final = chain.last.axes[d], chain.behind
    if final is None:
        found = [i for i, index in enumerate(chain.last.indices) if uses(index, [axis])]
    else:
        moved = placed(chain.last, final)
        assert moved is not None
        found = [i for i, index in enumerate(final.indices) if uses(substitute(index, moved[0]), [axis])]
    return found[0] if found else -1


class ChainBody:
    """What one thread does for one tile of a chain: `at` is its place along the axes that tell tiles apart, by their
    position in the last equation."""

    def __init__(self, chain: Chain, at: dict[int, Any], analyzer: sym.Analyzer) -> None:
        self.chain, self.at, self.analyzer = chain, at, analyzer
        self.held = {
            step.name: registers(_elements(chain, step), str(step.buffer.dtype), step.name)
            for step in (chain.steps if chain.behind is not None else chain.steps[:-1])
        }

    def write(self) -> Stmt:
        """All steps, and the store."""
        parts: list[Stmt] = [AllocBuffer(buffer) for buffer in self.held.values()]
        parts += [self._step(step) for step in self.chain.steps]
        if self.chain.behind is not None:
            parts.append(self._behind(self.chain.behind))
        return sequence(parts)

    def _point(self, step: Equation) -> tuple[dict[Var, Any], list[tuple[Var, int]]]:
        """(the axes of a step, the loops over those within the tile)"""
        at: dict[Var, Any] = {}
        loops = []
        for axis, extent, tile in zip(step.axes, step.extents, self.chain.tiles[step.name], strict=True):
            if tile is None:
                at[axis] = var = Var(axis.name, "int32")
                loops.append((var, extent))
                self.analyzer.bind(var, Range(0, extent))
            else:
                at[axis] = self.at[tile]
        return at, loops

    def _value(self, expr: Any, at: dict[Var, Any]) -> Any:
        """`expr` with the loads of steps taken from registers, then its axes replaced."""

        def held(load: Any) -> Any:
            step = next((s for s in self.chain.steps if s.name in self.held and load.source.same_as(s.buffer)), None)
            return load if step is None else BufferLoad(self.held[step.name], [self._flat(step, list(load.indices))])

        return substitute(map_loads(expr, held), at)

    def _flat(self, step: Equation, indices: list[Any]) -> Any:
        index: Any = number(0)
        for d in _within(self.chain, step):
            index = index * number(step.extents[d]) + indices[d]
        return index

    def _step(self, step: Equation) -> Stmt:
        at, loops = self._point(step)
        value = self._value(step.value, at)
        if step.name in self.held:
            where = [at[axis] for axis in step.axes]
            body: Stmt = BufferStore(self.held[step.name], value, [self._flat(step, where)])
        else:
            indices = [self.analyzer.simplify(substitute(i, at)) for i in step.indices]
            body = BufferStore(step.buffer, value, indices)
        return _unrolled(loops, body)

    def _behind(self, behind: Equation) -> Stmt:
        moved = placed(self.chain.last, behind)
        assert moved is not None
        at, loops = self._point(self.chain.last)
        simplify = self.analyzer.simplify
        own = {axis: simplify(substitute(value, at)) for axis, value in moved[0].items()}
        last = self.chain.last
        held = BufferLoad(self.held[last.name], [self._flat(last, [at[axis] for axis in last.axes])])
        value = map_loads(substitute(behind.value, own), lambda l: held if l.source.same_as(last.buffer) else l)
        store = BufferStore(behind.buffer, value, [simplify(substitute(i, own)) for i in behind.indices])
        return _unrolled(loops, when([substitute(test, at) for test in moved[1]], store))


def _unrolled(loops: list[tuple[Var, int]], body: Stmt) -> Stmt:
    for var, extent in reversed(loops):
        body = serial(var, extent, body, unroll=True)
    return body
