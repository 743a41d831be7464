"""`im2col`: Caffe's form, patches stored as columns, channels first."""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import te, tirx

from .base import (
    Epilogue,
    GemmAxes,
    GemmShape,
    Lowering,
    LoweringCost,
    Reason,
    Stage,
    Tile,
    ceil_div,
    no_epilogue,
    require_conv,
    zero,
)
from .problem import ConvProblem, Problem
from .tile_gemm import tile_gemm
from .window import activation_bytes, read_padded, window_index


def unflatten(position: Any, extents: tuple[int, ...]) -> list[Any]:
    """The index of the row-major `position` in a tensor of shape `extents`."""
    index = []
    for d, extent in enumerate(extents):
        rest = prod(extents[d + 1 :])
        index.append(position // rest % extent if d else position // rest)
    return index


class Im2col(Lowering):
    """Patches as the columns of a matrix, `L[n, c, kh, kw, y Wo + x] = I[n, c, y s + kh d - p, x s + kw d - p]`, then
    `O[n, :, :] = W·L[n]`.

    GEMM per image and group `[M/g x C/g K^2]·[C/g K^2 x Ho Wo]`. Reads `(N, C, *size)` and writes `(N, M, *out)`:
    channels
    first, as in Caffe. The rows of L are rounded up to the register tile's width `nr`, so the workspace is
    `e N C K^2 roundup(Ho Wo, nr)` bytes. Source: Chellapilla et al. 2006; Jia, "Convolution in Caffe: a memo".
    """

    key = "im2col"
    summary = "patches stored as columns, one GEMM an image (channels first)"
    gemm_formula = "[M x C K^2]·[C K^2 x Ho Wo]"
    workspace_formula = "e N C K^2 roundup(Ho Wo, nr)"
    source = "Chellapilla et al. 2006; Jia, Convolution in Caffe: a memo"
    layout = "NCHW"

    def applicable(self, problem: Problem) -> Reason | None:
        return require_conv(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        k = problem.taps * problem.c_group
        return GemmAxes(problem.n * problem.groups, problem.m_group, problem.pixels, k)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        k = problem.taps * problem.c_group
        rows, columns = ceil_div(problem.m_group, tile.mr) * tile.mr, ceil_div(problem.pixels, tile.nr) * tile.nr
        workspace = problem.element * problem.n * problem.groups * k * columns
        weights = problem.element * problem.groups * rows * k
        return LoweringCost(
            gemms=(GemmShape(problem.m_group, problem.pixels, k, problem.n * problem.groups),),
            macs=problem.n * problem.groups * rows * columns * k,
            bytes_moved=activation_bytes(problem) + weights + 2 * workspace,
            workspace_bytes=workspace,
            weight_bytes=weights,
            error_growth=k**0.5,
            workspace={"im2col": workspace},
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        columns = ceil_div(problem.pixels, tile.nr) * tile.nr

        def unroll(data: te.Tensor) -> te.Tensor:
            def element(n: Any, c: Any, *index: Any) -> Any:
                taps, position = index[:-1], index[-1]
                where = window_index(problem, unflatten(position, problem.out_size), taps, padded=False)
                value = read_padded(problem, data, n, where, c, "NCHW")
                if columns == problem.pixels:
                    return value
                return tirx.if_then_else(position < problem.pixels, value, zero(problem.dtype))

            return te.compute((problem.n, problem.c, *problem.kernel, columns), element, name="im2col")

        return (
            Stage("im2col", ("data",), unroll, "workspace"),
            Stage("packed", ("weight",), lambda weight: _pack_rows(problem, tile, weight), "weight"),
            Stage("gemm", ("im2col", "packed"), lambda l, w: _gemm(problem, tile, epilogue, l, w), "output"),
        )


def _pack_rows(problem: ConvProblem, tile: Tile, weight: te.Tensor) -> te.Tensor:
    """Weights `(M, *kernel, C/g)` to `[g][(M/g)/mr][C/g][*kernel][mr]`: one step's `mr` elements lie side by side."""

    def element(g: Any, t: Any, c: Any, *index: Any) -> Any:
        taps, row = index[:-1], t * tile.mr + index[-1]
        value = weight(g * problem.m_group + row, *taps, c)
        if problem.m_group % tile.mr == 0:
            return value
        return tirx.if_then_else(row < problem.m_group, value, zero(problem.dtype))

    tiles = ceil_div(problem.m_group, tile.mr)
    shape = (problem.groups, tiles, problem.c_group, *problem.kernel, tile.mr)
    return te.compute(shape, element, name="packed")


def _gemm(problem: ConvProblem, tile: Tile, epilogue: Epilogue, patches: te.Tensor, packed: te.Tensor) -> te.Tensor:
    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        del g, n
        return packed(at[1], x // tile.mr, *k, x % tile.mr)

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        del g
        return patches(at[0], at[1] * problem.c_group + k[0], *k[1:], p * tile.nr + j)

    def at_output(value: Any, index: tuple[Any, ...]) -> Any:
        n, g, m, position = index
        return epilogue(value, (n, g * problem.m_group + m, *unflatten(position, problem.out_size)))

    return tile_gemm(
        outer=(problem.n, problem.groups),
        inner=problem.m_group,
        n=problem.pixels,
        k_extents=(problem.c_group, *problem.kernel),
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        epilogue=at_output,
        guard=False,
    )
