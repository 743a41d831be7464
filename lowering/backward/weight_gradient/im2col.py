"""`im2col` of the weight gradient: Caffe's form, the output gradient times the stored patches."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

from tvm import te, tirx

from ...base import (
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
from ...gradient_problem import WeightGradientProblem
from ...im2col import unflatten
from ...tile_gemm import tile_gemm
from ...window import activation_bytes, read_padded, window_index
from ..require import require_gradient
from ..split import VECTOR_BYTES, at_once, by_tap, partial_bytes, pixel, split_of, sum_stage


class Im2col(Lowering[WeightGradientProblem]):
    """`dW = dO^T·R`: the patches of every output pixel stored as the rows of a matrix R.

        R[(n, y, x), (kh, kw, c)] = I[n, y s + kh d - p, x s + kw d - p, c]
        P[s, m, (kh, kw, c)]      = sum_{(n, y, x) in chunk s} dO[n, y, x, m] R[(n, y, x), (kh, kw, c)]
        dW[m, kh, kw, c]          = sum_s P[s, m, (kh, kw, c)]

    GEMM a group `[M/g x N Ho Wo]·[N Ho Wo x K^2 C/g]`. Reads `data` = dO `(N, *out, M)` and `input` = I
    `(N, *size, C)`, writes `(M, *kernel, C/g)`. Where the channels of a group fill panels of the register tile's width,
    R is stored panel by panel, `e N Ho Wo K^2 g roundup(C/g, nr)` bytes; else row by row, `e (N Ho Wo + z) K^2 C`:
    `z` rows more than there are patches, so that whole panels can be read. The S partial sums take
    `e S M K^2 C/g`, or none where one chunk and one group write the gradient at once. Source:
    Chellapilla et al. 2006, section 3 (the backward pass unrolled as the forward one is); Jia, "Convolution in Caffe: a
    memo".
    """

    key = "im2col"
    summary = "output gradient times stored patches, the reduction in chunks"
    gemm_formula = "[M x N Ho Wo]·[N Ho Wo x K^2 C]"
    workspace_formula = (
        "e N Ho Wo K^2 roundup(C, nr) + e S M K^2 C (0 where S = 1); few channels: e (N Ho Wo + z) K^2 C + ..."
    )
    source = "Chellapilla et al. 2006, section 3; Jia, Convolution in Caffe: a memo"

    def applicable(self, problem: WeightGradientProblem) -> Reason | None:
        return require_gradient(problem, WeightGradientProblem)

    def axes(self, problem: WeightGradientProblem) -> GemmAxes:
        conv, split = problem.conv, split_of(problem)
        if _in_panels(problem):
            return GemmAxes(split.chunks * conv.taps, conv.m_group, conv.c_group, split.pixels, conv.groups)
        return GemmAxes(split.chunks, conv.m_group, conv.taps * conv.c_group, split.pixels, conv.groups)

    def cost(self, problem: WeightGradientProblem, tile: Tile) -> LoweringCost:
        conv, calls, n = problem.conv, 1, problem.conv.taps * problem.conv.c_group
        if _in_panels(problem):
            calls, n = conv.taps, conv.c_group
        rows, columns = (ceil_div(size, step) * step for size, step in ((conv.m_group, tile.mr), (n, tile.nr)))
        pixels = problem.reduction if _in_panels(problem) else problem.reduction + _spare_rows(problem, tile)
        stored = pixels * calls * columns if _in_panels(problem) else pixels * n
        workspace = {"im2col": problem.element * conv.groups * stored, "partial": partial_bytes(problem)}
        if _at_once(problem):
            del workspace["partial"]
        total = sum(workspace.values())
        return LoweringCost(
            gemms=(GemmShape(conv.m_group, conv.taps * conv.c_group, problem.reduction, conv.groups),),
            macs=calls * conv.groups * rows * columns * problem.reduction,
            bytes_moved=activation_bytes(conv) + problem.element * prod(problem.weight_size()) + 2 * total,
            workspace_bytes=total,
            weight_bytes=0,
            error_growth=sqrt(problem.reduction),
            workspace=workspace,
            extra_flops=split_of(problem).chunks * prod(problem.weight_size()),
        )

    def build(self, problem: WeightGradientProblem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        def multiply(gradient: te.Tensor, rows: te.Tensor) -> te.Tensor:
            return _multiply(problem, tile, epilogue, gradient, rows)

        unroll = Stage("im2col", ("input",), lambda given: _unroll(problem, tile, given), "workspace")
        if _at_once(problem):
            return (unroll, Stage("gemm", ("data", "im2col"), multiply, "output"))
        return (
            unroll,
            Stage("partial", ("data", "im2col"), multiply, "workspace"),
            sum_stage(problem, lambda m, taps, c: _element_at(problem, m, taps, c), epilogue),
        )


def _in_panels(problem: WeightGradientProblem) -> bool:
    """Whether a panel holds channels of one tap: where at most one vector in eight would be zeros."""
    lanes = VECTOR_BYTES // problem.element
    return 8 * problem.conv.c_group >= 7 * ceil_div(problem.conv.c_group, lanes) * lanes


def _at_once(problem: WeightGradientProblem) -> bool:
    return _in_panels(problem) and at_once(problem)


def _unroll(problem: WeightGradientProblem, tile: Tile, given: te.Tensor) -> te.Tensor:
    """R, `(g, *kernel, (C/g)/nr, N, *out, nr)` in panels, or `(N Ho Wo + 1, g, *kernel, C/g)` in rows."""
    conv, dims = problem.conv, problem.conv.dims

    def patch(n: Any, out: Sequence[Any], taps: Sequence[Any], channel: Any) -> Any:
        def read(n: Any, *at: Any) -> Any:
            return given(*pixel(problem, n, at[:-1]), at[-1])

        return read_padded(conv, read, n, window_index(conv, out, taps, padded=False), channel)

    def in_panels(g: Any, *index: Any) -> Any:
        taps, p, n, out = index[:dims], index[dims], index[dims + 1], index[dims + 2 : -1]
        c = p * tile.nr + index[-1]
        value = patch(n, out, taps, g * conv.c_group + c)
        return value if conv.c_group % tile.nr == 0 else tirx.if_then_else(c < conv.c_group, value, zero(conv.dtype))

    def in_rows(row: Any, g: Any, *index: Any) -> Any:
        n, *out = unflatten(tirx.min(row, problem.reduction - 1), (conv.n, *conv.out_size))
        return patch(n, out, index[:-1], g * conv.c_group + index[-1])

    if _in_panels(problem):
        shape = (conv.groups, *conv.kernel, ceil_div(conv.c_group, tile.nr), conv.n, *conv.out_size, tile.nr)
        return te.compute(shape, in_panels, name="im2col")
    rows = problem.reduction + _spare_rows(problem, tile)
    return te.compute((rows, conv.groups, *conv.kernel, conv.c_group), in_rows, name="im2col")


def _spare_rows(problem: WeightGradientProblem, tile: Tile) -> int:
    """Rows behind the last patch, as many as the last panel of its last group reaches over."""
    columns = problem.conv.taps * problem.conv.c_group
    return ceil_div(ceil_div(columns, tile.nr) * tile.nr - columns, problem.conv.groups * columns)


def _multiply(
    problem: WeightGradientProblem, tile: Tile, epilogue: Epilogue, gradient: te.Tensor, rows: te.Tensor
) -> te.Tensor:
    """The partial sums, `(S, *kernel, M/g, [g,] C/g)` or `(S, M/g, [g,] K^2 C/g)`, or at once the gradient."""
    conv, split = problem.conv, split_of(problem)

    def read_a(at: tuple[Any, ...], x: Any, g: Any, column: Any, k: tuple[Any, ...]) -> Any:
        del column
        n, out = split.position(at[0], k)
        return gradient(*pixel(problem, n, out), g * conv.m_group + x)

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        if _in_panels(problem):
            n, out = split.position(at[0], k)
            return rows(g, *at[1:], p, n, *out, j)
        # Past the last column lies the next row: what such a column sums up is never stored.
        return rows(split.pixel(at[0], k), g, *unflatten(p * tile.nr + j, (*conv.kernel, conv.c_group)))

    order, finish = by_tap(problem, epilogue) if _at_once(problem) else (None, no_epilogue)
    return tile_gemm(
        outer=(split.chunks, *(conv.kernel if _in_panels(problem) else ())),
        inner=conv.m_group,
        groups=conv.groups,
        n=conv.c_group if _in_panels(problem) else conv.taps * conv.c_group,
        k_extents=split.extents,
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        epilogue=finish,
        order=order,
        name="gemm" if _at_once(problem) else "partial",
    )


def _element_at(problem: WeightGradientProblem, m: Any, taps: Sequence[Any], c: Any) -> tuple[Any, ...]:
    """Where the partial sums hold `dW[m, taps, c]`, behind the chunk."""
    conv = problem.conv
    group = (m // conv.m_group,) if conv.groups > 1 else ()
    if _in_panels(problem):
        return (*taps, m % conv.m_group, *group, c)
    column: Any = 0
    for position, extent in zip((*taps, c), (*conv.kernel, conv.c_group), strict=True):
        column = column * extent + position
    return (m % conv.m_group, *group, column)
