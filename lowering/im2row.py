"""`im2row`: store every patch as a row, then one GEMM (channels last)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import te

from .base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, no_epilogue, require_conv
from .implicit_gemm import conv_axes, conv_cost, conv_gemm, pack_stage
from .problem import ConvProblem, Problem
from .window import read_padded, window_index


def patch_bytes(problem: ConvProblem) -> int:
    """Bytes of all patches: `e N C K^2 Ho Wo`."""
    return problem.element * problem.n * problem.c * problem.taps * problem.pixels


class Im2row(Lowering):
    """Patches as the rows of a matrix, `R[n, y, x, kh, kw, c] = I[n, y s + kh d - p, x s + kw d - p, c]`, then
    `O[n, y, x, :] = R[n, y, x, :]·W'`.

    GEMM `[Ho Wo x K^2 C]·[K^2 C x M]`; each (y, x, kh) copies one run of `Kw C` values where the dilation is 1. Reads
    `(N, *size, C)`, writes `(N, *out, M)`; workspace `e N C K^2 Ho Wo` bytes. Source: Jia, "Convolution in Caffe: a
    memo", transposed for channels-last data.
    """

    key = "im2row"
    summary = "patches stored as rows, one GEMM (channels last)"
    gemm_formula = "[Ho Wo x K^2 C]·[K^2 C x M]"
    workspace_formula = "e N C K^2 Ho Wo"
    source = "Jia, Convolution in Caffe: a memo"

    def applicable(self, problem: Problem) -> Reason | None:
        return require_conv(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        return replace(conv_axes(problem), row_bytes=problem.taps * problem.c * problem.element)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        return conv_cost(problem, tile, {"im2row": patch_bytes(problem)})

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        dims = problem.dims

        def unroll(data: te.Tensor) -> te.Tensor:
            def element(n: Any, *index: Any) -> Any:
                out, taps, c = index[:dims], index[dims:-1], index[-1]
                return read_padded(problem, data, n, window_index(problem, out, taps, padded=False), c)

            return te.compute((problem.n, *problem.out_size, *problem.kernel, problem.c), element, name="im2row")

        def gemm(rows: te.Tensor, packed: te.Tensor) -> te.Tensor:
            def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
                del n
                return rows(*at, x, *k[:-1], g * problem.c_group + k[-1])

            return conv_gemm(problem, tile, epilogue, read_a, packed)

        return (
            Stage("im2row", ("data",), unroll, "workspace"),
            pack_stage(problem, tile),
            Stage("gemm", ("im2row", "packed"), gemm, "output"),
        )
