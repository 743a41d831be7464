"""Equations that read along another axis than they write, as a transposition does: through shared memory.

1. a block takes a tile of TILE x TILE along the two axes, threads along the axis that is read side by side;
2. it waits, and the same threads stand along the axis that is stored side by side.

A row of the tile is one element longer than it needs to be, so that a column lies in different banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import sym, tirx
from tvm.ir import Range, TensorLoad
from tvm.tirx import AllocBuffer, BufferLoad, BufferStore, Stmt, Var

from ..cpu.tir_tools import flat_index, sequence, stride_of, substitute
from .emit import Grid, barrier, lane_axis, serial, unravel, when
from .equation import Equation, guarded_loads, map_loads, number, same

TILE = 32
ROWS = 8
"""Threads of a block: TILE x ROWS, each takes TILE / ROWS elements."""
SHORTEST = 8
"""Below this extent a warp that reads along the other axis uses whole cache lines anyway."""


@dataclass(frozen=True, eq=False)
class Turned:
    """`load` has neighbours along axis `read`, the result along axis `stored`."""

    load: TensorLoad
    conditions: tuple[Any, ...]
    read: Var
    stored: Var


def find_transposed(eq: Equation) -> Turned | None:
    """The one load of `eq` that is transposed, or None where there is none, or several."""
    spatial = list(eq.spatial)
    last = lane_axis(eq.indices, eq.buffer, spatial, eq.value)
    if last is None or spatial[last][1] < SHORTEST:
        return None
    analyzer = sym.Analyzer()
    for axis, extent in spatial:
        analyzer.bind(axis, Range(0, extent))
    stored = spatial[last][0]
    found: list[Turned] = []
    for load, conditions in guarded_loads(eq.value):
        index = flat_index(load)
        if index is None or stride_of(index, stored, analyzer) in (0, 1):
            continue
        for axis, extent in spatial:
            if extent >= SHORTEST and not axis.same_as(stored) and stride_of(index, axis, analyzer) == 1:
                found.append(Turned(load, conditions, axis, stored))
                break
    if not found or any(not same(f.load, found[0].load) for f in found):
        return None
    plain = [f for f in found if not f.conditions]
    return plain[0] if plain else (found[0] if len(found) == 1 else None)


def transpose_kernel(eq: Equation, turned: Turned) -> Stmt:
    """The kernel of an equation with a transposed load."""
    extents = dict(eq.spatial)
    size_read, size_stored = extents[turned.read], extents[turned.stored]
    others = [(a, e) for a, e in eq.spatial if not a.same_as(turned.read) and not a.same_as(turned.stored)]
    tiles = (-(-size_read // TILE), -(-size_stored // TILE))
    blocks = tiles[0] * tiles[1]
    for _, extent in others:
        blocks *= extent
    grid = Grid(blocks, TILE, ROWS)
    *where, tile_read, tile_stored = unravel(grid.block, [*(e for _, e in others), *tiles], grid.analyzer)
    at = {axis: index for (axis, _), index in zip(others, where, strict=True)}
    held = tirx.decl_buffer([TILE, TILE + 1], str(turned.load.source.dtype), "tile", scope="shared")

    def phase(make: Any, across: Any, along: Any, across_size: int, along_size: int) -> Stmt:
        """ROWS rows at a time: `along` by the thread, `across` by the row."""
        step = Var("step", "int32")
        grid.analyzer.bind(step, Range(0, TILE // ROWS))
        row = step * number(ROWS) + grid.row
        x, y = along * number(TILE) + grid.thread, across * number(TILE) + row
        tests = [y < number(across_size)] if across_size % TILE else []
        tests += [x < number(along_size)] if along_size % TILE else []
        return serial(step, TILE // ROWS, when(tests, make(row, x, y)), unroll=True)

    def fill(row: Any, x: Any, y: Any) -> Stmt:
        point = {**at, turned.read: x, turned.stored: y}
        store = BufferStore(held, substitute(turned.load, point), [row, grid.thread])
        return when([substitute(test, point) for test in turned.conditions], store)

    def drain(row: Any, x: Any, y: Any) -> Stmt:
        point = {**at, turned.stored: x, turned.read: y}
        tile = BufferLoad(held, [grid.thread, row])
        value = map_loads(eq.value, lambda load: tile if same(load, turned.load) else load)
        return BufferStore(eq.buffer, substitute(value, point), [substitute(i, point) for i in eq.indices])

    parts: list[Stmt] = [
        AllocBuffer(held),
        phase(fill, tile_stored, tile_read, size_stored, size_read),
        barrier(),
        phase(drain, tile_read, tile_stored, size_read, size_stored),
    ]
    return grid.launch(sequence(parts))
