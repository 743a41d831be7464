"""The conditions that every lowering of a gradient has."""

from __future__ import annotations

from typing import Any

from ..base import Reason, layer_kind
from ..gradient_problem import GradientProblem, InputGradientProblem

DTYPES = ("float32", "float64")


def require_gradient(problem: Any, kind: type[GradientProblem]) -> Reason | None:
    """Why `problem` is not the gradient that a lowering computes, in a dtype whose sums are exact enough; or None."""
    if not isinstance(problem, kind):
        got = (
            f"that by its {_by(type(problem))}" if isinstance(problem, GradientProblem) else f"a {layer_kind(problem)}"
        )
        return Reason(f"needs the gradient of a layer by its {_by(kind)}, got {got}")
    if problem.dtype not in DTYPES:
        return Reason(f"needs {' or '.join(DTYPES)}, got {problem.dtype}: thousands of pixels are summed")
    return None


def _by(kind: type[GradientProblem]) -> str:
    return "input" if kind is InputGradientProblem else "weight"
