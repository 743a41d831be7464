"""`kn2row-as`: one GEMM a kernel position into a temporary, which is then added to the output, shifted."""

from __future__ import annotations

from tvm import te

from .base import Epilogue, GemmAxes, LoweringCost, Reason, Stage, Tile, no_epilogue, off_stack
from .implicit_gemm import pack_stage
from .kn2col import kn2col_cost, kn2col_stages
from .problem import ConvProblem, Problem
from .shift_add import RowTasks, in_output, shifted_sum, tap_axes, tap_cost, tap_products


class Kn2rowAs(RowTasks):
    """For every tap (kh, kw) with `dy = kh d - p`, `dx = kw d - p`:

        T[y, x, m] = sum_c I[n, y, x, c] W[m, kh, kw, c]                [H W x C]·[C x M], beta = 0
        O[n, y, x, m] += T[y + dy, x + dx, m]                           where (y + dy, x + dx) lies in the image

    T is reused by all taps, images and groups. The paper holds it for the whole image and all channels, `e M H W`; here
    each thread goes through all taps for `r` rows of output (about 8) and one panel of `nr` channels before the next,
    and holds the products of those rows only, `e nr r W` bytes a thread. T and the sum then stay in a core's own cache;
    with a panel of the whole image, which does not, 256 channels of 56x56 took 1.29 times as long as implicit-gemm.
    Staged, no thread has a panel of its own: T of all taps is a workspace, as in kn2col, and its `e N K^2 M H W` bytes
    are reported. Reads `(N, *size, C)`, writes `(N, *out, M)`. Source: Anderson et al. 2017, "Low-memory GEMM-based
    convolution algorithms", accumulating kn2row (arXiv 1709.03395); any padding and dilation here.
    """

    key = "kn2row-as"
    summary = "a GEMM a kernel position into rows of a temporary, added shifted to the output"
    gemm_formula = "K^2 x [H W x C]·[C x M], then shift-add"
    workspace_formula = "threads e nr r W, r rows a task (the paper: e M H W)"
    source = "Anderson et al. 2017, Low-memory GEMM-based convolution algorithms (arXiv 1709.03395)"

    def applicable(self, problem: Problem) -> Reason | None:
        return in_output(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        return tap_axes(problem)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        if problem.staged:
            return kn2col_cost(problem, tile)
        held = problem.element * tile.nr * self.rows(problem) * problem.size[-1]
        return tap_cost(problem, tile, passes=4, workspace={}, thread_bytes=off_stack(held), rows=self.rows(problem))

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        if problem.staged:
            return kn2col_stages(problem, tile, epilogue)

        def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            return shifted_sum(
                problem, tap_products(problem, tile, data, packed), epilogue, hold="panel", rows=self.rows(problem)
            )

        return (pack_stage(problem, tile), Stage("gemm", ("data", "packed"), gemm, "output"))
