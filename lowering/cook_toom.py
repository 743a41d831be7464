"""The transforms of minimal filtering, exact: the matrices of F(m, r) by Cook-Toom interpolation, in rationals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import sqrt
from typing import Any

from tvm import tirx

Matrix = tuple[tuple[Fraction, ...], ...]

# Interpolation points in the order in which Cook-Toom takes them: small integers and their inverses round least.
POINTS = tuple(Fraction(p) for p in (0, 1, -1, Fraction(1, 2), -2, 2, Fraction(-1, 2)))


@dataclass(frozen=True)
class Transforms:
    """`Y = A^T [(G g) * (B^T d)]` for F(m, r): `at` is m x alpha, `g` alpha x r, `bt` alpha x alpha, all exact."""

    at: Matrix
    g: Matrix
    bt: Matrix


@lru_cache
def transforms(m: int, r: int) -> Transforms:
    """The matrices of F(m, r), `alpha = m + r - 1` points with the last at infinity (Cook-Toom, in rationals).

    Source: Lavin & Gray 2015, section 4.1 and its reference to Winograd 1980 (arXiv 1509.09308).
    """
    alpha = m + r - 1
    points = POINTS[: alpha - 1]
    if len(points) < alpha - 1:
        raise ValueError(f"F({m}, {r}) needs {alpha - 1} interpolation points, {len(POINTS)} are known")
    at = tuple(tuple([p**i for p in points] + [Fraction(int(i == m - 1))]) for i in range(m))
    rows_g, rows_bt = [], []
    for p in points:
        others = [q for q in points if q != p]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        rows_g.append(tuple(p**k / scale for k in range(r)))
        rows_bt.append((*_polynomial(others), Fraction(0)))
    rows_g.append(tuple(Fraction(int(k == r - 1)) for k in range(r)))
    rows_bt.append(tuple(_polynomial(points)))
    return Transforms(at, tuple(rows_g), tuple(rows_bt))


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of `prod (x - root)`, the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def apply_row(row: Any, matrix: Matrix, term: Any, dtype: str) -> Any:
    """`sum_k matrix[row][k] term(k)`, where `row` is a loop variable that the schedule unrolls."""
    result = None
    for i in reversed(range(len(matrix))):
        total = None
        for k, coefficient in enumerate(matrix[i]):
            if coefficient == 0:
                continue
            value = term(k)
            if abs(coefficient) != 1:
                value = value * tirx.const(float(abs(coefficient)), dtype)
            if total is None:
                total = value if coefficient > 0 else -value
            else:
                total = total + value if coefficient > 0 else total - value
        result = total if result is None else tirx.Select(row == i, total, result)
    return result


def amplification(m: int, r: int) -> float:
    """How much more a rounding error of a product weighs in F(m, r) than in a plain sum, on random data.

        max_k sqrt((sum_i A^T[k,i]^2 |G[i]|^2 |B^T[i]|^2) / r),    |.| the Euclidean norm of a row

    `|G[i]| |B^T[i]|` is the size of position `i`'s products where data and weights are independent with variance 1,
    `A^T` adds their errors up, and `r` is the size of an output beside it. Several dimensions multiply.
    Own derivation; Barabasz et al. 2020 (arXiv 1803.10986) bound the worst case by the same matrices' norms.
    """
    t = transforms(m, r)
    squared = [[float(sum(x * x for x in row)) for row in matrix] for matrix in (t.g, t.bt)]
    weights = [g * b for g, b in zip(*squared, strict=True)]
    return sqrt(max(sum(float(a * a) * w for a, w in zip(row, weights, strict=True)) for row in t.at) / r)


def terms(matrix: Matrix) -> int:
    """Nonzero entries: the operations of one 1-D pass."""
    return sum(x != 0 for row in matrix for x in row)
