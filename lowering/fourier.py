"""The discrete Fourier transform of a real sequence as a product of sparse constant matrices, and its stages.

Half a spectrum of length `T` is stored as the `T + 2` numbers `Re X[0], Im X[0], Re X[1], ..., Im X[T/2]`, where

    X[k] = sum_j x[j] exp(-2 pi i j k / T)        k = 0 .. T/2

Even and odd parts about `T/2`, then about `T/4`, cut the `T x T` matrix into four blocks of about `T/4 x T/4`:
`T^2/4 + 2 T` operations where a plain product takes `T (T + 2)`. That is not an FFT in the letter, which would take
`O(T log T)`; up to 32 points, with a fused multiply-add a cycle, it costs about as much and is a few dense blocks. The
transposed factors in reverse order are the inverse transform, whose weights `1/T` and `2/T` belong to the filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import cos, pi, sin
from typing import Any

from tvm import te, tirx

from .base import dtype_of, zero

Row = tuple[tuple[int, float], ...]
Matrix = tuple[Row, ...]
"""Sparse rows: `(column, coefficient)` of every entry that is not 0."""


@lru_cache
def real_dft(points: int) -> tuple[Matrix, ...]:
    """The factors, first applied first, that take `points` (1, or a multiple of 4) reals to half a spectrum."""
    if points == 1:
        return ((((0, 1.0),), ()),)
    if points % 4:
        raise ValueError(f"a transform needs 1 point or a multiple of 4, got {points}")
    return _fold_halves(points), _fold_quarters(points), _blocks(points)


@lru_cache
def real_idft(points: int, wanted: int) -> tuple[Matrix, ...]:
    """The transposed factors, first applied first, that take half a spectrum to the first `wanted` of `points` values.

    x[j] = sum_k Re X[k] cos(2 pi j k / T) - Im X[k] sin(2 pi j k / T)        k = 0 .. T/2, unweighted
    """
    factors = real_dft(points)
    columns = [points, *(len(factor) for factor in factors)]
    flipped = [_transpose(factor, n) for factor, n in zip(factors, columns, strict=False)][::-1]
    return (*flipped[:-1], flipped[-1][:wanted])


def operations(points: int) -> int:
    """Multiply-adds of one transform, forward or back."""
    return sum(len(row) for factor in real_dft(points) for row in factor)


def _fold_halves(points: int) -> Matrix:
    """`e[j] = x[j] + x[T-j]` at `j = 0 .. T/2`, `o[j] = x[j] - x[T-j]` at `T - j`."""
    half = points // 2
    rows: list[Row] = []
    for i in range(points):
        if i in (0, half):
            rows.append(((i, 1.0),))
        else:
            rows.append(((i, 1.0), (points - i, 1.0)) if i < half else ((points - i, 1.0), (i, -1.0)))
    return tuple(rows)


def _fold_quarters(points: int) -> Matrix:
    """Even (`j <= T/4`) and odd (at `T/2 - j`) parts of `e` about `T/4`; of `o` (at `T - j`) the odd and the even."""
    half, quarter = points // 2, points // 4
    rows: list[Row] = []
    for i in range(half + 1):
        if i == quarter:
            rows.append(((i, 1.0),))
        else:
            rows.append(((i, 1.0), (half - i, 1.0)) if i < quarter else ((half - i, 1.0), (i, -1.0)))
    for i in range(half + 1, points):
        j = points - i
        if j == quarter:
            rows.append(((i, 1.0),))
        else:
            other = points - (half - j)
            rows.append(((i, 1.0), (other, 1.0)) if j < quarter else ((other, 1.0), (i, -1.0)))
    return tuple(rows)


def _blocks(points: int) -> Matrix:
    """Cosines of the even part, sines of the odd: `Re X[k]` from `e`, `Im X[k]` from `o`, even and odd `k` apart."""
    half, quarter = points // 2, points // 4
    rows: list[Row] = []
    for k in range(half + 1):
        angle = 2 * pi * k / points
        if k % 2 == 0:
            rows.append(tuple((j, _round(cos(angle * j))) for j in range(quarter + 1)))
            below = range(1, quarter) if 0 < k < half else range(0)
            rows.append(tuple((points - (half - j), -_round(sin(angle * j))) for j in below))
        else:
            rows.append(tuple((half - j, _round(cos(angle * j))) for j in range(quarter)))
            rows.append(tuple((points - j, -_round(sin(angle * j))) for j in range(1, quarter + 1)))
    return tuple(tuple((j, v) for j, v in row if v) for row in rows)


def _round(value: float) -> float:
    """The value with what is 0 or 1 but for the rounding of pi made so."""
    nearest = round(2 * value) / 2
    return nearest if abs(value - nearest) < 1e-15 else value


def _transpose(matrix: Matrix, columns: int) -> Matrix:
    rows: list[list[tuple[int, float]]] = [[] for _ in range(columns)]
    for i, row in enumerate(matrix):
        for j, value in row:
            rows[j].append((i, value))
    return tuple(tuple(row) for row in rows)


def combine(rows: Sequence[Row], row: Any, term: Callable[[int], Any]) -> Any:
    """`sum_k rows[row][k] term(k)`, where `row` is a loop variable that the schedule unrolls."""
    result = None
    dtype = dtype_of(term(0))
    for i in reversed(range(len(rows))):
        total = None
        for k, coefficient in rows[i]:
            value = term(k)
            if abs(coefficient) != 1:
                value = value * tirx.const(abs(coefficient), dtype)
            if total is None:
                total = value if coefficient > 0 else -value
            else:
                total = total + value if coefficient > 0 else total - value
        total = zero(dtype) if total is None else total
        result = total if result is None else tirx.Select(row == i, total, result)
    return result


def apply(
    read: Callable[..., Any],
    shape: Sequence[int],
    factors: Sequence[Matrix],
    axis: int,
    name: str,
    attrs: dict[str, Any],
    last: dict[str, Any] | None = None,
) -> te.Tensor:
    """The factors applied one after another along `axis` of what `read(*index)` gives over `shape`, a stage each.

    Every stage carries the attributes `attrs`, the last one those of `last` instead where they are given.
    """
    source: Callable[..., Any] | te.Tensor = read
    dims = list(shape)
    for step, rows in enumerate(factors):
        dims[axis] = len(rows)
        own = last if last is not None and step == len(factors) - 1 else attrs
        source = te.compute(tuple(dims), _stage(source, rows, axis), name=f"{name}_{step}", attrs=own)
    assert isinstance(source, te.Tensor), "a transform has at least one factor"
    return source


def _stage(source: Callable[..., Any], rows: Matrix, axis: int) -> Callable[..., Any]:
    def element(*index: Any) -> Any:
        def term(k: int) -> Any:
            return source(*index[:axis], k, *index[axis + 1 :])

        return combine(rows, index[axis], term)

    return element
