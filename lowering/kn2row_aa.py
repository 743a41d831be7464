"""`kn2row-aa`: one GEMM a kernel position, accumulated straight into the shifted window of the output."""

from __future__ import annotations

from tvm import te

from .base import Epilogue, GemmAxes, LoweringCost, Reason, Stage, Tile, no_epilogue
from .implicit_gemm import conv_cost, pack_stage, predicated_stages
from .problem import ConvProblem, Problem
from .shift_add import RowTasks, in_output, shifted_sum, tap_axes, tap_cost, tap_products


class Kn2rowAa(RowTasks):
    """For every tap (kh, kw) with `dy = kh d - p`, `dx = kw d - p`, a GEMM with beta = 1 into a shifted window of O:

        O[n, y - dy, x - dx, :] += I[n, y, x, :]·W_(kh,kw)       [H W x C]·[C x M], where (y - dy, x - dx) lies in O

    The product of one register tile of pixels and channels never leaves the registers: it is added to the output at its
    shifted place. Rows that would fall outside are not computed, columns that would wrap round a row are not added;
    nothing is punched, so nothing need be restored, and the slack at both ends of the output that the paper needs, O(K
    W), is 0 here. Staged, the output's tile stays in registers through all taps, each of which reads the input at its
    shift under a predicate: the stages of implicit-gemm without a copy. Reads `(N, *size, C)`, writes `(N, *out, M)`;
    workspace 0 bytes, no padded copy either. Source: Anderson et al. 2017, "Low-memory GEMM-based convolution
    algorithms", hole-punching accumulating (arXiv 1709.03395); there "same" padding only, here any padding and
    dilation, channels last.
    """

    key = "kn2row-aa"
    summary = "a GEMM a kernel position, added into shifted windows of the output"
    gemm_formula = "K^2 x [H W x C]·[C x M], beta = 1"
    workspace_formula = "0 (row bounds and column predicates instead of the paper's 2 e p (W+1))"
    source = "Anderson et al. 2017, Low-memory GEMM-based convolution algorithms (arXiv 1709.03395)"

    def applicable(self, problem: Problem) -> Reason | None:
        return in_output(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        return tap_axes(problem)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        if problem.staged:
            return conv_cost(problem, tile, {})
        return tap_cost(problem, tile, passes=2, workspace={}, rows=self.rows(problem))

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        if problem.staged:
            return predicated_stages(problem, tile, epilogue)

        def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            return shifted_sum(
                problem, tap_products(problem, tile, data, packed), epilogue, hold="tile", rows=self.rows(problem)
            )

        return (pack_stage(problem, tile), Stage("gemm", ("data", "packed"), gemm, "output"))
