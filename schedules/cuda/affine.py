"""Flat indices taken apart: sums of terms, how far an index moves with an axis, which part depends on what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import gcd
from typing import Any, Protocol

from tvm import sym, tirx
from tvm.ir import Range, TensorLoad
from tvm.tirx import IntImm, Var

from ..cpu.tir_tools import collect, constant, stride_of, uses


class Ranged(Protocol):
    """An axis: a variable that runs from 0 to `extent`."""

    @property
    def var(self) -> Var: ...

    @property
    def extent(self) -> int: ...


def stride_in(index: Any, var: Var, analyzer: sym.Analyzer) -> int | None:
    """How far a flat index moves when `var` moves by one; None where that is not constant."""
    return stride_of(index, var, analyzer)


def terms(index: Any, factor: int = 1) -> list[tuple[int, Any]]:
    """`index` as a sum of `factor * term`; a term is 1 (for the constant) or an expression that is no sum."""
    value = constant(index)
    if value is not None:
        return [(factor * value, 1)]
    if isinstance(index, tirx.Add):
        return terms(index.a, factor) + terms(index.b, factor)
    if isinstance(index, tirx.Sub):
        return terms(index.a, factor) + terms(index.b, -factor)
    if isinstance(index, tirx.Mul):
        for one, other in ((index.a, index.b), (index.b, index.a)):
            if (by := constant(one)) is not None:
                return terms(other, factor * by)
    return [(factor, index)]


def total(parts: Sequence[tuple[int, Any]], dtype: str) -> Any:
    """The sum of terms as an expression of `dtype`."""
    result: Any = IntImm(dtype, 0)
    for factor, term in parts:
        result = result + (IntImm(dtype, factor) if isinstance(term, int) else term * IntImm(dtype, factor))
    return result


def split(
    index: Any, rows: Sequence[Var], analyzer: sym.Analyzer
) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]], int]:
    """`index` as the sum of terms of `rows` alone, of other terms, and of a constant."""
    mine: list[tuple[int, Any]] = []
    rest: list[tuple[int, Any]] = []
    offset = 0
    for factor, term in terms(analyzer.canonical_simplify(index)):
        if isinstance(term, int):
            offset += factor
        else:
            (mine if depends_only(term, rows) else rest).append((factor, term))
    return mine, rest, offset


def depends_only(term: Any, known: Sequence[Var]) -> bool:
    """Whether `term` depends on `known` alone, not on memory."""
    if collect(term, TensorLoad):
        return False
    return all(any(var.same_as(own) for own in known) for var in collect(term, Var))


def vector_width(index: Any, axes: Sequence[Ranged], conditions: Sequence[Any], analyzer: sym.Analyzer) -> int:
    """How many consecutive elements, a power of two, a step along the fused `axes` (slowest first) always reads at
    once: the index moves by one with them, starts at a multiple of that number, and no condition changes in between."""
    run = 1
    covered: list[Var] = []
    for axis in reversed(axes):
        if stride_in(index, axis.var, analyzer) != run or any(uses(c, [axis.var]) for c in conditions):
            break
        run *= axis.extent
        covered.append(axis.var)
    width = run
    for factor, term in terms(analyzer.canonical_simplify(index)):
        if isinstance(term, int) or not any(term.same_as(var) for var in covered):
            width = gcd(width, factor)
    return width & -width


def decompose(flat: Any, extents: Sequence[int], bind: Callable[[Any], Any]) -> list[Any]:
    """The axes of the given extents, slowest first, of a flat position; every one is bound to a name by `bind`."""
    found: list[Any] = []
    rest = flat
    for extent in reversed(extents[1:]):
        found.append(bind(tirx.floormod(rest, extent)))
        rest = bind(tirx.floordiv(rest, extent))
    return [rest, *reversed(found)] if extents else []


def ranged(axes: Iterable[Ranged]) -> sym.Analyzer:
    """An analyzer that knows the range of every axis."""
    analyzer = sym.Analyzer()
    for axis in axes:
        analyzer.bind(axis.var, Range.from_min_extent(IntImm("int32", 0), IntImm("int32", axis.extent)))
    return analyzer
