"""`kn2row`: the products of every kernel position in one GEMM, then a shifted sum (channels first)."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from tvm import te, tirx

from .base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, ceil_div, dtype_of, no_epilogue, zero
from .im2col import unflatten
from .implicit_gemm import pack_stage, packed_bytes
from .kn2col import product_bytes
from .problem import ConvProblem, Problem
from .shift_add import inside, sum_attributes, tap_cost, taps_of, unit_stride
from .tile_gemm import tile_gemm
from .window import window_index


class Kn2row(Lowering[Problem]):
    """Every tap's product with the whole input, then their shifted sum:

        T[kh, kw, n, m, y, x] = sum_c W[m, kh, kw, c] I[n, c, y, x]              [K^2 M x C]·[C x H W] an image
        O[n, m, y, x] = sum_(kh,kw) T[kh, kw, n, m, y + kh d - p, x + kw d - p]  where that lies in the image

    Nothing is padded. Reads `(N, C, *size)`, writes `(N, M, *out)`; T of the whole batch takes `e N K^2 M H W` bytes.
    The input is first laid out in panels of `nr` pixels, `e N C roundup(H W, nr)` bytes more than the paper needs:
    with it the GEMM of 256 channels of 56x56 took 28.4 ms and 32.4 ms without, by one measurement each. Source:
    Vasudevan et al. 2017, "Parallel multi channel convolution using general matrix multiplication" (arXiv 1704.04428).
    """

    key = "kn2row"
    summary = "products of all kernel positions in one GEMM, then shift-add (channels first)"
    gemm_formula = "[K^2 M x C]·[C x H W], then shift-add"
    workspace_formula = "e N (K^2 M H W + C roundup(H W, nr))"
    source = "Vasudevan et al. 2017 (arXiv 1704.04428)"
    layout = "NCHW"

    def applicable(self, problem: Problem) -> Reason | None:
        return unit_stride(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        outer = problem.taps * problem.n * problem.groups
        return GemmAxes(outer, problem.m_group, prod(problem.size), problem.c_group)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        columns = ceil_div(prod(problem.size), tile.nr) * tile.nr
        panels = problem.moved_element * problem.n * problem.c * columns
        workspace = {"panels": panels, "product": product_bytes(problem)}
        cost = tap_cost(problem, Tile(1, tile.mr), passes=3, workspace=workspace)
        pixels = ceil_div(prod(problem.size), tile.nr)
        tasks = problem.taps * problem.n * problem.groups * pixels * ceil_div(problem.m_group, tile.mr)
        weights = packed_bytes(problem, Tile(1, tile.mr)) // problem.element * problem.moved_element
        moved = cost.bytes_moved + weights - cost.weight_bytes
        return replace(cost, weight_bytes=weights, bytes_moved=moved, tasks=tasks)

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        return (
            # A, which is read one by one.
            replace(pack_stage(problem, Tile(1, tile.mr)), wide=not problem.staged),
            Stage("panels", ("data",), lambda data: _panels(problem, tile, data), "workspace", moves=True),
            Stage("product", ("panels", "packed"), lambda i, w: _multiply(problem, tile, i, w), "workspace"),
            Stage("sum", ("product",), lambda t: _sum(problem, t, epilogue), "output"),
        )


def _panels(problem: ConvProblem, tile: Tile, data: te.Tensor) -> te.Tensor:
    """`(N, C, *size)` to `[n][ceil(H W / nr)][C][nr]`, zeros past the last pixel."""
    pixels = prod(problem.size)

    def element(n: Any, p: Any, c: Any, j: Any) -> Any:
        pixel = p * tile.nr + j
        value = data(n, c, *unflatten(pixel, problem.size))
        return value if pixels % tile.nr == 0 else tirx.if_then_else(pixel < pixels, value, zero(dtype_of(value)))

    return te.compute((problem.n, ceil_div(pixels, tile.nr), problem.c, tile.nr), element, name="panels")


def _multiply(problem: ConvProblem, tile: Tile, data: te.Tensor, packed: te.Tensor) -> te.Tensor:
    """`T[*taps, n, g, m, pixel]`; a panel of A is `mr` rows of one tap and group."""
    dims = problem.dims

    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        del g, n
        return packed(at[-1], x // tile.mr, *at[:dims], k[0], x % tile.mr)

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        del g
        return data(at[dims], p, at[-1] * problem.c_group + k[0], j)

    return tile_gemm(
        outer=(*problem.kernel, problem.n, problem.groups),
        inner=problem.m_group,
        n=prod(problem.size),
        k_extents=(problem.c_group,),
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        epilogue=lambda value, index: value,
        guard=False,
        name="product",
    )


def _sum(problem: ConvProblem, products: te.Tensor, epilogue: Epilogue) -> te.Tensor:
    """`O[n, m, *out]` from `_multiply`'s T."""
    dims, per_group = problem.dims, problem.m_group

    def pixel(*index: Any) -> Any:
        flat: Any = 0
        for i, size in zip(index[-dims:], problem.size, strict=True):
            flat = flat * size + i
        return products(*index[: dims + 1], index[dims + 1] // per_group, index[dims + 1] % per_group, flat)

    view = te.compute((*problem.kernel, problem.n, problem.m, *problem.size), pixel, name="pixels")
    taps = taps_of(problem)

    def element(n: Any, m: Any, *out: Any) -> Any:
        where = window_index(problem, out, taps, padded=False)
        return te.sum(inside(problem, where, view(*taps, n, m, *where)), axis=taps)

    total = te.compute(
        (problem.n, problem.m, *problem.out_size),
        element,
        name="total",
        attrs=sum_attributes(problem, "oo" + "r" * (dims - 1) + "j", "all"),
    )
    return te.compute(total.shape, lambda *index: epilogue(total(*index), index), name="sum")
