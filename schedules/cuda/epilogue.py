"""From the sums of a block to the output: the consumer's expression on every element, stored in 16-byte pieces.

Straight from the registers where a core holds runs of columns that fill a piece. Otherwise the sums go through shared
memory, whose stages are no longer needed, so that neighbouring threads store neighbouring pieces:

    staged[row][column] <- sums;  barrier;  thread t takes the pieces t, t + threads, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Var

from ..cpu.tir_tools import collect, substitute, uses
from .affine import decompose, ranged, vector_width
from .contraction import Axis, Contraction, Result
from .core import Core
from .loads import ELEMENT
from .names import copy_vector, named, repeat, when

PAD = 8
"""Elements between the rows of the staged sums: rows then start in different banks for writes of two columns."""


class Store:
    """Stores runs of one row of C: the result of `found`, or another `result` over the same axes."""

    def __init__(self, found: Contraction, result: Result, batch: dict[Var, Any], views: dict[Var, Var]) -> None:
        self.found, self.result, self.batch, self.views = found, result, batch, views
        self.analyzer = ranged((*found.batch, *found.m, *found.n))
        size = ELEMENT[str(result.buffer.dtype)]
        conditions = [] if found.n else [tirx.const(1, "bool")]
        self.width = min(16 // size, vector_width(result.index, found.n, conditions, self.analyzer))

    def needs(self, rows: int, columns: int) -> tuple[bool, bool]:
        """Whether a block of `rows x columns` reaches past the last row, and past the last column."""
        return self.found.size("m") % rows != 0, self.found.size("n") % columns != 0

    def run(self, m: Any, n: Any, values: Sequence[Any], edges: tuple[bool, bool]) -> None:
        """Emit the stores of `values` at row `m` and the columns from `n` on, which is a multiple of their number."""
        width = min(self.width, len(values))
        where = self._axes("m", self.found.m, m)
        with when(m < self.found.size("m") if edges[0] else None):
            for start in range(0, len(values), width):
                column = n + start
                with when(column < self.found.size("n") if edges[1] else None):
                    self._piece(where, column, values[start : start + width])

    def _axes(self, name: str, axes: Sequence[Axis], flat: Any) -> dict[Var, Any]:
        values = decompose(named(f"at_{name}", flat), [axis.extent for axis in axes], lambda v: named(f"at_{name}", v))
        return {axis.var: value for axis, value in zip(axes, values, strict=True)}

    def _piece(self, rows: dict[Var, Any], column: Any, values: Sequence[Any]) -> None:
        """One vector of the output."""
        width = len(values)
        known = {**self.batch, **rows, **self._axes("n", self.found.n, column)}
        index = named("to", substitute(self._simple(self.result.index), known))
        operands = self._operands(known, width)
        made = [self._element(value, lane, known, operands) for lane, value in enumerate(values)]
        to = self.views[self.result.buffer]
        if width == 1:
            T.buffer_store(to, made[0], [index])
            return
        piece = T.alloc_buffer((width,), str(self.result.buffer.dtype), scope="local")
        for lane, value in enumerate(made):
            T.buffer_store(piece, value, [lane])
        copy_vector(to, index, piece, 0, width)

    def _simple(self, index: Any) -> Any:
        return self.analyzer.canonical_simplify(index)

    def _operands(self, known: dict[Var, Any], width: int) -> list[tuple[TensorLoad, Any, bool]]:
        """What the expression reads for a piece: each load, with a buffer of `width` values or one value of all."""
        found: list[tuple[TensorLoad, Any, bool]] = []
        columns = [axis.var for axis in self.found.n]
        for load in collect(self.result.value, TensorLoad):
            if any(load.same_as(other) for other, _, _ in found):
                continue
            index = load.indices[0]
            source, start = self.views[load.source], substitute(self._simple(index), {**known, **self.views})
            if width == 1 or not uses(index, columns):
                found.append((load, named("operand", source[start]), False))
            elif vector_width(index, self.found.n, [], self.analyzer) >= width:
                part = T.alloc_buffer((width,), str(load.source.dtype), scope="local")
                copy_vector(part, 0, source, named("from", start), width)
                found.append((load, part, True))
        return found

    def _element(self, value: Any, lane: int, known: dict[Var, Any], operands: Any) -> Any:
        """The result for one sum; an operand that is no vector is read where it is used."""

        def read(load: TensorLoad) -> Any:
            for other, held, many in operands:
                if load.same_as(other):
                    return held[lane] if many else held
            return load

        # The last axis of n moves by one from lane to lane: a vector lies within it and the axes merged into it.
        moved = dict(known)
        if lane:
            flat = sum_of_axes(self.found.n, known) + lane
            moved |= self._unflatten(flat)
        expression = tvm_ffi.structural_map(self.result.value, (TensorLoad, read), order="pre")
        return substitute(expression, {**moved, self.result.acc: value, **self.views})

    def _unflatten(self, flat: Any) -> dict[Var, Any]:
        values = decompose(flat, [axis.extent for axis in self.found.n], lambda value: value)
        return {axis.var: value for axis, value in zip(self.found.n, values, strict=True)}


def sum_of_axes(axes: Sequence[Axis], known: dict[Var, Any]) -> Any:
    """The flat position of the values that the axes have."""
    flat: Any = tirx.const(0, "int32")
    for axis in axes:
        flat = flat * axis.extent + known[axis.var]
    return flat


def staged_elements(core: Core) -> int:
    """Sums that a block keeps in shared memory on their way to the output."""
    return core.tile.bm * (core.tile.bn + PAD)


def straight(core: Core, store: Store) -> bool:
    """Whether sums go to the output from registers: they fill its pieces, or pieces are single elements anyway."""
    return store.width <= core.run


def emit_epilogue(core: Core, store: Store, m: Any, n: Any, thread: Any, staged: Var | None) -> None:
    """Store the block's C, whose first row and column are `m` and `n`. `staged` is the shared memory, or None to store
    straight from registers; a barrier has passed since the stages were last read."""
    tile = core.tile
    edges = store.needs(tile.bm, tile.bn)
    if staged is None:
        core.visit(lambda row, column, values: store.run(m + row, n + column, values, edges))
        return
    pitch = tile.bn + PAD

    def put(row: Any, column: Any, values: list[Any]) -> None:
        held = T.alloc_buffer((len(values),), core.accumulator, scope="local")
        for lane, value in enumerate(values):
            T.buffer_store(held, value, [lane])
        copy_vector(staged, named("staged", row * pitch + column), held, 0, len(values))

    core.visit(put)
    T.evaluate(T.tvm_storage_sync("shared.dyn"))
    width = store.width
    columns = tile.bn // width
    pieces = tile.bm * columns
    part = T.alloc_buffer((width,), core.accumulator, scope="local")
    with repeat(-(-pieces // tile.threads)) as step:
        piece = named("piece", step * tile.threads + thread)
        with when(piece < pieces if pieces % tile.threads else None):
            row = named("row", tirx.floordiv(piece, columns))
            column = named("column", tirx.floormod(piece, columns) * width)
            copy_vector(part, 0, staged, row * pitch + column, width)
            store.run(m + row, n + column, [part[lane] for lane in range(width)], edges)
