"""A sum of shifted products, accumulated in place in the output, as loops written directly.

The function holds a block annotated `gemmify.accumulate`, which sums over outer reduction axes ("taps") a tensor T that
is read at its own axes plus a shift that depends on the taps only, and the block behind it that maps each sum to one
output element. The annotation names the block's spatial axes: `o` outer, `r` a row (may be shifted), `t` the axis that
register tiles run along (may be shifted), `g` a group, `j` the column, whose elements lie side by side. `gemmify.hold`
says how much of T there is at once:

    "all"    T is given. Rows are summed one after another.
    "panel"  T is the product of a GEMM (`gemmify.axes`, gemm.py): the rows of one task for one tap and one panel of
             columns, in scratch of the thread, then their shifted sum.
    "tile"   one register tile of T, which is added to the output from the registers: no scratch at all.

  1. tasks in parallel: groups, panels, outer axes and blocks of `gemmify.rows` rows
  2. a task clears its part of the output, adds tap after tap, and applies the output block in place, all of it while
     the rows are in a core's own cache
  3. a shift only bounds the loops over rows; tiles run over T's own axis, so that no address needs a condition, and a
     row of the tile is added where its shifted place exists
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, prod
from typing import Any

from tvm import sym, tirx
from tvm.ir import Range
from tvm.tirx import AllocBuffer, BufferLoad, BufferStore, ForKind, IfThenElse, IntImm, PrimFunc, Stmt, Var

from ..machine import Machine
from .shifted import Product, Shifted, find_shifted
from .tir_tools import loop, sequence, substitute
from .vector_loops import vector_loop

# Starting the other cores takes a few microseconds: less work than this many vector steps runs on one core.
PARALLEL_STEPS = 24_000
Span = tuple[Any, Any]
"""Start and stop of a loop."""
Loop = tuple[Var, Any]
Store = Callable[[Any, int, Any], Stmt]
"""`store(x, i, registers)`: row `i` of a register tile, T's element `x` along the tile axis, to its place."""


def schedule_accumulate(func: PrimFunc, machine: Machine) -> PrimFunc | None:
    """`func` with its annotated sum, the product ahead of it and the map behind it in the loops of the module.

    None where no block carries the annotation. Other blocks of the function stay as they are.
    """
    found = find_shifted(func)
    if found is None:
        return None
    return found.replace(_Writer(found, machine).write())


class _Writer:
    """Writes the loops of one shifted sum."""

    def __init__(self, found: Shifted, machine: Machine) -> None:
        self.sum, self.machine = found, machine
        self.analyzer = sym.Analyzer()
        self.dtype = str(found.output.dtype)
        self.lanes = machine.lanes(self.dtype)
        self.taps = {var: Var(f"tap{d}", "int32") for d, var in enumerate(found.taps)}
        for var, extent in zip(self.taps.values(), found.tap_extents, strict=True):
            self.analyzer.bind(var, Range(0, extent))
        self.shift = [self.analyzer.simplify(substitute(s, self.taps)) for s in found.shift]
        self.columns = found.extents[-1]
        self.width = found.product.nr if found.product else self.columns
        self.panels = -(-self.columns // self.width)
        self.block_rows = 1

    # --- 1. tasks -----------------------------------------------------------------------------------------------

    def write(self) -> Stmt:
        """The whole nest."""
        panel = Var("panel", "int32")
        loops: list[tuple[Var, int]] = []
        spans: list[Span] = []
        rows = [a for a, letter in enumerate(self.sum.letters) if letter == "r"]
        for a, (letter, extent) in enumerate(zip(self.sum.letters, self.sum.extents, strict=True)):
            if letter in "og" or (letter == "r" and a != rows[-1]):
                loops.append((var := Var(f"{letter}{a}", "int32"), extent))
                spans.append((var, var + 1))
            elif letter == "r":
                spans.append(self._row_block(extent, loops))
            else:
                spans.append((IntImm("int32", 0), IntImm("int32", extent)))
        # Groups and panels outside: a panel of B serves every block of rows while it is in the cache.
        order = [pair for pair in loops if pair[0].name.startswith("g")] + [(panel, self.panels)]
        order += [pair for pair in loops if not pair[0].name.startswith("g")]
        for var, extent in order:
            self.analyzer.bind(var, Range(0, extent))
        body = sequence([self._clear(spans, panel), self._taps(spans, panel), self._finish(spans, panel)])
        return self._in_tasks(order, body)

    def _row_block(self, extent: int, loops: list[tuple[Var, int]]) -> Span:
        """The rows of one task, about `gemmify.rows` of them, in equal blocks but for the last."""
        size = self.block_rows = -(-extent // -(-extent // self.sum.rows))
        loops.append((block := Var("rows", "int32"), -(-extent // size)))
        stop = block * size + size
        return block * size, stop if extent % size == 0 else tirx.min(stop, IntImm("int32", extent))

    def _in_tasks(self, order: list[tuple[Var, int]], body: Stmt) -> Stmt:
        tasks, rest = Var("task", "int32"), prod(extent for _, extent in order)
        total, at = rest, dict[Var, Any]()
        for var, extent in order:
            rest //= extent
            at[var] = tasks // rest % extent if extent > 1 else IntImm("int32", 0)
        steps = prod(self.sum.extents) * prod(self.sum.tap_extents) // self.lanes
        steps *= self.sum.product.depth if self.sum.product else 1
        # A panel in scratch is counted once a thread, however little there is to do.
        parallel = total > 1 and (steps > PARALLEL_STEPS or self.sum.hold == "panel")
        return loop(tasks, total, ForKind.PARALLEL if parallel else ForKind.SERIAL, substitute(body, at))

    # --- 2. clear, taps, finish ------------------------------------------------------------------------------------

    def _clear(self, spans: list[Span], panel: Var) -> Stmt:
        def clear(at: list[Any]) -> Stmt:
            return BufferStore(self.sum.output, tirx.const(0, self.dtype), self.sum.output_index(at))

        return self._nest(spans, False, panel, clear)

    def _finish(self, spans: list[Span], panel: Var) -> Stmt:
        if self.sum.is_plain_copy:
            return sequence([])
        return self._nest(spans, False, panel, self.sum.finish)

    def _taps(self, spans: list[Span], panel: Var) -> Stmt:
        """Every tap's products added to the rows of `spans`."""
        product, scratch = self.sum.product, None
        if product is None:
            body = self._add_tensor(spans, panel, None)
        elif self.sum.hold == "tile":
            row_bytes = self.width * self.machine.vector_bytes // self.lanes
            product = product.blocked(self.machine.l1_bytes // 3 // row_bytes)
            body = self._tiles(spans, panel, product)
        else:
            shape = [self.block_rows, self.sum.limits[self.sum.letters.index("t")], self.width]
            scratch = tirx.decl_buffer(shape, self.dtype, "products", data_alignment=64)
            body = sequence([self._tiles(spans, panel, product, scratch), self._add_tensor(spans, panel, scratch)])
        if product is not None and product is not self.sum.product:
            body = loop(product.block, product.blocks, ForKind.SERIAL, body)
        for var, extent in reversed(list(zip(self.taps.values(), self.sum.tap_extents, strict=True))):
            body = loop(var, extent, ForKind.SERIAL, body)
        return body if scratch is None else tirx.SeqStmt([AllocBuffer(scratch), body])

    def _add_tensor(self, spans: list[Span], panel: Var, scratch: Any | None) -> Stmt:
        """`O += shift(T)` of one tap, T in memory."""

        def add(at: list[Any]) -> Stmt:
            there = [i + s for i, s in zip(at, self.shift, strict=True)]
            if scratch is None:
                value = self.sum.source_value(there, self.taps)
            else:
                x = there[self.sum.letters.index("t")]
                j = at[-1] - panel * self.width if self.panels > 1 else at[-1]
                value = BufferLoad(scratch, [self._scratch_row(at, spans), x, j])
            return self._added(at, value)

        return self._nest(spans, True, panel, add, static=scratch is not None)

    def _scratch_row(self, at: list[Any], spans: list[Span]) -> Any:
        """The row of the scratch that holds the products for the sum's element `at`."""
        if "r" not in self.sum.letters:
            return IntImm("int32", 0)
        axis = self.sum.letters.rindex("r")
        return self.analyzer.simplify(at[axis] - spans[axis][0])

    def _added(self, at: list[Any], value: Any) -> Stmt:
        index = self.sum.output_index(at)
        return BufferStore(self.sum.output, BufferLoad(self.sum.output, index) + value, index)

    # --- 3. loops with bounds ------------------------------------------------------------------------------------

    def _bounded(self, span: Span, shift: Any, limit: int) -> Span:
        """The part of `span` whose shifted place lies in [0, limit)."""
        low = self.analyzer.simplify(tirx.max(span[0], 0 - shift))
        high = self.analyzer.simplify(tirx.min(span[1], limit - shift))
        return low, high

    def _over(self, axis: int, span: Span, shifted: bool, static: bool) -> tuple[Any, Loop, list[Any]]:
        """The index along `axis`, its loop over `span`, and the tests that hold where the shifted place exists.

        The loop has bounds of its own, and no test, unless `static` asks for a constant extent: TVM cannot tell how
        much of a scratch buffer a loop of variable extent touches.
        """
        letter, shift, limit = self.sum.letters[axis], self.shift[axis], self.sum.limits[axis]
        var = Var(f"{letter}_", "int32")
        if not static:
            low, high = self._bounded(span, shift, limit) if shifted else span
            self.analyzer.bind(var, Range(0, max(limit, self.sum.extents[axis])))
            return low + var, (var, self.analyzer.simplify(high - low)), []
        whole = self.sum.extents[axis] if letter == "t" else 1
        extent = self.block_rows if axis == self.sum.letters.rfind("r") else whole
        self.analyzer.bind(var, Range(0, extent))
        at = span[0] + var
        tests = [at < span[1], at + shift >= 0, at + shift < limit]
        return at, (var, IntImm("int32", extent)), [test for test in tests if not self.analyzer.can_prove(test)]

    def _nest(
        self, spans: list[Span], shifted: bool, panel: Var, make: Callable[[list[Any]], Stmt], static: bool = False
    ) -> Stmt:
        """Loops over `spans` (where the shifted place exists), columns in vectors; `make` gets one index an axis."""
        at, loops, tests = [], [], []
        for axis, (span, letter) in enumerate(zip(spans[:-1], self.sum.letters[:-1], strict=True)):
            if letter in "og":
                at.append(span[0])
                continue
            index, over, needed = self._over(axis, span, shifted, static)
            at.append(index)
            loops.append(over)
            tests += needed
        columns = self._bounded(spans[-1], self.shift[-1], self.sum.limits[-1]) if shifted else spans[-1]
        return _in_loops(loops, tests, self._columns(columns, panel, lambda j: make([*at, j])))

    def _columns(self, span: Span, panel: Var, make: Callable[[Any], Stmt]) -> Stmt:
        """The columns of one panel in vectors; where they are shifted, a plain loop between its bounds."""
        low, high = span
        width = self.analyzer.simplify(high - low)
        if not (isinstance(width, IntImm) and int(width) == self.columns):
            var = Var("j", "int32")
            return _for(var, width, make(low + var))
        rest = self.columns - (self.panels - 1) * self.width
        base = panel * self.width if self.panels > 1 else IntImm("int32", 0)
        last = self._vectors(rest, base, make)
        if rest == self.width or self.panels == 1:
            return last
        return IfThenElse(panel < self.panels - 1, self._vectors(self.width, base, make), last)

    def _vectors(self, count: int, base: Any, make: Callable[[Any], Stmt]) -> Stmt:
        var = Var("j", "int32")
        body = make(base + var)
        return vector_loop(var, count, body, self.machine, self.analyzer) or loop(var, count, ForKind.SERIAL, body)

    # --- the GEMM's tiles ----------------------------------------------------------------------------------------

    def _tiles(self, spans: list[Span], panel: Var, product: Product, scratch: Any | None = None) -> Stmt:
        """The products of one tap in rows `spans`: added to the output, or stored in `scratch`."""
        tile_axis = self.sum.letters.index("t")
        inner = self.sum.limits[tile_axis]
        there, loops, tests = [], [], []
        for a, (span, letter) in enumerate(zip(spans, self.sum.letters, strict=True)):
            if letter == "r":
                index, over, needed = self._over(a, span, True, static=scratch is not None)
                there.append(index + self.shift[a])
                loops.append(over)
                tests += needed
            else:
                there.append(span[0])

        def store(x: Any, i: int, registers: Any) -> Stmt:
            at = [self.analyzer.simplify(k - s) for k, s in zip(there, self.shift, strict=True)]
            at[tile_axis] = x - self.shift[tile_axis]
            if scratch is None:
                return self._add_row(at, i, panel, registers)
            return self._keep_row([self._scratch_row(at, spans), x], i, registers, scratch)

        tile = Var("tile", "int32")
        full, rest = divmod(inner, product.mr)
        parts = []
        if full:
            self.analyzer.bind(tile, Range(0, full))
            body = self._tile(there, tile, product.mr, panel, product, store)
            parts.append(loop(tile, full, ForKind.SERIAL, body))
        if rest:
            last = IntImm("int32", full)
            parts.append(self._tile(there, last, rest, panel, product, store))
        return _in_loops(loops, tests, sequence(parts))

    def _tile(self, there: list[Any], tile: Any, rows: int, panel: Var, product: Product, store: Store) -> Stmt:
        """One register tile of `rows` rows: cleared, summed over the depth, each row given to `store`."""
        nr = self.width
        before = product.letters.index("t")
        outer = self.sum.source_index(there, self.taps)[:before]
        group = there[self.sum.letters.index("g")] if "g" in self.sum.letters else IntImm("int32", 0)
        registers = tirx.decl_buffer([rows * nr], self.dtype, "tile", scope="local", data_alignment=64)

        def each(make: Callable[[int, Any], Any]) -> Stmt:
            vector = gcd(nr, self.lanes)
            stmts = []
            for i in range(rows):
                for v in range(nr // vector):
                    lane = Var("lane", "int32") if vector > 1 else IntImm("int32", 0)
                    j = v * vector + lane
                    store = BufferStore(registers, make(i, j), [i * nr + j])
                    stmts.append(loop(lane, vector, ForKind.VECTORIZED, store) if vector > 1 else store)
            return tirx.SeqStmt(stmts) if len(stmts) > 1 else stmts[0]

        def step(i: int, j: Any) -> Any:
            term = product.term(outer, group, tile, IntImm("int32", i), panel, j)
            return BufferLoad(registers, [i * nr + j]) + self.analyzer.simplify(term)

        body = each(step)
        for var, extent in reversed(product.depth_loops):
            body = loop(var, extent, ForKind.SERIAL, body)
        parts: list[Stmt] = [AllocBuffer(registers), each(lambda i, j: tirx.const(0, self.dtype)), body]
        parts += [store(tile * product.mr + i, i, registers) for i in range(rows)]
        return tirx.SeqStmt(parts)

    def _keep_row(self, place: list[Any], i: int, registers: Any, scratch: Any) -> Stmt:
        """Row `i` of the tile to the scratch."""

        def keep(j: Any) -> Stmt:
            return BufferStore(scratch, BufferLoad(registers, [j + i * self.width]), [*place, j])

        return self._vectors(self.width, IntImm("int32", 0), keep)

    def _add_row(self, at: list[Any], i: int, panel: Var, registers: Any) -> Stmt:
        """Row `i` of the tile added to the output at `at`, where that exists."""

        def add(j: Any) -> Stmt:
            own = j - panel * self.width if self.panels > 1 else j
            return self._added([*at[:-1], j], BufferLoad(registers, [self.analyzer.simplify(i * self.width + own)]))

        axis = self.sum.letters.index("t")
        at[axis] = self.analyzer.simplify(at[axis])
        whole = (IntImm("int32", 0), IntImm("int32", self.columns))
        tests = [at[axis] >= 0, at[axis] < self.sum.extents[axis]]
        needed = [test for test in tests if not self.analyzer.can_prove(test)]
        store = self._columns(whole, panel, add)
        return IfThenElse(tirx.all(*needed), store, None) if needed else store


def _in_loops(loops: list[Loop], tests: list[Any], body: Stmt) -> Stmt:
    """`body` where all of `tests` hold, in `loops`, outermost first."""
    if tests:
        body = IfThenElse(tirx.all(*tests), body, None)
    for var, extent in reversed(loops):
        body = _for(var, extent, body)
    return body


def _for(var: Var, extent: Any, body: Stmt) -> Stmt:
    """A serial loop whose extent may be an expression, and below 0 where there is nothing to do."""
    extent = extent if isinstance(extent, IntImm) else tirx.max(extent, IntImm("int32", 0))
    return tirx.For(var, IntImm("int32", 0), extent, ForKind.SERIAL, body)


__all__ = ["schedule_accumulate"]
