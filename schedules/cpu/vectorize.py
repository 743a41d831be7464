"""Innermost loops -> vector code, after every block is gone.

    1. a condition that does not depend on the loop moves out of it;
    2. the loop is cut where a condition on its variable changes (padding, concatenation, partial tiles);
    3. each piece becomes vectors of the machine's width and a remainder in vectors of fewer lanes;
    4. a reduction along the loop gets several vectors of partial results, folded at its end.

A loop that is not known to be safe stays as it is: LLVM may still vectorise it.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from tvm import sym, tirx
from tvm.ir import Range
from tvm.tirx import For, ForKind, IfThenElse, IntImm, PrimFunc, SeqStmt, Stmt, Var

from ..machine import Machine
from .conditions import assume, branch_conditions, conjunction, conjuncts, cut_points, decide
from .tir_tools import collect, constant, extent_of, fresh, is_nothing, loop, renamed, sequence, substitute, uses
from .vector_loops import vector_loop

_MAX_CUTS = 64
_MAX_OUTER_CUTS = 2
_MAX_MOVED = 6


def vectorize(func: PrimFunc, machine: Machine) -> PrimFunc:
    """A function of plain loops (`tir_tools.lower_blocks`) with its innermost loops in vectors of `machine`."""
    return func.with_body(Vectorizer(machine).statement(func.body))


class Vectorizer:
    """Walks the loops from outside to inside and keeps the bounds of their variables in one analyzer."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.analyzer = sym.Analyzer()

    def statement(self, stmt: Stmt) -> Stmt:
        if isinstance(stmt, SeqStmt):
            return sequence([self.statement(part) for part in stmt.seq])
        if isinstance(stmt, IfThenElse):
            other = self.statement(stmt.else_case) if stmt.else_case is not None else None
            return decide(IfThenElse(stmt.condition, self.statement(stmt.then_case), other), self.analyzer)
        if not isinstance(stmt, For):
            return stmt
        extent, kind = extent_of(stmt), ForKind(stmt.kind)
        if extent is None or kind not in (ForKind.SERIAL, ForKind.PARALLEL, ForKind.UNROLLED):
            body, rest = self.statement(stmt.body), (stmt.thread_binding, stmt.annotations, stmt.step)
            return For(stmt.loop_var, stmt.min, stmt.extent, kind, body, *rest)
        self.bind(stmt.loop_var, extent)
        if collect(stmt.body, (For, tirx.While)):
            return self.outer(stmt, extent)
        if kind == ForKind.SERIAL:
            return self.innermost(stmt.loop_var, extent, stmt.body, 0)
        return loop(stmt.loop_var, extent, kind, decide(stmt.body, self.analyzer))

    def bind(self, var: Var, extent: int) -> None:
        self.analyzer.bind(var, Range.from_min_extent(IntImm(str(var.ty.dtype), 0), IntImm(str(var.ty.dtype), extent)))

    def outer(self, stmt: For, extent: int) -> Stmt:
        """A loop around others, cut where the condition of a partial tile begins to matter."""
        for node in collect(stmt.body, For):
            size = extent_of(node)
            if size:
                self.bind(node.loop_var, size)
        conditions = [node.condition for node in collect(stmt.body, IfThenElse)]
        cuts = cut_points(conditions, stmt.loop_var, extent, self.analyzer)
        cuts = cuts if len(cuts) <= _MAX_OUTER_CUTS else []
        parts = []
        for size, var, body in self.pieces(stmt.loop_var, extent, stmt.body, cuts):
            inside = self.statement(body)
            parts.append(inside if size == 1 and cuts else loop(var, size, ForKind(stmt.kind), inside))
        return sequence(parts)

    def pieces(self, var: Var, extent: int, body: Stmt, cuts: list[int]) -> list[tuple[int, Var, Stmt]]:
        """(size, variable counted from 0, body) of each piece between the cuts."""
        if not cuts:
            return [(extent, var, body)]
        found = []
        dtype = str(var.ty.dtype)
        edges = [0, *cuts, extent]
        for start, end in pairwise(edges):
            piece = fresh(var, f"_{start}")
            self.bind(piece, end - start)
            first = IntImm(dtype, start)
            value: Any = first if end - start == 1 else piece + first if start else piece
            found.append((end - start, piece, substitute(renamed(body), {var: value})))
        return found

    def innermost(self, var: Var, extent: int, body: Stmt, moved: int) -> Stmt:
        """A loop without loops inside: steps 1 to 4."""
        body = decide(body, self.analyzer)
        conditions = branch_conditions(body)
        invariant = next((part for part in map(partial(_invariant_part, var), conditions) if part is not None), None)
        if invariant is not None and moved < _MAX_MOVED:
            sides = []
            for value in (True, False):
                other = fresh(var, "")
                self.bind(other, extent)
                here = substitute(renamed(assume(body, invariant, value)), {var: other})
                sides.append(self.innermost(other, extent, here, moved + 1))
            return decide(IfThenElse(invariant, *sides), self.analyzer)
        cuts = cut_points(conditions, var, extent, self.analyzer)
        parts = []
        for size, piece, here in self.pieces(var, extent, body, cuts if len(cuts) <= _MAX_CUTS else []):
            here = decide(here, self.analyzer)
            if is_nothing(here):
                continue
            whole = vector_loop(piece, size, here, self.machine, self.analyzer) if size > 1 else here
            parts.append(whole if whole is not None else loop(piece, size, ForKind.SERIAL, here))
        return decide(sequence(parts), self.analyzer)


def _invariant_part(var: Var, condition: Any) -> Any | None:
    """The conjunction of the parts of a condition that do not depend on `var`; None where every part does."""
    parts = [part for part in conjuncts(condition) if not uses(part, [var])]
    return conjunction(parts) if parts else None


def innermost_loops(func: PrimFunc) -> list[For]:
    """The loops of a function that hold no other loop, vector loops included (for reports and tests)."""
    return [node for node in collect(func.body, For) if constant(node.extent) and not collect(node.body, For)]
