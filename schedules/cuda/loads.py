"""How one operand of a GEMM gets into shared memory: which thread copies what, in which pieces, by which instruction.

A stage is `rows` rows of `bk` elements along k. It is copied in pieces of `width` elements that lie together in global
memory and in one 16-byte chunk in shared memory:

    thread t copies the pieces at k position (t % (bk / width)) * width of the rows t / (bk / width) + i * step

so a thread's rows and its place along k within a stage are fixed: rows are taken apart into their axes once, before
the loop over k, and the position along k once a stage. Three ways, the first that fits:

    1. cp.async, where the operand is stored as it is multiplied and a piece has 4, 8 or 16 bytes; where a condition
       fails, or past an edge, it writes zeros and reads nothing;
    2. a load into registers before the multiplications of a stage and a store after them, in pieces (sm_75, or halves
       that lie apart);
    3. the same element by element, for an operand that is any other expression.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import TensorLoad
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Var

from ..cpu.tir_tools import collect, constant, substitute
from .affine import decompose, ranged, split, total, vector_width
from .contraction import Axis, Contraction, Operand
from .core import BlockTile, Core
from .device import Gpu
from .intrinsics import cp_async
from .names import copy_vector, every, fill_vector, named, repeat, when

MAX_ROWS = 16
"""Rows of a thread whose addresses are kept in registers; beyond that they are computed again in every stage."""
HELD_INSTRUCTIONS, COMPUTED_INSTRUCTIONS = 8, 30
"""Instructions of one piece, where its row's address is held and where it is computed."""
ELEMENT = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Pieces:
    """How the elements of a stage are divided among threads: `width` elements a piece, `way` "async", "vector" or
    "scalar"; thread t has the rows `t // columns + i * step`, i < count."""

    width: int
    way: str
    columns: int
    step: int
    count: int
    partial: bool


def pieces_of(operand: Operand, k: Sequence[Axis], rows: int, tile: BlockTile, gpu: Gpu) -> Pieces:
    """The division of a stage of an operand."""
    size = ELEMENT[operand.dtype]
    width = 1
    if operand.load is not None:
        width = vector_width(operand.load.indices[0], k, operand.inside, sym.Analyzer())
        width = min(width, 16 // size)
    plain = operand.load is not None
    way = "async" if plain and gpu.async_copy and width * size >= 4 else "vector" if plain else "scalar"
    columns = tile.bk // width
    step = max(1, tile.threads // columns)
    count = -(-rows // step)
    return Pieces(width, way, columns, step, count, step * count != rows)


def refuses_copies(found: Contraction, tile: BlockTile, gpu: Gpu) -> str | None:
    """Why the threads of `tile` cannot copy the operands, in one clause, or None: a row of pieces is for as many
    threads, or a part of them that divides them."""
    for operand, rows in ((found.a, tile.bm), (found.b, tile.bn)):
        columns = pieces_of(operand, found.k, rows, tile, gpu).columns
        if tile.threads % columns:
            return f"a row of a stage has {columns} pieces, which must divide its {tile.threads} threads"
    return None


def copy_cost(found: Contraction, tile: BlockTile, gpu: Gpu) -> tuple[int, int]:
    """(registers of a thread, instructions of a block for one stage) that the copies of both operands take beyond those
    of a few asynchronous pieces, whose rows' addresses are held."""
    registers = instructions = 0
    for operand, rows in ((found.a, tile.bm), (found.b, tile.bn)):
        pieces = pieces_of(operand, found.k, rows, tile, gpu)
        if pieces.way != "async":
            registers += pieces.count * max(1, pieces.width * ELEMENT[operand.dtype] // 4)
        held = pieces.count <= MAX_ROWS
        registers += 2 * max(0, pieces.count - 4) if held else 8
        if operand.load is not None and collect(operand.load.indices[0], TensorLoad):
            registers += 2 * pieces.count  # entries of a table, on their way all at once
        instructions += pieces.count * tile.threads * (HELD_INSTRUCTIONS if held else COMPUTED_INSTRUCTIONS)
    return registers, instructions


class Loader:
    """Emits the copies of one operand. `rows` are the axes of m or n; call `prepare` before the loop over stages,
    then for every stage `fetch` and, after a stage was multiplied, `land`."""

    def __init__(self, name: str, found: Contraction, core: Core, gpu: Gpu) -> None:
        self.name, self.core, self.tile = name, core, core.tile
        self.operand: Operand = getattr(found, name)
        self.axes: tuple[Axis, ...] = found.m if name == "a" else found.n
        self.block = self.tile.bm if name == "a" else self.tile.bn
        self.extent = found.size("m" if name == "a" else "n")
        self.k, self.k_size = found.k, found.size("k")
        self.batch = [axis.var for axis in found.batch]
        self.pieces = pieces_of(self.operand, found.k, self.block, self.tile, gpu)
        self.analyzer = ranged((*found.batch, *self.axes, *found.k))
        self.views: dict[Var, Var] = {}
        self.taken: list[tuple[Any, tuple[Any, Any, int]]] = []

    # --- before the loop over stages ---------------------------------------------------------------------------------

    def prepare(self, thread: Any, block: Any, batch: dict[Var, Any], views: dict[Var, Var], shared: Var) -> None:
        """Take the thread's rows apart. `block` is the block's first row, `batch` values of the batch axes."""
        self.views, self.batch_values, self.block_start, self.shared = views, batch, block, shared
        columns = self.pieces.columns
        self.column = named(f"{self.name}_k", tirx.floormod(thread, columns) * self.pieces.width)
        self.row = named(f"{self.name}_row", tirx.floordiv(thread, columns))
        self.held: list[dict[str, Any]] = []
        if self.pieces.count <= MAX_ROWS:
            self.held = [self._row(i, str(i)) for i in range(self.pieces.count)]
        if self.pieces.way != "async":
            size = self.pieces.count * self.pieces.width
            self.registers = T.alloc_buffer((size,), self.operand.dtype, scope="local")

    def _row(self, i: Any, label: str) -> dict[str, Any]:
        """What is kept of the thread's row `i`: values of the row's axes, sums of them that indices need, validity."""
        suffix = f"{self.name}{label}"
        row = self.row + i * self.pieces.step
        flat = named(f"x_{suffix}", self.block_start + row)
        extents = [axis.extent for axis in self.axes]
        values = decompose(flat, extents, lambda value: named(f"p_{suffix}", value))
        known = {axis.var: value for axis, value in zip(self.axes, values, strict=True)} | self.batch_values
        conditions = [] if self.extent % self.block == 0 else [flat < self.extent]
        if self.pieces.partial:
            conditions.append(row < self.block)
        chunk, within = self._chunk()
        place = named(f"s_{suffix}", self.core.place(row, chunk) + within)
        sums = [(key, named(f"q_{suffix}", substitute(key, known))) for key in self._row_sums()]
        valid = every(conditions)
        return {"known": known, "valid": valid, "place": place, "sums": sums}

    def _rows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The thread's rows: those whose addresses are held, one after the other, or a loop that computes them."""
        if self.held:
            yield from enumerate(self.held)
            return
        with repeat(self.pieces.count) as i:
            yield i, self._row(i, "")

    def _chunk(self) -> tuple[Any, Any]:
        per = 16 // ELEMENT[self.operand.dtype]
        if self.pieces.width == per:
            return tirx.floordiv(self.column, per), 0
        return tirx.floordiv(self.column, per), tirx.floormod(self.column, per)

    def _row_vars(self) -> list[Var]:
        return [axis.var for axis in self.axes] + self.batch

    def _row_sums(self) -> list[Any]:
        """The sums of row terms in the operand's index and conditions: each is computed once a row."""
        if self.operand.load is None:
            return []
        found: list[Any] = []
        for expression in (self.operand.load.indices[0], *(side for c in self.operand.inside for side in _sides(c))):
            mine, _, _ = self._split(expression)
            summed = total(mine, "int32")
            if constant(summed) is None and not any(tvm_ffi.structural_equal(summed, other) for other in found):
                found.append(summed)
        return found

    def _split(self, expression: Any) -> tuple[Any, Any, int]:
        for known, parts in self.taken:
            if known.same_as(expression):
                return parts
        parts = split(expression, self._row_vars(), self.analyzer)
        self.taken.append((expression, parts))
        return parts

    # --- in the loop over stages -------------------------------------------------------------------------------------

    def fetch(self, tile: Any, stage: Any) -> None:
        """Start copying stage number `tile` of k to the element offset `stage` of shared memory."""
        k_values, inside = self._along_k(tile)
        for i, row in self._rows():
            valid = [*inside, *([] if row["valid"] is None else [row["valid"]])]
            if self.operand.load is None:
                self._fetch_value(i, row, k_values, valid)
            else:
                self._fetch_load(i, row, k_values, valid, stage)

    def land(self, stage: Any) -> None:
        """Write what `fetch` took into registers to the stage at element offset `stage`."""
        if self.pieces.way == "async":
            return
        width = self.pieces.width
        for i, row in self._rows():
            bound = self.row + i * self.pieces.step < self.block if self.pieces.partial else None
            with when(bound):
                copy_vector(self.shared, stage + row["place"], self.registers, i * width, width)

    def _along_k(self, tile: Any) -> tuple[dict[Var, Any], list[Any]]:
        """Values of the k axes for the thread's place in stage `tile`, and the condition that it is not past the end.

        Where `bk` divides the innermost axis a stage lies within one step of the others, which are then the same in
        all threads."""
        bk, extents = self.tile.bk, [axis.extent for axis in self.k]
        name = f"k_{self.name}"
        inside = [] if self.k_size % bk == 0 else [tile * bk + self.column < self.k_size]
        if len(extents) > 1 and extents[-1] % bk == 0:
            steps = extents[-1] // bk
            outer = named(name, tirx.floordiv(tile, steps))
            inner = named(name, tirx.floormod(tile, steps) * bk + self.column)
            values = [*decompose(outer, extents[:-1], lambda value: named(name, value)), inner]
        else:
            flat = named(name, tile * bk + self.column)
            values = decompose(flat, extents, lambda value: named(name, value))
        return {axis.var: value for axis, value in zip(self.k, values, strict=True)}, inside

    def _fetch_value(self, i: Any, row: dict[str, Any], k_values: dict[Var, Any], valid: list[Any]) -> None:
        value = substitute(self.operand.value, {**row["known"], **k_values, **self.views})
        if valid:
            value = tirx.if_then_else(tirx.all(*valid), value, tirx.const(0, self.operand.dtype))
        T.buffer_store(self.registers, value, [i])

    def _fetch_load(self, i: Any, row: dict[str, Any], k_values: dict[Var, Any], valid: list[Any], stage: Any) -> None:
        assert self.operand.load is not None
        index = self._sum(self.operand.load.indices[0], row, k_values)
        if valid and collect(index, TensorLoad):
            # Where the index is read from a table, that has an end, too.
            index = tirx.if_then_else(tirx.all(*valid), index, tirx.const(0, "int32"))
        valid = [*valid, *(self._condition(c, row, k_values) for c in self.operand.inside)]
        source = self.views[self.operand.load.source]
        ok = every(valid)
        if self.pieces.way == "async":
            size = self.pieces.width * ELEMENT[self.operand.dtype]
            flag = tirx.const(1, "int32") if ok is None else ok.astype("int32")
            bound = self.row + i * self.pieces.step < self.block if self.pieces.partial else None
            with when(bound):
                to, start = T.address_of(self.shared[stage + row["place"]]), T.address_of(source[index])
                T.evaluate(cp_async(size, to, start, flag))
            return
        width = self.pieces.width
        if ok is not None:
            fill_vector(self.registers, i * width, tirx.const(0, self.operand.dtype), width)
        with when(ok):
            copy_vector(self.registers, i * width, source, index, width)

    def _sum(self, expression: Any, row: dict[str, Any], k_values: dict[Var, Any]) -> Any:
        """An index, its row part taken from what `prepare` computed."""
        mine, rest, offset = self._split(expression)
        summed = total(mine, "int32")
        held = next((var for key, var in row["sums"] if tvm_ffi.structural_equal(key, summed)), None)
        first = substitute(summed, row["known"]) if held is None else held
        others = substitute(total(rest, "int32"), {**row["known"], **k_values, **self.views})
        return first + (others + offset)

    def _condition(self, condition: Any, row: dict[str, Any], k_values: dict[Var, Any]) -> Any:
        """A condition; in a comparison of a row's and a stage's position both parts are sums."""
        sides = _sides(condition)
        if not sides:
            return substitute(condition, {**row["known"], **k_values, **self.views})
        return type(condition)(*(self._sum(side, row, k_values) for side in sides))


def _sides(condition: Any) -> list[Any]:
    """Both sides of a comparison of integers, [] for any other condition."""
    kinds = (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE)
    if isinstance(condition, kinds) and str(condition.a.ty.dtype).startswith("int"):
        return [condition.a, condition.b]
    return []
