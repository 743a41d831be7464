"""`dense`: a fully connected layer is a GEMM; for one row, a matrix-vector product bound by reading the weights."""

from __future__ import annotations

from math import sqrt

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
    ceil_div,
    no_epilogue,
    require_conv,
)
from .problem import ConvProblem, DenseProblem, Problem
from .staged import as_staged
from .tile_gemm import pack_panels, read_panels, tile_gemm
from .window import wide_bytes, wide_stage


def as_dense(problem: Problem) -> DenseProblem | None:
    """The fully connected layer that `problem` is: itself, or a convolution whose kernel covers its whole input."""
    if isinstance(problem, DenseProblem):
        return problem
    if not isinstance(problem, ConvProblem):
        return None
    covers = problem.kernel == problem.size and not problem.padded and problem.groups == 1
    if not covers:
        return None
    flat = DenseProblem(problem.n, problem.c * problem.taps, problem.m, problem.dtype)
    return as_staged(flat) if problem.staged else flat


class Dense(Lowering):
    """`Y[n, m] = sum_c X[n, c] W[m, c]`: GEMM `[N x C]·[C x M]`, no workspace.

    Reads `(n, c)` (or `(N, *size, C)` of a convolution whose kernel covers its input, flattened) and writes `(n, m)`.
    With one row it is a matrix-vector product whose time is that of reading `e C M` bytes of weights. Source: Warden
    2015, "Why GEMM is at the heart of deep learning", section "fully connected layers".
    """

    key = "dense"
    summary = "fully connected layer: GEMM, or GEMV for one row"
    gemm_formula = "[N x C]·[C x M]"
    workspace_formula = "0"
    source = "Warden 2015, Why GEMM is at the heart of deep learning"

    def applicable(self, problem: Problem) -> Reason | None:
        if as_dense(problem) is not None:
            return None
        if not isinstance(problem, ConvProblem):
            return require_conv(problem)
        kernel, size = ("x".join(map(str, v)) for v in (problem.kernel, problem.size))
        return Reason(
            f"needs a fully connected layer or one group whose kernel covers its unpadded input, "
            f"got kernel {kernel} on input {size}, groups {problem.groups}"
        )

    def axes(self, problem: Problem) -> GemmAxes:
        dense = as_dense(problem)
        assert dense is not None
        return GemmAxes(1, dense.n, dense.m, dense.c, row_bytes=dense.c * dense.moved_element)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        dense = as_dense(problem)
        assert dense is not None
        columns = ceil_div(dense.m, tile.nr) * tile.nr
        weights = dense.element * columns * dense.c
        workspace = {"wide": wide_bytes(dense)} if _copies(dense) else {}
        total = sum(workspace.values())
        return LoweringCost(
            gemms=(GemmShape(dense.n, dense.m, dense.c),),
            macs=ceil_div(dense.n, tile.mr) * tile.mr * columns * dense.c,
            bytes_moved=weights + dense.element * dense.n * (dense.c + dense.m) + 2 * total,
            workspace_bytes=total,
            weight_bytes=weights,
            error_growth=sqrt(dense.c),
            workspace=workspace,
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        dense = as_dense(problem)
        assert dense is not None

        def flat(weight: te.Tensor) -> te.Tensor:
            if isinstance(problem, DenseProblem):
                return pack_panels(weight, 1, dense.m, (dense.c,), tile.nr)
            return pack_panels(weight, 1, dense.m, (*problem.kernel, problem.c), tile.nr)

        def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            conv = isinstance(problem, ConvProblem)
            pixel = (0,) * (problem.dims if isinstance(problem, ConvProblem) else 0)
            return tile_gemm(
                outer=(),
                inner=dense.n,
                n=dense.m,
                k_extents=(*problem.kernel, problem.c) if isinstance(problem, ConvProblem) else (dense.c,),
                read_a=lambda at, x, g, n, k: data(x, *k),
                read_b=read_panels(packed),
                tile=tile,
                # The output of a convolution is (N, 1, 1, M): its epilogue is asked with that index.
                epilogue=(lambda v, index: epilogue(v, (index[0], *pixel, index[1]))) if conv else epilogue,
            )

        weight = Stage("packed", ("weight",), flat, "weight")
        if _copies(dense):
            return (wide_stage(problem), weight, Stage("gemm", ("wide", "packed"), gemm, "output"))
        return (weight, Stage("gemm", ("data", "packed"), gemm, "output"))


def _copies(dense: DenseProblem) -> bool:
    """Whether several rows stored in half precision are widened ahead of the GEMM; one row is as cheap where it is."""
    return dense.widened and dense.n > 1
