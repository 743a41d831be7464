"""How far apart the choices of two points are: what a search calls a neighbour, and what a transfer calls nearest."""

from __future__ import annotations

from math import log2, prod

from lowering import Tile

from .point import Knobs, Value


def among(value: Value, values: tuple[Value, ...]) -> bool:
    """Whether a value is one of `values` and of the same type: 1 is not True."""
    return any(value == v and type(value) is type(v) for v in values)


def apart(a: Tile, b: Tile) -> float:
    """How many times apart two tiles are, as a sum of logarithms."""
    return abs(log2(a.mr / b.mr)) + abs(log2(a.nr / b.nr))


def differ(a: Knobs, b: Knobs) -> float:
    """How far apart two sets of values are; a name that only one has counts as one step."""
    left, right = dict(a), dict(b)
    return sum(distance(left[n], right[n]) if n in left and n in right else 1.0 for n in sorted({*left, *right}))


def distance(a: Value, b: Value) -> float:
    """Steps between two values: doublings of numbers, 1 for another word."""
    if isinstance(a, bool | str) or isinstance(b, bool | str):
        return float(a != b)
    left, right = (v if isinstance(v, tuple) else (v,) for v in (a, b))
    if len(left) != len(right):
        return abs(log2(max(1, prod(left)) / max(1, prod(right))))
    return sum(abs(log2(max(1, x) / max(1, y))) for x, y in zip(left, right, strict=True))


def nearest(value: Value | None, values: tuple[Value, ...]) -> Value:
    """The one of `values` that is nearest to `value`, the default where it is None or a word that is not there."""
    if value is None or (isinstance(value, str) and value not in values):
        return values[0]
    return min(values, key=lambda v: distance(value, v))
