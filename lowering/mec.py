"""`mec`: memory-efficient convolution, only the rows unrolled, the patches overlapping views of them."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from tvm import te

from .base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, no_epilogue, require_conv
from .implicit_gemm import conv_axes, conv_cost, conv_gemm, pack_stage
from .problem import ConvProblem, Problem
from .window import read_padded, window_index


def strip_shape(problem: ConvProblem) -> tuple[int, ...]:
    """`(N, Wo, *Hp, Kw, C)`: for each output column the padded input's strip of width `Kw` that it looks at."""
    return (problem.n, problem.out_size[-1], *problem.padded_size[:-1], problem.kernel[-1], problem.c)


class Mec(Lowering):
    """Convolution whose patches overlap in memory: the input is unrolled along its rows only.

        L[n, x, h, kw, c] = Ipad[n, h, x s + kw d, c]
        O[n, y, x, m] = sum_{kh, kw, c} L[n, x, y s + kh d, kw, c] W[m, kh, kw, c]
        GEMM for each output row y: [Wo x Kh Kw C]·[Kh Kw C x M], one a group

    Row `x` of that GEMM begins `y s Kw C` elements into `L[n, x]` and takes `Kh Kw C` in a row: neighbouring `y` share
    all but `s Kw C` of them, where im2row would store each again. With a dilated height the row falls into `Kh` runs of
    `Kw C`, `d Kw C` apart: still an address, so any stride and dilation will do. In one dimension there is nothing to
    share and L is im2row's matrix; in three the innermost is unrolled and the two others overlap,
    `L[n, x, z, h, kw, c]`. Reads `(N, *size, C)`, writes `(N, *out, M)`; workspace `e N Wo Hp Kw C` bytes (Hp becomes
    Dp Hp). Zeros of the padding are written into L, the input is not copied apart. Source: Cho & Brand 2017, section
    3.2, algorithm 2 (arXiv 1706.06873).
    """

    key = "mec"
    summary = "rows unrolled once, patches as overlapping views of them"
    gemm_formula = "Ho x [Wo x Kh Kw C]·[Kh Kw C x M]"
    workspace_formula = "e N Wo Hp Kw C"
    source = "Cho & Brand 2017, MEC, section 3.2, algorithm 2 (arXiv 1706.06873)"

    def applicable(self, problem: Problem) -> Reason | None:
        return require_conv(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        return replace(conv_axes(problem), row_bytes=prod(strip_shape(problem)[2:]) * problem.moved_element)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        return conv_cost(problem, tile, {"mec": prod(strip_shape(problem)) * problem.moved_element})

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)

        def unroll(data: te.Tensor) -> te.Tensor:
            def element(n: Any, x: Any, *index: Any) -> Any:
                outer, tap, c = index[:-2], index[-2], index[-1]
                # The outer positions count in the padded input already; the innermost is a window's.
                rows = [h - before for h, before in zip(outer, problem.pad_before[:-1], strict=True)]
                column = x * problem.stride[-1] + tap * problem.dilation[-1] - problem.pad_before[-1]
                return read_padded(problem, data, n, (*rows, column), c)

            return te.compute(strip_shape(problem), element, name="mec")

        def gemm(strips: te.Tensor, packed: te.Tensor) -> te.Tensor:
            def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
                del n
                *rows, _ = window_index(problem, (*at[1:], x), k[:-1])
                return strips(at[0], x, *rows, k[-2], g * problem.c_group + k[-1])

            return conv_gemm(problem, tile, epilogue, read_a, packed)

        return (
            Stage("mec", ("data",), unroll, "workspace", moves=True),
            pack_stage(problem, tile),
            Stage("gemm", ("mec", "packed"), gemm, "output"),
        )
