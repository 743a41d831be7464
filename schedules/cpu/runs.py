"""Copies -> vector code: loops that gather elements into a buffer, their addresses made of quotients and remainders.

    1. an unrolled loop is written out, so that its variable is a constant;
    2. the innermost loop is cut where a quotient `(a + v) // b` changes: between two cuts `(a + v) % b` is linear in
       `v`;
    3. `vectorize.py` does the rest: conditions that do not depend on the loop move out, the loop is cut where the
       others change, each piece becomes vectors.

Everything that is no copy into the named buffer stays as it is.
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.tirx import BufferStore, For, ForKind, IfThenElse, IntImm, PrimFunc, SeqStmt, Stmt, Var

from ..machine import Machine
from .tir_tools import collect, extent_of, fresh, renamed, sequence, stride_of, substitute
from .vectorize import Vectorizer

_MAX_RUNS = 64
_QUOTIENTS = (tirx.FloorDiv, tirx.FloorMod)


def vectorize_copies(func: PrimFunc, buffer: str, machine: Machine) -> PrimFunc:
    """A function of plain loops whose loops that write nothing but the buffer of this name are in vectors."""
    return func.with_body(_Copies(machine, buffer).statement(func.body))


class _Copies(Vectorizer):
    """Walks to the loops that write the buffer, with the bounds of the loops around them at hand."""

    def __init__(self, machine: Machine, buffer: str) -> None:
        super().__init__(machine)
        self.buffer = buffer

    def statement(self, stmt: Stmt) -> Stmt:
        stores = collect(stmt, BufferStore)
        if stores and all(store.buffer.name == self.buffer for store in stores):
            return self.copy(stmt)
        if not any(store.buffer.name == self.buffer for store in stores):
            return stmt
        if isinstance(stmt, SeqStmt):
            return SeqStmt([self.statement(part) for part in stmt.seq])
        if isinstance(stmt, IfThenElse):
            other = self.statement(stmt.else_case) if stmt.else_case is not None else None
            return IfThenElse(stmt.condition, self.statement(stmt.then_case), other)
        if isinstance(stmt, For):
            extent = extent_of(stmt)
            if extent is not None:
                self.bind(stmt.loop_var, extent)
            rest = (stmt.thread_binding, stmt.annotations, stmt.step)
            return For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, self.statement(stmt.body), *rest)
        return stmt

    def copy(self, stmt: Stmt) -> Stmt:
        """A statement that writes only the buffer: step 1 on the way in, then the vectoriser."""
        if isinstance(stmt, For) and ForKind(stmt.kind) == ForKind.UNROLLED and (extent := extent_of(stmt)) is not None:
            dtype = str(stmt.loop_var.ty.dtype)
            bodies = [substitute(renamed(stmt.body), {stmt.loop_var: IntImm(dtype, i)}) for i in range(extent)]
            return sequence([self.copy(body) for body in bodies])
        return super().statement(stmt)

    def outer(self, stmt: For, extent: int) -> Stmt:
        """A loop around others: walked through; a cut would only multiply the code."""
        rest = (stmt.thread_binding, stmt.annotations, stmt.step)
        return For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, self.copy(stmt.body), *rest)

    def innermost(self, var: Var, extent: int, body: Stmt, moved: int) -> Stmt:
        """A loop without loops inside: step 2, then step 3."""
        cuts = _run_starts(var, extent, body, self.analyzer)
        if not cuts or len(cuts) > _MAX_RUNS:
            return super().innermost(var, extent, body, moved)
        parts = []
        dtype = str(var.ty.dtype)
        for start, end in pairwise([0, *cuts, extent]):
            piece = fresh(var, f"_{start}")
            self.bind(piece, end - start)
            at: Any = piece + IntImm(dtype, start) if end - start > 1 else IntImm(dtype, start)
            here = _linear(substitute(renamed(body), {var: at}), piece, end - start, self.analyzer)
            parts.append(super().innermost(piece, end - start, here, moved))
        return sequence(parts)


def _step(node: Any, var: Var, analyzer: sym.Analyzer) -> tuple[int, int] | None:
    """(step, rest) of an `a // b` or `a % b` that moves with `var`, one by one: `a` is `rest` modulo `step` at 0, and
    nothing changes before `rest + var` reaches `step`, a divisor of `b`. None for every other node."""
    if not isinstance(node.b, IntImm) or stride_of(node.a, var, analyzer) != 1:
        return None
    known = analyzer.modular_set(_at_start(node.a, var, analyzer))
    step = gcd(int(known.coeff), int(node.b.value))
    return step, int(known.base) % step


def _at_start(value: Any, var: Var, analyzer: sym.Analyzer) -> Any:
    return analyzer.simplify(substitute(value, {var: IntImm(str(var.ty.dtype), 0)}))


def _run_starts(var: Var, extent: int, body: Stmt, analyzer: sym.Analyzer) -> list[int]:
    """The iterations in (0, extent) at which some quotient may change."""
    cuts: set[int] = set()
    for node in collect(body, _QUOTIENTS):
        if (found := _step(node, var, analyzer)) is not None:
            step, rest = found
            cuts |= {i for i in range(1, extent) if (rest + i) % step == 0}
    return sorted(cuts)


def _linear(body: Stmt, var: Var, extent: int, analyzer: sym.Analyzer) -> Stmt:
    """`body` with each quotient that is the same in the whole loop computed at its start."""

    def rewrite(node: Any) -> Any:
        found = _step(node, var, analyzer)
        if found is None or found[1] + extent > found[0]:
            return node
        if isinstance(node, tirx.FloorDiv):
            return _at_start(node, var, analyzer)
        return _at_start(node, var, analyzer) + var

    return tvm_ffi.structural_map(body, (_QUOTIENTS, rewrite), order="pre")
