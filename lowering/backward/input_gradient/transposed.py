"""The gradient of a layer by its input as the transposed convolution that it is, in any lowering of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import te

from ...base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, no_epilogue
from ...gradient_problem import InputGradientProblem
from ...problem import DenseProblem
from ..require import require_gradient


class TransposedGradient(Lowering[InputGradientProblem]):
    """`dI` by the transposed convolution of `InputGradientProblem.transposed`, computed in the lowering `form`.

    Its input is dO and its weight is W with C and M exchanged within each group, which is an address computation inside
    the packing of the weights: nothing is stored for it. During training the packing runs at every step.
    """

    form: Lowering

    def applicable(self, problem: InputGradientProblem) -> Reason | None:
        return require_gradient(problem, InputGradientProblem) or self.form.applicable(problem.transposed)

    def axes(self, problem: InputGradientProblem) -> GemmAxes:
        return self.form.axes(problem.transposed)

    def cost(self, problem: InputGradientProblem, tile: Tile) -> LoweringCost:
        return self.form.cost(problem.transposed, tile)

    def build(self, problem: InputGradientProblem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        dense = isinstance(problem.forward, DenseProblem)

        def of_layer(value: Any, index: tuple[Any, ...]) -> Any:
            return epilogue(value, (index[0], index[-1]) if dense else index)

        stages = self.form.build(problem.transposed, tile, of_layer)
        return tuple(_with_operands_of(problem, stage) for stage in stages)


def _with_operands_of(problem: InputGradientProblem, stage: Stage) -> Stage:
    """The same stage, given dO and W in the forward problem's shapes where it reads the transposed convolution's."""
    views = {"data": _gradient_view, "weight": _weight_view}

    def compute(*given: te.Tensor) -> te.Tensor:
        seen = [views[name](problem, t) if name in views else t for name, t in zip(stage.reads, given, strict=True)]
        return stage.compute(*seen)

    return Stage(stage.name, stage.reads, compute, stage.kind)


@dataclass(frozen=True)
class _View:
    """A tensor under other indices, read where it is: what a stage asks of an operand."""

    element: Callable[..., Any]
    dtype: str

    def __call__(self, *index: Any) -> Any:
        return self.element(*index)


def _gradient_view(problem: InputGradientProblem, gradient: te.Tensor) -> Any:
    """dO; of a fully connected layer with the one pixel that it stands for."""
    if not isinstance(problem.forward, DenseProblem):
        return gradient
    return _View(lambda n, x, m: gradient(n, m), problem.dtype)


def _weight_view(problem: InputGradientProblem, weight: te.Tensor) -> _View:
    """`W'[c, k, m]`, `m` counted within its group, from `W[m, k, c]`, `c` counted within its group."""
    conv = problem.conv

    def element(c: Any, *index: Any) -> Any:
        taps, m = index[:-1], index[-1]
        row = c // conv.c_group * conv.m_group + m
        at = () if isinstance(problem.forward, DenseProblem) else taps
        return weight(row, *at, c % conv.c_group)

    return _View(element, problem.dtype)
