"""`kn2col`: the products of every kernel position in one GEMM, then a shifted sum (channels last)."""

from __future__ import annotations

from math import prod

from tvm import te

from .base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, no_epilogue
from .implicit_gemm import pack_stage
from .problem import ConvProblem, Problem
from .shift_add import shifted_sum, tap_axes, tap_cost, tap_products, unit_stride
from .window import wide_bytes, wide_stage


def product_bytes(problem: ConvProblem) -> int:
    """Bytes of the products of every tap and image: `e N K^2 M H W`."""
    return problem.scratch_element * problem.n * problem.taps * problem.m * prod(problem.size)


class Kn2col(Lowering[Problem]):
    """Every tap's product with the whole input, then their shifted sum:

        T[n, y, kh, kw, x, m] = sum_c I[n, y, x, c] W[m, kh, kw, c]              [N H W x C]·[C x K^2 M]
        O[n, y, x, m] = sum_(kh,kw) T[n, y + kh d - p, kh, kw, x + kw d - p, m]  where that lies in the image

    Nothing is copied and nothing is padded: what grows is the output side. Reads `(N, *size, C)`, writes
    `(N, *out, M)`; T of the whole batch takes `e N K^2 M H W` bytes: a row of the input goes through all taps while it
    is in the cache, and the sum reads whole rows. Source: Vasudevan et al. 2017, "Parallel multi channel convolution
    using general matrix multiplication" (arXiv 1704.04428).
    """

    key = "kn2col"
    summary = "products of all kernel positions in one GEMM, then shift-add (channels last)"
    gemm_formula = "[H W x C]·[C x K^2 M], then shift-add"
    workspace_formula = "e N K^2 M H W"
    source = "Vasudevan et al. 2017 (arXiv 1704.04428)"

    def applicable(self, problem: Problem) -> Reason | None:
        return unit_stride(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        return tap_axes(problem)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        return kn2col_cost(problem, tile)

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        return kn2col_stages(problem, tile, epilogue)


def kn2col_cost(problem: ConvProblem, tile: Tile) -> LoweringCost:
    """The cost of `kn2col_stages`."""
    wide = {"wide": wide_bytes(problem)} if problem.widened else {}
    return tap_cost(problem, tile, passes=3, workspace={**wide, "product": product_bytes(problem)})


def kn2col_stages(problem: ConvProblem, tile: Tile, epilogue: Epilogue) -> tuple[Stage, ...]:
    """T of the whole batch and every tap as a workspace, then the shifted sum."""

    def multiply(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
        return tap_products(problem, tile, data, packed)

    first, source = ((wide_stage(problem),), "wide") if problem.widened else ((), "data")
    return (
        *first,
        pack_stage(problem, tile),
        Stage("product", (source, "packed"), multiply, "workspace"),
        Stage("sum", ("product",), lambda t: shifted_sum(problem, t, epilogue, hold="all"), "output"),
    )
