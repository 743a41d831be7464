"""`pointwise`: a 1x1 convolution is a GEMM as it stands."""

from __future__ import annotations

from .base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, no_epilogue, require_conv
from .implicit_gemm import ImplicitGemm
from .problem import ConvProblem, Problem

_FORM = ImplicitGemm()


class Pointwise(Lowering):
    """A 1x1 convolution without padding: `O[n, y, x, m] = sum_c I[n, y s, x s, c] W[m, c]`.

    GEMM `[Ho Wo x C]·[C x M]` straight on the activations, `(N, *size, C)` to `(N, *out, M)`; no workspace, with a
    stride too, because the stride is only an address. Equivalent call: `implicit-gemm` on the same problem. Source:
    Warden 2015, "Why GEMM is at the heart of deep learning".
    """

    key = "pointwise"
    summary = "a 1x1 convolution is a GEMM as it stands"
    gemm_formula = "[Ho Wo x C]·[C x M]"
    workspace_formula = "0"
    source = "Warden 2015, Why GEMM is at the heart of deep learning"

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is not None:
            return reason
        assert isinstance(problem, ConvProblem)
        if problem.taps != 1:
            return Reason(f"needs a 1x1 kernel, got {'x'.join(map(str, problem.kernel))}")
        if problem.padded:
            return Reason(f"needs padding 0, got {problem.pad_before} before and {problem.pad_after} after")
        return None

    def axes(self, problem: Problem) -> GemmAxes:
        return _FORM.axes(problem)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        return _FORM.cost(problem, tile)

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        return _FORM.build(problem, tile, epilogue)
