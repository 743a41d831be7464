"""`cct-balanced`: lower along the rows, lift along the columns (Caffe con Troll, type 2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod, sqrt
from operator import add
from typing import Any

import numpy as np
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
from .im2col import unflatten
from .precomp_gemm import flatten
from .problem import ConvProblem, Problem
from .tile_gemm import read_panels, tile_gemm
from .window import activation_bytes, read_padded


def _rows(problem: ConvProblem) -> tuple[int, ...]:
    """`(*Hp, Wo)`: the pixels that the GEMM runs over, every row of the padded input."""
    return (*problem.padded_size[:-1], problem.out_size[-1])


def _columns(problem: ConvProblem) -> int:
    """`Kh M/g`, the GEMM's columns a group."""
    return prod(problem.kernel[:-1]) * problem.m_group


def _depth(problem: ConvProblem) -> int:
    """`Kw C/g`, the GEMM's reduction."""
    return problem.kernel[-1] * problem.c_group


class CctBalanced(Lowering):
    """Half of the unrolling before the GEMM, half after it: patches of one row in, `Kh` partial sums out.

        L[n, h, x, kw, c]  = Ipad[n, h, x s + kw d, c]
        T[n, h, x, kh, m]  = sum_{kw, c} L[n, h, x, kw, c] W[m, kh, kw, c]         GEMM [Hp Wo x Kw C]·[Kw C x Kh M]
        O[n, y, x, m]      = sum_kh T[n, y + kh d, x, kh, m]

    Reads `(N, *size, C)`, writes `(N, *out, M)`. The GEMM is computed for each row of the padded input, once for all
    `Kh` outputs that use it: stride 1 in height wastes nothing but the rim, and is demanded; the width may be
    strided. L and T hold the whole batch: workspace `e N Hp Wo (Kw C + Kh M)` bytes. In three dimensions the
    innermost is unrolled and the sum runs over `Kd Kh` (stride 1 in both); in one dimension nothing is left to sum.
    Source: Hadjis et al. 2015, Caffe con Troll, section 3.1, "balanced" lowering, type 2 (arXiv 1504.04343).
    """

    key = "cct-balanced"
    summary = "rows unrolled before the GEMM, its results added along the columns"
    gemm_formula = "[Hp Wo x Kw C]·[Kw C x Kh M]"
    workspace_formula = "e N Hp Wo (Kw C + Kh M)"
    source = "Hadjis et al. 2015, Caffe con Troll, type 2 (arXiv 1504.04343)"
    same_macs = False  # rows of padding too

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is not None:
            return reason
        assert isinstance(problem, ConvProblem)
        if any(s != 1 for s in problem.stride[:-1]):
            found = "x".join(map(str, problem.stride))
            return Reason(f"needs stride 1 in all but the innermost dimension, got {found}")
        return None

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        row = problem.kernel[-1] * problem.c * problem.moved_element
        return GemmAxes(
            problem.n, prod(_rows(problem)), _columns(problem), _depth(problem), problem.groups, row_bytes=row
        )

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        rows, columns, depth, groups = prod(_rows(problem)), _columns(problem), _depth(problem), problem.groups
        padded_columns = ceil_div(columns, tile.nr) * tile.nr
        workspace = {
            "cct_lowered": problem.moved_element * problem.n * rows * groups * depth,
            "cct_product": problem.scratch_element * problem.n * rows * groups * columns,
        }
        weights = problem.element * groups * padded_columns * depth
        return LoweringCost(
            gemms=(GemmShape(rows, columns, depth, problem.n * groups),),
            macs=problem.n * groups * ceil_div(rows, tile.mr) * tile.mr * padded_columns * depth,
            bytes_moved=activation_bytes(problem) + weights + 2 * sum(workspace.values()),
            workspace_bytes=sum(workspace.values()),
            weight_bytes=weights,
            error_growth=sqrt(problem.taps * problem.c_group),
            workspace=workspace,
            extra_flops=problem.n * problem.pixels * problem.m * prod(problem.kernel[:-1]),
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        return (
            Stage("cct_lowered", ("data",), lambda data: _lower(problem, data), "workspace", moves=True),
            Stage("packed", ("weight",), lambda weight: _pack(problem, tile, weight), "weight"),
            Stage(
                "cct_product",
                ("cct_lowered", "packed"),
                lambda lowered, packed: _multiply(problem, tile, lowered, packed),
                "workspace",
            ),
            Stage("gemm", ("cct_product",), lambda product: _lift(problem, epilogue, product), "output"),
        )


def _lower(problem: ConvProblem, data: te.Tensor) -> te.Tensor:
    """L: `(N, *Hp, Wo, Kw, C)`."""

    def element(n: Any, *index: Any) -> Any:
        outer, (x, tap, c) = index[:-3], index[-3:]
        rows = [h - before for h, before in zip(outer, problem.pad_before[:-1], strict=True)]
        column = x * problem.stride[-1] + tap * problem.dilation[-1] - problem.pad_before[-1]
        return read_padded(problem, data, n, (*rows, column), c)

    return te.compute((problem.n, *_rows(problem), problem.kernel[-1], problem.c), element, name="cct_lowered")


def _pack(problem: ConvProblem, tile: Tile, weight: te.Tensor) -> te.Tensor:
    """`(M, *kernel, C/g)` to panels `[g][ceil(Kh M/g / nr)][Kw][C/g][nr]`; column `kh M/g + m`, zeros past the last."""
    columns = _columns(problem)

    def element(g: Any, p: Any, tap: Any, c: Any, j: Any) -> Any:
        column = p * tile.nr + j
        above = unflatten(column // problem.m_group, problem.kernel[:-1]) if problem.dims > 1 else []
        value = weight(g * problem.m_group + column % problem.m_group, *above, tap, c)
        return value if columns % tile.nr == 0 else tirx.if_then_else(column < columns, value, zero(weight.dtype))

    shape = (problem.groups, ceil_div(columns, tile.nr), problem.kernel[-1], problem.c_group, tile.nr)
    return te.compute(shape, element, name="packed")


def _multiply(problem: ConvProblem, tile: Tile, lowered: te.Tensor, packed: te.Tensor) -> te.Tensor:
    """T: `(N, Hp Wo, (g,) Kh M/g)`."""

    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        del n
        return lowered(at[0], *unflatten(x, _rows(problem)), k[0], g * problem.c_group + k[1])

    return tile_gemm(
        outer=(problem.n,),
        inner=prod(_rows(problem)),
        groups=problem.groups,
        n=_columns(problem),
        k_extents=(problem.kernel[-1], problem.c_group),
        read_a=read_a,
        read_b=read_panels(packed),
        tile=tile,
        epilogue=no_epilogue,
        name="cct_product",
    )


def _lift(problem: ConvProblem, epilogue: Epilogue, product: te.Tensor) -> te.Tensor:
    """`O[n, y, x, m] = sum_kh T[n, y + kh d, x, kh, m]`, the sum written out so that it stays in one register."""
    above, rows = problem.kernel[:-1], _rows(problem)

    def element(n: Any, *index: Any) -> Any:
        out, x, m = index[:-2], index[-2], index[-1]

        def partial(tap: Sequence[int]) -> Any:
            where = [o + t * d for o, t, d in zip(out, tap, problem.dilation[:-1], strict=True)]
            pixel = flatten((*where, x), rows)
            column = int(flatten(tap, above)) * problem.m_group
            if problem.groups == 1:
                return product(n, pixel, column + m)
            return product(n, pixel, m // problem.m_group, column + m % problem.m_group)

        return epilogue(reduce(add, [partial(tap) for tap in np.ndindex(*above)]), (n, *index))

    return te.compute((problem.n, *problem.out_size, problem.m), element, name="gemm")
