"""`im2col-batched`: im2col whose one GEMM runs over the columns of the whole batch, channels first."""

from __future__ import annotations

from tvm import te

from .base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, no_epilogue, require_conv
from .copied import WHOLE
from .im2col import column_bytes, column_cost, gemm_of_batch, gemm_of_images, pack_rows_stage, unroll
from .problem import ConvProblem, Problem


class Im2colBatched(Lowering):
    """im2col with the columns of all images side by side, `L[kh, kw, c, n Ho Wo + y Wo + x] = I[n, c, y s + kh d - p,
    x s + kw d - p]`, then `O = W·L`.

    GEMM `[M/g x C/g K^2]·[C/g K^2 x N Ho Wo]`, one a group: where an image alone has few columns, the GEMM is no longer
    too narrow. L is stored in panels `[N Ho Wo / nr][K^2 C][nr]`, a panel may span two images; the columns of the whole
    batch (not of an image) are rounded up to the register tile's width, so the workspace is
    `e C K^2 roundup(N Ho Wo, nr)` bytes. Reads `(N, C, *size)`, writes `(N, M, *out)`. Source: Hadjis et al. 2015,
    Caffe con Troll, section 3, lowering type 1 (arXiv 1504.04343).
    """

    key = "im2col-batched"
    summary = "patches of the whole batch as columns, one GEMM (channels first)"
    gemm_formula = "[M x C K^2]·[C K^2 x N Ho Wo]"
    workspace_formula = "e C K^2 roundup(N Ho Wo, nr)"
    source = "Hadjis et al. 2015, Caffe con Troll, section 3, type 1 (arXiv 1504.04343)"
    layout = "NCHW"

    def applicable(self, problem: Problem) -> Reason | None:
        return require_conv(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        k = problem.taps * problem.c_group
        return GemmAxes(problem.groups, problem.m_group, problem.n * problem.pixels, k)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        return column_cost(problem, problem.n, tile, {"im2col_batched": column_bytes(problem, problem.n, tile)})

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)

        def columns(data: te.Tensor) -> te.Tensor:
            return unroll(problem, problem.n, tile, data, WHOLE)

        # Staged, the schedule makes one GEMM of the images' itself, and writes them where they belong.
        multiply = gemm_of_images if problem.staged else gemm_of_batch
        return (
            Stage("im2col_batched", ("data",), columns, "workspace", moves=True),
            pack_rows_stage(problem, tile),
            Stage(
                "gemm",
                ("im2col_batched", "packed"),
                lambda columns, packed: multiply(problem, tile, epilogue, columns, packed),
                "output",
            ),
        )
