"""`depthwise`: one filter a channel, vectorised over the channels."""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

from tvm import te

from .base import (
    Epilogue,
    GemmAxes,
    GemmShape,
    Lowering,
    LoweringCost,
    Reason,
    Stage,
    Tile,
    no_epilogue,
    require_conv,
)
from .problem import ConvProblem, Problem
from .tile_gemm import pack_panels, read_panels, tile_gemm
from .window import activation_bytes, read_padded, window_index


class Depthwise(Lowering):
    """`O[n, o, c] = sum_k I[n, o s + k d - p, c] W[c, k]` for `g = C = M`: its GEMM is a matrix-vector product.

    A register tile of `mr` pixels by `nr` channels; both operands are read as vectors along the channels. Reads
    `(N, *size, C)` and writes `(N, *out, C)`. Padding is a condition a pixel and tap, for a whole vector of
    channels: that
    costs less than copying the input, and takes no workspace. Source: Howard et al.
    2017, MobileNets, section 3.1 (arXiv 1704.04861).
    """

    key = "depthwise"
    summary = "one filter a channel, vectorised over channels"
    gemm_formula = "none (matrix-vector)"
    workspace_formula = "0"
    source = "Howard et al. 2017, MobileNets, section 3.1 (arXiv 1704.04861)"

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is not None:
            return reason
        assert isinstance(problem, ConvProblem)
        if not (problem.groups == problem.c == problem.m):
            return Reason(f"needs groups = C = M, got groups {problem.groups}, C {problem.c}, M {problem.m}")
        return None

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        *outer, inner = problem.out_size
        return GemmAxes(problem.n * prod(outer), inner, problem.c, problem.taps, vector_a=True, nr_divides=True)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        *outer, inner = problem.out_size
        weights = problem.element * problem.c * problem.taps
        return LoweringCost(
            gemms=(GemmShape(problem.pixels, 1, problem.taps, problem.n * problem.groups),),
            macs=problem.n * prod(outer) * -(-inner // tile.mr) * tile.mr * problem.c * problem.taps,
            bytes_moved=activation_bytes(problem) + weights,
            workspace_bytes=0,
            weight_bytes=weights,
            error_growth=sqrt(problem.taps),
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        *outer, inner = problem.out_size

        def pack(weight: te.Tensor) -> te.Tensor:
            return pack_panels(weight, 1, problem.c, (*problem.kernel, 1), tile.nr)

        def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            def read_a(at: tuple[Any, ...], x: Any, g: Any, channel: Any, k: tuple[Any, ...]) -> Any:
                del g
                where = window_index(problem, (*at[1:], x), k[:-1], padded=False)
                return read_padded(problem, data, at[0], where, channel)

            return tile_gemm(
                outer=(problem.n, *outer),
                inner=inner,
                n=problem.c,
                k_extents=(*problem.kernel, 1),
                read_a=read_a,
                read_b=read_panels(packed),
                tile=tile,
                epilogue=epilogue,
            )

        return (
            Stage("packed", ("weight",), pack, "weight"),
            Stage("gemm", ("data", "packed"), gemm, "output"),
        )
