"""`direct`: the definition itself, for every case. The reference that always remains."""

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
    zero,
)
from .dense import Dense
from .problem import DenseProblem, Problem, SpatialProblem, TransposedConvProblem
from .tile_gemm import pack_panels, read_panels, tile_gemm
from .window import activation_bytes, read_padded, window_index

_DENSE = Dense()


class Direct(Lowering):
    """The convolution by its definition, padding by a condition, no workspace, any stride, dilation and groups.

        O[n, o, m] = sum_{k, c} I[n, o s + k d - p, g(m) C/g + c] W[m, k, c],  I = 0 outside
        transposed:  I[n, (o + p - k d) / s, ...] instead, 0 where that is no position of the input

    Reads `(N, *size, C)`, writes `(N, *out, M)`; a fully connected layer is `dense`. The channels of all groups form
    one
    axis, so that a depthwise layer with a multiplier, too, has a form. Source: the definition (Caffe, `Convolution`).
    """

    key = "direct"
    summary = "the definition itself; always applies"
    gemm_formula = "none"
    workspace_formula = "0"
    source = "the definition"

    def applicable(self, problem: Problem) -> Reason | None:
        del problem
        return None

    def axes(self, problem: Problem) -> GemmAxes:
        if isinstance(problem, DenseProblem):
            return _DENSE.axes(problem)
        *outer, inner = problem.out_size
        return GemmAxes(problem.n * prod(outer), inner, problem.m, problem.taps * problem.c_group)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        if isinstance(problem, DenseProblem):
            return _DENSE.cost(problem, tile)
        *outer, inner = problem.out_size
        columns, k = ceil_div(problem.m, tile.nr) * tile.nr, problem.taps * problem.c_group
        weights = problem.element * columns * k
        return LoweringCost(
            gemms=(GemmShape(problem.pixels, problem.m_group, k, problem.n * problem.groups),),
            macs=problem.n * prod(outer) * ceil_div(inner, tile.mr) * tile.mr * columns * k,
            bytes_moved=activation_bytes(problem) + weights,
            workspace_bytes=0,
            weight_bytes=weights,
            error_growth=sqrt(k),
            read_factor=(3.0 if _conditional(problem) else 1.0)
            * (8.0 if problem.groups > 1 else 1.0)
            * (2.0 if problem.widened else 1.0),
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        if isinstance(problem, DenseProblem):
            return _DENSE.build(problem, tile, epilogue)
        extents = (*problem.kernel, problem.c_group)

        def pack(weight: te.Tensor) -> te.Tensor:
            return pack_panels(weight, 1, problem.m, extents, tile.nr)

        def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            def read_a(at: tuple[Any, ...], x: Any, g: Any, m: Any, k: tuple[Any, ...]) -> Any:
                del g
                channel = _channel(problem, m, k[-1])
                if isinstance(problem, TransposedConvProblem):
                    return _read_source(problem, data, (at[0], *at[1:], x), k[:-1], channel)
                where = window_index(problem, (*at[1:], x), k[:-1], padded=False)
                return read_padded(problem, data, at[0], where, channel)

            *outer, inner = problem.out_size
            return tile_gemm(
                outer=(problem.n, *outer),
                inner=inner,
                n=problem.m,
                k_extents=extents,
                read_a=read_a,
                read_b=read_panels(packed),
                tile=tile,
                epilogue=epilogue,
            )

        return (Stage("packed", ("weight",), pack, "weight"), Stage("gemm", ("data", "packed"), gemm, "output"))


def _conditional(problem: SpatialProblem) -> bool:
    """Whether each read of the input stands under a condition."""
    return isinstance(problem, TransposedConvProblem) or problem.padded


def _read_source(
    problem: TransposedConvProblem, data: te.Tensor, out: tuple[Any, ...], taps: tuple[Any, ...], c: Any
) -> Any:
    """`I[n, i, c]` where `i s + k d = o + p` has a solution `i` in the input, else 0; `out` is `(n, *o)`."""
    where, exists = [], []
    sides = zip(out[1:], taps, problem.stride, problem.dilation, problem.pad_before, problem.size, strict=True)
    for o, k, s, d, p, size in sides:
        reach = o + p - k * d
        where.append(reach // s)
        exists += [reach >= 0, reach < s * size] + ([reach % s == 0] if s > 1 else [])
    return tirx.if_then_else(tirx.all(*exists), data(out[0], *where, c), zero(problem.accumulator))


def _channel(problem: SpatialProblem, m: Any, c: Any) -> Any:
    """The input channel that output channel `m` reads as its `c`-th; a padded panel's columns read the last group's."""
    if problem.groups == 1:
        return c
    group = m // problem.m_group if problem.m_group > 1 else m
    return tirx.min(group, problem.groups - 1) * problem.c_group + c
