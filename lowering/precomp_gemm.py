"""`precomp-gemm`: implicit GEMM with the offsets of its taps read from a table that is built at compile time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from tvm import te

from .base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, no_epilogue, require_conv
from .im2col import unflatten
from .implicit_gemm import conv_axes, conv_cost, pack_stage
from .problem import ConvProblem, Problem
from .tile_gemm import tile_gemm
from .window import copies_input, pad_bytes, pad_stage

OFFSET = "int32"
OFFSET_BYTES = 4


def flatten(index: Sequence[Any], extents: Sequence[int]) -> Any:
    """The row-major position of `index` in a tensor of shape `extents`: the inverse of `unflatten`."""
    position: Any = 0
    for i, extent in zip(index, extents, strict=True):
        position = position * extent + i
    return position


def require_offsets(problem: ConvProblem) -> Reason | None:
    """The reason of a lowering whose table cannot hold the positions of one padded image."""
    elements = problem.c * prod(problem.padded_size)
    if elements < 2**31:
        return None
    return Reason(f"needs offsets of 32 bits, fewer than 2^31 elements an image, got {elements}")


def table_stage(problem: ConvProblem) -> Stage:
    """`offset[kh Kw + kw] = kh d Wp + kw d`, in pixels of the padded image: `4 K^2` bytes, known at compile time."""

    def compute() -> te.Tensor:
        def element(tap: Any) -> Any:
            taps = unflatten(tap, problem.kernel)
            return flatten([t * d for t, d in zip(taps, problem.dilation, strict=True)], problem.padded_size)

        return te.compute((problem.taps,), lambda tap: element(tap).astype(OFFSET), name="offsets")

    return Stage("offsets", (), compute, "weight")


class PrecompGemm(Lowering):
    """`implicit-gemm` whose inner address is one addition: the offset of each tap comes from a table.

        offset[k] = flat(k d)                                                 k = (kh, kw), built at compile time
        O[n, o, m] = sum_{k, c} Ipad[n, flat(o s) + offset[k], c] W[m, k, c]
        GEMM: m = Ho Wo (per image), n = M/g, k = K^2 C/g, one a group

    `flat` is the row-major position of a pixel in the padded image. Channels last, the channels of a tap lie side by
    side, so that one entry a tap is enough, where channels first needs one for each of the `K^2 C` rows. The loops
    over the taps become one, whatever the kernel and its dilation. Reads `(N, *size, C)`, writes `(N, *out, M)`. Zero
    padding is a copy of the input, as in `implicit-gemm`. The table (`4 K^2` bytes) is a constant of the artefact
    like a transformed weight and is counted with the weights, not as workspace: no run allocates it. Source: Chetlur
    et al. 2014, section 3 (arXiv 1410.0759); cuDNN's IMPLICIT_PRECOMP_GEMM.
    """

    key = "precomp-gemm"
    summary = "implicit GEMM, the taps' offsets read from a table made at compile time"
    gemm_formula = "[Ho Wo x K^2 C]·[K^2 C x M]"
    workspace_formula = "e N C Hp Wp where it pads, else 0; the table, 4 K^2, lies with the weights"
    source = "Chetlur et al. 2014, cuDNN, section 3 (arXiv 1410.0759), IMPLICIT_PRECOMP_GEMM"

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is not None:
            return reason
        assert isinstance(problem, ConvProblem)
        return require_offsets(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        return conv_axes(problem)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        cost = conv_cost(problem, tile, {"pad": pad_bytes(problem)} if copies_input(problem) else {})
        table = OFFSET_BYTES * problem.taps
        return replace(cost, weight_bytes=cost.weight_bytes + table, bytes_moved=cost.bytes_moved + table)

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        first = (pad_stage(problem),) if copies_input(problem) else ()
        source = "pad" if copies_input(problem) else "data"

        def gemm(data: te.Tensor, packed: te.Tensor, offsets: te.Tensor) -> te.Tensor:
            return _gemm(problem, tile, epilogue, data, packed, offsets)

        return (
            *first,
            pack_stage(problem, tile),
            table_stage(problem),
            Stage("gemm", (source, "packed", "offsets"), gemm, "output"),
        )


def _gemm(
    problem: ConvProblem, tile: Tile, epilogue: Epilogue, data: te.Tensor, packed: te.Tensor, offsets: te.Tensor
) -> te.Tensor:
    *outer, inner = problem.out_size

    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        del n
        corner = [o * s for o, s in zip((*at[1:], x), problem.stride, strict=True)]
        pixel = flatten(corner, problem.padded_size) + offsets(k[0])
        # Taken apart only to index within each axis: the divisions vanish where the address is put together again.
        return data(at[0], *unflatten(pixel, problem.padded_size), g * problem.c_group + k[1])

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        del at
        return packed(g, p, *unflatten(k[0], problem.kernel), k[1], j)

    return tile_gemm(
        outer=(problem.n, *outer),
        inner=inner,
        groups=problem.groups,
        n=problem.m_group,
        k_extents=(problem.taps, problem.c_group),
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        epilogue=epilogue,
    )
