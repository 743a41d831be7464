"""Conditions inside a loop: where they change along the loop variable, and what is left once they are decided.

Padding, concatenation and partial tiles arrive as conditions on indices. `cut_points` finds the iterations at which
one of them changes its value, so that the loop can be cut there into pieces in which every condition is constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Call, TensorLoad
from tvm.tirx import BufferStore, IfThenElse, IntImm, Stmt, Var

from .tir_tools import buffer_of, collect, constant, is_nothing, sequence, uses
from .vector_math import op_name

_FAR = 1 << 40
_COMPARE: dict[type, Callable[[int], bool]] = {
    tirx.LT: lambda d: d < 0,
    tirx.LE: lambda d: d <= 0,
    tirx.GT: lambda d: d > 0,
    tirx.GE: lambda d: d >= 0,
}
_BOTH_WAYS = (tirx.EQ, tirx.NE)


def is_branch(node: Any) -> bool:
    """An `if_then_else` expression: only the side that is chosen is evaluated."""
    return isinstance(node, Call) and op_name(node) == "tirx.if_then_else"


def branch_conditions(body: Any) -> list[Any]:
    """The conditions of every `if` statement and `if_then_else` in `body`, outermost first."""
    statements = [node.condition for node in collect(body, IfThenElse)]
    return statements + [node.args[0] for node in collect(body, Call) if is_branch(node)]


def atoms(condition: Any) -> list[Any]:
    """The comparisons that a condition is made of."""
    if isinstance(condition, (tirx.And, tirx.Or)):
        return atoms(condition.a) + atoms(condition.b)
    if isinstance(condition, tirx.Not):
        return atoms(condition.a)
    if isinstance(condition, Call) and op_name(condition) == "tirx.likely":
        return atoms(condition.args[0])
    return [condition]


def conjuncts(condition: Any) -> list[Any]:
    """The parts of a condition that all have to hold."""
    if isinstance(condition, tirx.And):
        return conjuncts(condition.a) + conjuncts(condition.b)
    if isinstance(condition, Call) and op_name(condition) == "tirx.likely":
        return conjuncts(condition.args[0])
    return [condition]


def conjunction(parts: list[Any]) -> Any:
    """All of them; True for none."""
    result: Any = IntImm("bool", 1)
    for index, part in enumerate(parts):
        result = part if index == 0 else tirx.And(result, part)
    return result


def cut_points(conditions: list[Any], var: Var, extent: int, analyzer: sym.Analyzer) -> list[int]:
    """Iterations in (0, extent) at which a comparison may change its value, sorted.

    A comparison must be linear in `var`; what else it holds may vary within constant bounds, and then both the first
    iteration where it can change and the one from where it cannot are returned. Others contribute nothing.
    """
    points: set[int] = set()
    for atom in (atom for condition in conditions for atom in atoms(condition)):
        kind = type(atom)
        if (kind not in _COMPARE and kind not in _BOTH_WAYS) or not uses(atom, [var]):
            continue
        if "int" not in str(atom.a.ty):
            continue
        line = _line(atom.a - atom.b, var, analyzer)
        if line is None:
            continue
        slope, low, high = line
        tests = [_COMPARE[kind]] if kind in _COMPARE else [_COMPARE[tirx.LT], _COMPARE[tirx.LE]]
        for test in tests:
            for base in {low, high}:
                points.add(_first_change(test, slope, base, extent))
    return sorted(point for point in points if 0 < point < extent)


def _line(difference: Any, var: Var, analyzer: sym.Analyzer) -> tuple[int, int, int] | None:
    """(slope, lowest base, highest base) of an expression that is linear in `var`."""
    parts = sym.detect_linear_equation(analyzer.simplify(difference), [var])
    if len(parts) != 2:
        return None
    slope = constant(analyzer.simplify(parts[0]))
    bound = analyzer.const_int_bound(analyzer.simplify(parts[1]))
    low, high = int(bound.min_value), int(bound.max_value)
    return None if not slope or low < -_FAR or high > _FAR else (slope, low, high)


def _first_change(test: Callable[[int], bool], slope: int, base: int, extent: int) -> int:
    """The first iteration at which `test(slope v + base)` differs from its value at v = 0 (by bisection)."""
    start = test(base)
    low, high = 0, extent
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if test(slope * middle + base) == start else (low, middle)
    return high


def decide(body: Stmt, analyzer: sym.Analyzer) -> Stmt:
    """`body` with every condition that the analyzer can decide replaced by the side that it takes.

    Writes that change nothing (`A = max(A, lowest)`, `A = A + 0`: a padded tap) disappear with it.
    """

    def expression(call: Call) -> Any:
        if not is_branch(call):
            return call
        condition = analyzer.simplify(call.args[0])
        known = constant(condition)
        if known is not None:
            return call.args[1] if known else call.args[2]
        return tirx.if_then_else(condition, call.args[1], call.args[2])

    def statement(node: IfThenElse) -> Stmt:
        condition = analyzer.simplify(node.condition)
        known = constant(condition)
        if known is not None:
            chosen = node.then_case if known else node.else_case
            return chosen if chosen is not None else sequence([])
        other = node.else_case if node.else_case is not None and not is_nothing(node.else_case) else None
        if is_nothing(node.then_case):
            return IfThenElse(tirx.Not(condition), other, None) if other is not None else sequence([])
        return IfThenElse(condition, node.then_case, other)

    callbacks = [
        (Call, expression),
        (BufferStore, lambda store: sequence([]) if changes_nothing(store) else store),
        (tirx.SeqStmt, lambda seq: sequence(list(seq.seq))),
        (IfThenElse, statement),
    ]
    return tvm_ffi.structural_map(body, callbacks, order="post")


def assume(body: Stmt, condition: Any, value: bool) -> Stmt:
    """`body` where the conjunction `condition` is known to be `value`."""
    known = conjuncts(condition)

    def holds(part: Any) -> bool:
        return any(tvm_ffi.structural_equal(part, other) for other in known)

    def rewrite(found: Any) -> Any:
        parts = conjuncts(found)
        if value:
            return conjunction([part for part in parts if not holds(part)])
        inside = all(any(tvm_ffi.structural_equal(part, other) for other in parts) for part in known)
        return IntImm("bool", 0) if inside else found

    def expression(call: Call) -> Any:
        return tirx.if_then_else(rewrite(call.args[0]), call.args[1], call.args[2]) if is_branch(call) else call

    def statement(node: IfThenElse) -> Stmt:
        return IfThenElse(rewrite(node.condition), node.then_case, node.else_case)

    return tvm_ffi.structural_map(body, [(Call, expression), (IfThenElse, statement)], order="post")


def reduction_operand(store: BufferStore) -> tuple[type, Any] | None:
    """(operator, x) of `A[i] = operator(A[i], x)` for +, *, max, min and an x that does not read A; else None."""
    value = store.value
    if type(value) not in (tirx.Add, tirx.Mul, tirx.Max, tirx.Min):
        return None
    for own, other in ((value.a, value.b), (value.b, value.a)):
        if isinstance(own, TensorLoad) and same_element(own, store):
            reads = [load for load in collect(other, TensorLoad) if load.source.same_as(store.buffer)]
            return None if reads else (type(value), other)
    return None


def same_element(one: TensorLoad | BufferStore, other: TensorLoad | BufferStore) -> bool:
    """Whether two accesses name the same element of the same buffer, by structure."""
    return buffer_of(one).same_as(buffer_of(other)) and all(
        tvm_ffi.structural_equal(a, b) for a, b in zip(one.indices, other.indices, strict=True)
    )


def identity(operator: type, dtype: str) -> Any:
    """The value that leaves the other operand as it is."""
    if operator in (tirx.Add, tirx.Mul):
        return tirx.const(0 if operator is tirx.Add else 1, dtype)
    return tirx.min_value(dtype) if operator is tirx.Max else tirx.max_value(dtype)


def changes_nothing(store: BufferStore) -> bool:
    found = reduction_operand(store)
    return found is not None and tvm_ffi.structural_equal(found[1], identity(found[0], str(store.buffer.dtype)))
