"""`im2row`: store every patch as a row, then one GEMM (channels last)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import te

from .base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, no_epilogue, require_conv
from .copied import COPY_ANNOTATION, SHARED, in_shared_block
from .implicit_gemm import conv_axes, conv_cost, conv_gemm, pack_stage
from .problem import ConvProblem, Problem
from .window import read_padded, window_index


def patch_bytes(problem: ConvProblem) -> int:
    """Bytes of the patches of one image: `e C K^2 Ho Wo`."""
    return problem.moved_element * problem.c * problem.taps * problem.pixels


def patch_row_bytes(problem: ConvProblem) -> int:
    """Bytes of one patch, a row of the matrix: `e C K^2`."""
    return problem.moved_element * problem.c * problem.taps


class Im2row(Lowering):
    """Patches as the rows of a matrix, `R[y, x, kh, kw, c] = I[n, y s + kh d - p, x s + kw d - p, c]` of one image
    after another, then `O[n, y, x, :] = R[y, x, :]·W'`.

    GEMM `[Ho Wo x K^2 C]·[K^2 C x M]`; each (y, x, kh) copies one run of `Kw C` values where the dilation is 1. Reads
    `(N, *size, C)`, writes `(N, *out, M)`; scratch `e C K^2 Ho Wo` bytes: a workspace for one image, and for a batch a
    buffer of the kernel, which all threads fill and then multiply, image after image (staged: a workspace of the whole
    batch). With groups the patches hold all `C` channels, not `C/g`. Source: Jia, "Convolution in Caffe: a memo",
    transposed for channels-last data.
    """

    key = "im2row"
    summary = "patches stored as rows, one GEMM (channels last)"
    gemm_formula = "[Ho Wo x K^2 C]·[K^2 C x M]"
    workspace_formula = "e C K^2 Ho Wo, the same buffer for every image"
    source = "Jia, Convolution in Caffe: a memo"

    def applicable(self, problem: Problem) -> Reason | None:
        return require_conv(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        return replace(conv_axes(problem), row_bytes=patch_row_bytes(problem))

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        size = patch_bytes(problem)
        if problem.n == 1 or problem.staged:
            return conv_cost(problem, tile, {"im2row": problem.n * size})
        return in_shared_block(conv_cost(problem, tile, {}), problem.n * size // problem.scratch_element, size)

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)

        def multiply(rows: te.Tensor, packed: te.Tensor) -> te.Tensor:
            def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
                del n
                return rows(*at, x, *k[:-1], g * problem.c_group + k[-1])

            return conv_gemm(problem, tile, epilogue, read_a, packed)

        weight = pack_stage(problem, tile)
        if problem.n == 1 or problem.staged:
            return (
                Stage("im2row", ("data",), lambda data: _unroll(problem, data, None), "workspace", moves=True),
                weight,
                Stage("gemm", ("im2row", "packed"), multiply, "output"),
            )

        def whole(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            return multiply(_unroll(problem, data, {COPY_ANNOTATION: SHARED}), packed)

        return (weight, Stage("gemm", ("data", "packed"), whole, "output"))


def _unroll(problem: ConvProblem, data: te.Tensor, attrs: dict[str, str] | None) -> te.Tensor:
    """`R`: `(N, *out, *kernel, C)`."""
    dims = problem.dims

    def element(n: Any, *index: Any) -> Any:
        out, taps, c = index[:dims], index[dims:-1], index[-1]
        return read_padded(problem, data, n, window_index(problem, out, taps, padded=False), c)

    shape = (problem.n, *problem.out_size, *problem.kernel, problem.c)
    return te.compute(shape, element, name="im2row", attrs=attrs)
