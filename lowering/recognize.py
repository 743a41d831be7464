"""A PrimFunc that somebody else wrote -> the convolution or fully connected layer that it computes.

What counts is what is computed, never a name. The one reduction of the function must be `out += a b` from 0, with

    a = I[one index an axis], zero outside its tensor where a condition or a pad block says so
    b = W[each axis an expression of one of: output channel, kernel position, input channel]

in any order of axes. Strategy:

1. inline the layout changes and the zero padding before the reduction, so that both are part of how `a` is addressed
2. give every axis of `a` its role: batch, channel, or a window of one spatial dimension
3. derive the problem's numbers from the addresses at 0 and 1
4. check the claim on every point: each address equals the problem's, the condition holds exactly inside the tensor, and
   every variable has one role

Step 4 is what makes 2 and 3 safe: a wrong guess there ends in a `Reason`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import prim

from .base import Reason
from .match import BATCH, CHANNEL, Form, Match, Recognized
from .problem import DTYPES
from .raise_te import Block, Load, NotUnderstood, as_choice, read_blocks, same_index, substitute


def recognize(func: tirx.PrimFunc) -> Recognized | Reason:
    """The problem that an unscheduled PrimFunc computes, or the condition that it fails."""
    try:
        blocks = read_blocks(func)
        at = _the_reduction(blocks)
        block = blocks[at]
        left, right, conditions = _factors(block)
        producers = {b.buffer: b for b in blocks[:at]}
        return _best_match(blocks, at, [(left, right), (right, left)], conditions, producers)
    except NotUnderstood as error:
        return Reason(str(error))


def _the_reduction(blocks: Sequence[Block]) -> int:
    found = [i for i, block in enumerate(blocks) if block.reduction]
    if len(found) != 1:
        raise NotUnderstood(f"needs exactly one reduction, found {len(found)}")
    return found[0]


def _factors(block: Block) -> tuple[Any, Any, tuple[Any, ...]]:
    """`a`, `b` and the conditions of a block that computes `out = 0`, then `out + a b` where they hold."""
    dtype = str(block.buffer.dtype)
    if dtype not in DTYPES:
        raise NotUnderstood(f"needs an output of {', '.join(DTYPES)}, found {dtype}")
    if not is_zero(block.init):
        raise NotUnderstood(f"needs a sum that starts from 0, found {block.init}")
    value = block.value
    if not isinstance(value, prim.Add):
        raise NotUnderstood(f"needs a sum of products, found a reduction by {type(value).__name__}")
    for old, term in ((value.a, value.b), (value.b, value.a)):
        if isinstance(old, Load) and old.source.same_as(block.buffer) and same_index(old.indices, block.index):
            conditions, product = _peel(term)
            if not isinstance(product, prim.Mul):
                raise NotUnderstood(f"needs a sum of products, found the term {product}")
            return product.a, product.b, conditions
    raise NotUnderstood("needs a block that adds to the element that it stores")


def is_zero(expr: Any) -> bool:
    """Whether an expression is the constant 0 (not -0.0)."""
    return isinstance(expr, prim.IntImm | prim.FloatImm) and expr.value == 0 and not np.signbit(float(expr.value))


def _peel(expr: Any) -> tuple[tuple[Any, ...], Any]:
    """The conditions of nested `condition ? value : 0`, and the value."""
    conditions: list[Any] = []
    while (choice := as_choice(expr)) is not None:
        condition, then, otherwise = choice
        if is_zero(then) and not is_zero(otherwise):
            condition, then, otherwise = prim.Not(condition), otherwise, then
        if not is_zero(otherwise):
            break
        conditions += _conjuncts(condition)
        expr = then
    return tuple(conditions), expr


def _conjuncts(condition: Any) -> list[Any]:
    if isinstance(condition, prim.And):
        return _conjuncts(condition.a) + _conjuncts(condition.b)
    if isinstance(condition, prim.Not) and isinstance(condition.a, prim.Or):
        return _conjuncts(prim.Not(condition.a.a)) + _conjuncts(prim.Not(condition.a.b))
    return [condition]


def _forms(factor: Any, conditions: tuple[Any, ...], producers: Mapping[Any, Block]) -> list[Form]:
    """The factor as an element of a tensor, with the copies before it inlined; the most inlined form first."""
    own, load = _peel(factor)
    if not isinstance(load, Load):
        raise NotUnderstood(f"needs factors that are elements of a tensor (zero where it pads), found {load}")
    forms = [Form(load.source, tuple(load.indices), conditions + own)]
    while (producer := producers.get(forms[-1].data)) is not None:
        value = substitute(producer.value, dict(zip(producer.spatial, forms[-1].index, strict=True)))
        more, load = _peel(value)
        if not isinstance(load, Load):
            break
        forms.append(Form(load.source, tuple(load.indices), forms[-1].conditions + more))
    return forms[::-1]


def _best_match(
    blocks: Sequence[Block],
    at: int,
    orders: Sequence[tuple[Any, Any]],
    conditions: tuple[Any, ...],
    producers: Mapping[Any, Block],
) -> Recognized:
    """The first form that matches for each order of the factors; of two, the one whose output has the batch first."""
    reasons: list[str] = []
    found: list[Recognized] = []
    for data, weight in orders:
        try:
            for form in _forms(data, conditions, producers):
                try:
                    found.append(Match(blocks[at], form, weight).recognized(tuple(blocks), at))
                    break
                except NotUnderstood as error:
                    reasons.append(str(error))
        except NotUnderstood as error:
            reasons.append(str(error))
    if not found:
        raise NotUnderstood(reasons[0])
    return min(found, key=_preference)


def _preference(match: Recognized) -> tuple[int, bool]:
    """Either factor of two matrices may be the data: prefer the one of more axes, or that of the output's rows."""
    roles = match.out_roles
    rows_last = BATCH in roles and CHANNEL in roles and roles.index(BATCH) > roles.index(CHANNEL)
    return -len(match.data_roles), rows_last


__all__ = ["Recognized", "recognize"]
