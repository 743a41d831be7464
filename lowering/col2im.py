"""`col2im`: a transposed convolution as one GEMM, whose products are then added where they belong."""

from __future__ import annotations

from math import prod, sqrt
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
    require_transposed,
    zero,
)
from .im2col import unflatten
from .phases import phases_of
from .problem import Problem, TransposedConvProblem
from .tile_gemm import read_panels, tile_gemm
from .window import activation_bytes, wide_bytes, wide_stage


class Col2im(Lowering):
    """Every product of the layer, then their sums: Caffe's backward pass of a convolution.

        col[n, i, k, m] = sum_c I[n, i, c] W[m, c, k]
        O[n, s j + r, m] = sum_u col[n, j + base(r) - u rise, first(r) + u step, m]      (`phases`)

    GEMM `[N H W x C]·[C x K^2 M]` (with groups `[N H W x C/g]·[C/g x K^2 M/g]` each), no multiplication wasted on what
    stride or dilation skip. The scatter is written as the equivalent gather: each output element adds the taps that hit
    it, so that it is written once, with the epilogue, and threads never meet. Reads `(N, *size, C)`, writes
    `(N, *out, M)`; workspace `e N M K^2 H W` bytes. Source: Jia, "Convolution in Caffe: a memo" (the backward pass);
    Chellapilla et al. 2006, section 3.
    """

    key = "col2im"
    summary = "transposed convolution: all products in one GEMM, then added where they belong"
    gemm_formula = "[N H W x C]·[C x K^2 M]"
    workspace_formula = "e N M K^2 H W"
    source = "Jia, Convolution in Caffe: a memo; Chellapilla et al. 2006, section 3"

    def applicable(self, problem: Problem) -> Reason | None:
        return require_transposed(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, TransposedConvProblem)
        rows, columns = problem.n * problem.in_pixels, problem.taps * problem.m_group
        row_bytes = problem.c * problem.scratch_element
        return GemmAxes(1, rows, columns, problem.c_group, problem.groups, row_bytes=row_bytes)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, TransposedConvProblem)
        rows, columns = problem.n * problem.in_pixels, problem.taps * problem.m_group
        padded = problem.groups * ceil_div(columns, tile.nr) * tile.nr
        weights = problem.element * padded * problem.c_group
        workspace = {"wide": wide_bytes(problem)} if problem.widened else {}
        workspace["col"] = problem.scratch_element * problem.m * problem.taps * rows
        total = sum(workspace.values())
        terms = prod(p.taps for p in phases_of(problem))
        return LoweringCost(
            gemms=(GemmShape(rows, columns, problem.c_group, problem.groups),),
            macs=ceil_div(rows, tile.mr) * tile.mr * padded * problem.c_group,
            bytes_moved=activation_bytes(problem) + weights + 2 * total,
            workspace_bytes=total,
            weight_bytes=weights,
            error_growth=sqrt(problem.c_group * terms),
            workspace=workspace,
            extra_flops=problem.n * problem.pixels * problem.m * terms,
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, TransposedConvProblem)
        first, source = ((wide_stage(problem),), "wide") if problem.widened else ((), "data")
        return (
            *first,
            Stage("packed", ("weight",), lambda weight: _pack(problem, tile, weight), "weight"),
            Stage("col", (source, "packed"), lambda data, packed: _multiply(problem, tile, data, packed), "workspace"),
            Stage("col2im", ("col",), lambda col: _gather(problem, epilogue, col), "output"),
        )


def _pack(problem: TransposedConvProblem, tile: Tile, weight: te.Tensor) -> te.Tensor:
    """Weights `(M, *kernel, C/g)` to panels `[g][(K^2 M/g)/nr][C/g][nr]`, a column of the GEMM being (tap, m)."""
    columns = problem.taps * problem.m_group

    def element(g: Any, p: Any, c: Any, j: Any) -> Any:
        column = p * tile.nr + j
        taps = unflatten(column // problem.m_group, problem.kernel)
        value = weight(g * problem.m_group + column % problem.m_group, *taps, c)
        return value if columns % tile.nr == 0 else tirx.if_then_else(column < columns, value, zero(problem.dtype))

    shape = (problem.groups, ceil_div(columns, tile.nr), problem.c_group, tile.nr)
    return te.compute(shape, element, name="packed")


def _multiply(problem: TransposedConvProblem, tile: Tile, data: te.Tensor, packed: te.Tensor) -> te.Tensor:
    """`col`: `(N H W, (g,) K^2 M/g)`."""
    pixels = (problem.n, *problem.size)

    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        del at, n
        return data(*unflatten(x, pixels), g * problem.c_group + k[0])

    return tile_gemm(
        outer=(),
        inner=prod(pixels),
        groups=problem.groups,
        n=problem.taps * problem.m_group,
        k_extents=(problem.c_group,),
        read_a=read_a,
        read_b=read_panels(packed),
        tile=tile,
        epilogue=no_epilogue,
        name="col",
    )


def _gather(problem: TransposedConvProblem, epilogue: Epilogue, col: te.Tensor) -> te.Tensor:
    """`(N, *out, M)`: the sum of the products that belong to each element, then its epilogue."""
    phases = phases_of(problem)
    u = [te.reduce_axis((0, p.taps), name=f"u{d}") for d, p in enumerate(phases)]
    shape = (problem.n, *problem.out_size, problem.m)

    def term(n: Any, *index: Any) -> Any:
        pixel, tap, exists = n, 0, []
        for d, p in enumerate(phases):
            phase, position = index[d] % p.stride, index[d] // p.stride
            where = p.where(phase, u[d], position)
            exists += [*p.exists(phase, u[d]), *_inside(p.size, where, p.reach)]
            pixel, tap = pixel * p.size + where, tap * p.kernel + p.tap(phase, u[d])
        column = tap * problem.m_group
        at: tuple[Any, ...] = (pixel, column + index[-1])
        if problem.groups > 1:
            at = (pixel, index[-1] // problem.m_group, column + index[-1] % problem.m_group)
        value = col(*at)
        value = tirx.if_then_else(tirx.all(*exists), value, zero(problem.accumulator)) if exists else value
        return te.sum(value, axis=u)

    total = te.compute(shape, term, name="col2im_sum")
    return te.compute(shape, lambda *i: epilogue(total(*i), tuple(i)), name="col2im")


def _inside(size: int, where: Any, reach: tuple[int, int]) -> list[Any]:
    return ([where >= 0] if reach[0] else []) + ([where < size] if reach[1] else [])
