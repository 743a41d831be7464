"""A GEMM whose left operand is read under conditions on its position: the conditions go where they cost nothing.

`gemmify.borders` on the block says that A is 0 outside a box of positions (the padding of an image, say), as conditions
on the loops around the register tile. Behind the schedule, when every loop stands:

  1. a condition that no inner loop changes moves in front of them: a step of the reduction that reads only zeros is
     left out, by one test for all rows of the tile
  2. a loop is cut where a condition that inner loops do change may begin or cease to hold: most pieces then hold
     none at all
  3. in a piece where some remain, the iterations are written out one by one, those of the loops inside likewise, until
     every condition is decided: rows of A that are 0 are left out

What is left out is `acc += 0 * b`, which changes nothing where `b` is finite.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Call, Range, TensorLoad
from tvm.tirx import FloatImm, For, ForKind, IfThenElse, IntImm, PrimFunc, SeqStmt, Stmt, Var

from .conditions import assume, atoms, branch_conditions, conjunction, conjuncts, cut_points, decide
from .tir_tools import (
    collect,
    constant,
    extent_of,
    fresh,
    in_root_block,
    is_nothing,
    loop,
    lower_blocks,
    renamed,
    sequence,
    substitute,
    uses,
)

BORDERS_ANNOTATION = "gemmify.borders"
# Copies of the innermost loops that may be written out: beyond, the conditions stay where they are.
MOST_COPIES = 32
_WHOLE = (ForKind.SERIAL, ForKind.UNROLLED)


def cut_borders(func: PrimFunc) -> PrimFunc:
    """A scheduled function in blocks as loops, in the three steps of the module."""
    lowered = lower_blocks(func)
    return in_root_block(lowered.with_body(_Cutter().statement(lowered.body, MOST_COPIES)))


class _Cutter:
    """Walks the loops from outside to inside and keeps the bounds of their variables in one analyzer."""

    def __init__(self) -> None:
        self.analyzer = sym.Analyzer()

    def bind(self, var: Var, extent: int) -> None:
        dtype = str(var.ty.dtype)
        self.analyzer.bind(var, Range.from_min_extent(IntImm(dtype, 0), IntImm(dtype, extent)))

    def statement(self, stmt: Stmt, copies: int) -> Stmt:
        """`stmt` with at most `copies` copies of what is innermost written out."""
        if isinstance(stmt, SeqStmt):
            return sequence([self.statement(part, copies) for part in stmt.seq])
        if isinstance(stmt, IfThenElse):
            other = self.statement(stmt.else_case, copies) if stmt.else_case is not None else None
            return IfThenElse(stmt.condition, self.statement(stmt.then_case, copies), other)
        if not isinstance(stmt, For) or not branch_conditions(stmt.body):
            return stmt
        extent = extent_of(stmt)
        if extent is None:
            return stmt
        self.bind(stmt.loop_var, extent)
        for node in collect(stmt.body, For):
            self.bind(node.loop_var, extent_of(node) or 1 << 30)
        if ForKind(stmt.kind) not in _WHOLE:
            return For(
                stmt.loop_var,
                stmt.min,
                stmt.extent,
                ForKind(stmt.kind),
                self.statement(stmt.body, copies),
                stmt.thread_binding,
                stmt.annotations,
                stmt.step,
            )
        return self.pieces(stmt, extent, copies)

    def pieces(self, stmt: For, extent: int, copies: int) -> Stmt:
        """Steps 2 and 3 for one loop."""
        varying = [part for part in _parts(stmt.body) if uses(part, _loop_vars(stmt.body))]
        own = [part for part in varying if uses(part, [stmt.loop_var])] or (
            _parts(stmt.body) if ForKind(stmt.kind) == ForKind.UNROLLED else []
        )
        cuts = cut_points(own, stmt.loop_var, extent, self.analyzer)
        edges = [0, *cuts, extent]
        undecided = [
            (start, end) for start, end in pairwise(edges) if end - start > 1 and not self.decided(stmt, start, end)
        ]
        spread = sum(end - start for start, end in undecided) + len(edges) - 1 - len(undecided)
        inner = _copies_inside(own, stmt.body)
        if cuts and spread * inner > copies and ForKind(stmt.kind) != ForKind.UNROLLED:
            edges, spread = [0, extent], 1
        elif cuts:
            edges = sorted({*edges, *(i for start, end in undecided for i in range(start, end))})
        parts = [self.piece(stmt, start, end, max(1, copies // spread)) for start, end in pairwise(edges)]
        return sequence(parts)

    def decided(self, stmt: For, start: int, end: int) -> bool:
        """Whether every condition on positions holds, or fails, throughout iterations `start` to `end`."""
        var, body = self.shifted(stmt, start, end)
        return not any(uses(part, [var]) and uses(part, _loop_vars(body)) for part in _parts(body))

    def shifted(self, stmt: For, start: int, end: int) -> tuple[Var, Stmt]:
        """(variable counted from `start`, body) of the iterations `start` to `end`, their conditions decided."""
        piece = fresh(stmt.loop_var, "")
        dtype = str(piece.ty.dtype)
        self.bind(piece, end - start)
        first = IntImm(dtype, start)
        value: Any = first if end - start == 1 else piece + first if start else piece
        body = substitute(renamed(stmt.body), {stmt.loop_var: value})
        for node in collect(body, For):
            self.bind(node.loop_var, extent_of(node) or 1 << 30)
        return piece, _without_zeros(decide(body, self.analyzer), self.analyzer)

    def piece(self, stmt: For, start: int, end: int, copies: int) -> Stmt:
        """Iterations `start` to `end`: step 1 in each, then the loops inside."""
        var, body = self.shifted(stmt, start, end)
        inner = _loop_vars(body)
        fixed = [part for part in _parts(body) if not uses(part, inner)]
        if fixed and inner:
            common = conjunction(fixed)
            sides = [
                _without_zeros(decide(assume(body, common, v), self.analyzer), self.analyzer) for v in (True, False)
            ]
            done = [self.statement(renamed(side), copies) for side in sides]
            body = decide(IfThenElse(common, *done), self.analyzer)
        else:
            body = self.statement(body, copies)
        if end - start == 1 or is_nothing(body):
            return body
        made = loop(var, end - start, ForKind(stmt.kind), body)
        return For(made.loop_var, made.min, made.extent, made.kind, body, None, stmt.annotations)


def _parts(body: Stmt) -> list[Any]:
    """The different comparisons of positions in the conditions of `body`."""
    found: list[Any] = []
    for part in (part for condition in branch_conditions(body) for part in conjuncts(condition)):
        if _of_positions(part) and not any(tvm_ffi.structural_equal(part, other) for other in found):
            found.append(part)
    return found


def _of_positions(part: Any) -> bool:
    return (
        constant(part) is None
        and not collect(part, (TensorLoad, Call))
        and all("int" in str(atom.a.ty) for atom in atoms(part) if hasattr(atom, "a"))
    )


def _loop_vars(body: Stmt) -> list[Var]:
    return [node.loop_var for node in collect(body, For)]


def _copies_inside(conditions: list[Any], body: Stmt) -> int:
    """How often the innermost loops are written out for one iteration in which `conditions` stay undecided."""
    loops = [node for node in collect(body, For) if ForKind(node.kind) == ForKind.SERIAL]
    return prod(extent_of(node) or 1 for node in loops if any(uses(part, [node.loop_var]) for part in conditions))


def _without_zeros(body: Stmt, analyzer: sym.Analyzer) -> Stmt:
    """`body` without products with the constant 0, and without the loops that then do nothing."""

    def product(mul: tirx.Mul) -> Any:
        zero = next((x for x in (mul.a, mul.b) if isinstance(x, FloatImm) and float(x.value) == 0), None)
        return mul if zero is None else zero

    def empty(node: For) -> Stmt:
        return node if collect(node.body, tirx.BufferStore) else sequence([])

    def flat(seq: SeqStmt) -> Stmt:
        return sequence(list(seq.seq))

    body = decide(tvm_ffi.structural_map(body, (tirx.Mul, product), order="post"), analyzer)
    return tvm_ffi.structural_map(body, [(For, empty), (SeqStmt, flat)], order="post")
