"""Training's two gradients of a layer as GEMMs: catalogues of their own, on the contract of `lowering.base`.

`lowerings_of(problem)` is the table that belongs to a problem: `catalogue()` for a layer, `INPUT_GRADIENT` or
`WEIGHT_GRADIENT` for a gradient of one.
"""

from __future__ import annotations

from ..base import Lowering
from ..gradient_problem import GradientProblem, InputGradientProblem, WeightGradientProblem
from ..problem import Problem
from . import input_gradient, weight_gradient
from .definitions import definition

INPUT_GRADIENT: dict[str, Lowering] = {
    lowering.key: lowering for lowering in (input_gradient.ImplicitGemm(), input_gradient.Im2col())
}
WEIGHT_GRADIENT: dict[str, Lowering] = {
    lowering.key: lowering for lowering in (weight_gradient.ImplicitGemm(), weight_gradient.Im2col())
}


def lowerings_of(problem: Problem | GradientProblem) -> dict[str, Lowering]:
    """Every way to compute `problem`, by key, in order of preference."""
    if isinstance(problem, InputGradientProblem):
        return INPUT_GRADIENT
    if isinstance(problem, WeightGradientProblem):
        return WEIGHT_GRADIENT
    from .. import catalogue

    return catalogue()


__all__ = [
    "INPUT_GRADIENT",
    "WEIGHT_GRADIENT",
    "GradientProblem",
    "InputGradientProblem",
    "WeightGradientProblem",
    "definition",
    "lowerings_of",
]
