"""`indirect-gemm`: implicit GEMM through a buffer of row offsets, padding through one row of zeros."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from tvm import te, tirx

from .base import (
    Epilogue,
    GemmAxes,
    Lowering,
    LoweringCost,
    Reason,
    Stage,
    Tile,
    ceil_div,
    dtype_of,
    no_epilogue,
    require_conv,
    zero,
)
from .im2col import unflatten
from .implicit_gemm import conv_axes, conv_cost, pack_stage
from .precomp_gemm import OFFSET, OFFSET_BYTES, flatten, require_offsets
from .problem import ConvProblem, Problem
from .tile_gemm import tile_gemm
from .window import wide_bytes, wide_stage, window_index

ADDRESS = "int64"
OUTSIDE = -1
"""The table's entry of a pixel in the padding."""


def reaches_outside(problem: ConvProblem) -> bool:
    """Whether any tap of any output lies in the padding (a pad behind the last window is never read)."""
    first = window_index(problem, [0] * problem.dims, [0] * problem.dims, padded=False)
    out, taps = ([extent - 1 for extent in sides] for sides in (problem.out_size, problem.kernel))
    last = window_index(problem, out, taps, padded=False)
    return any(i < 0 for i in first) or any(i >= size for i, size in zip(last, problem.size, strict=True))


def table_shape(problem: ConvProblem, tile: Tile) -> tuple[int, ...]:
    """`(*Ho, ceil(Wo / mr), K^2, mr)`: the offsets of a tile's rows lie side by side for each tap."""
    *outer, inner = problem.out_size
    return (*outer, ceil_div(inner, tile.mr), problem.taps, tile.mr)


class IndirectGemm(Lowering):
    """Convolution as a GEMM whose rows of A are found through a table: one offset a pixel and tap.

        offset[p, k]  = flat(o s + k d - p) C inside the image, OUTSIDE in the padding   p = output pixel, k = (kh, kw)
        row[n, p, k]  = I[n] + offset[p, k], or the row of zeros
        O[n, p, m]    = sum_{k, c} row[n, p, k][c] W[m, k, c]
        GEMM: m = Ho Wo (per image), n = M/g, k = K^2 C/g, one a group

    Padding costs neither a copy of the input nor a condition in the loop over the channels: a tile takes its `mr`
    rows from the table once a tap, ahead of that loop. Reads `(N, *size, C)`, writes `(N, *out, M)`.

    The offsets count elements from the start of the image, 4 bytes each, and therefore are known at compile time, like
    the `e C` zeros: both are constants of the artefact, counted with the weights, and the workspace is 0, where the
    paper's buffer of pointers is made when the tensors are bound. That the zeros are a tensor of their own is bridged
    in the kernel: their distance from the input, in elements, takes the place of an offset OUTSIDE. The table is
    ordered `[output row][tile][tap][row of the tile]`, `4 K^2 Ho roundup(Wo, mr)` bytes: a tile ends with its output
    row, where the paper's `roundup(Ho Wo, mr)` lets it run on; the output then is written in its own shape, which costs
    a network no reshaping copy. Staged, a condition on the offset replaces the zeros. Where no tap reaches the padding
    there is no row of zeros. The input must lie in memory as it is: a pass behind this one must not inline what writes
    it. Source: Dukhan 2019, section 3 (arXiv 1907.02129).
    """

    key = "indirect-gemm"
    summary = "implicit GEMM through a table of row offsets and one row of zeros"
    gemm_formula = "[Ho Wo x K^2 C]·[K^2 C x M]"
    workspace_formula = "0; the table, 4 K^2 Ho roundup(Wo, mr), and the row of zeros, e C, lie with the weights"
    source = "Dukhan 2019, The indirect convolution algorithm, section 3 (arXiv 1907.02129)"

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
        table = OFFSET_BYTES * prod(table_shape(problem, tile))
        zeros = problem.scratch_element * problem.c if _row_of_zeros(problem) else 0
        cost = conv_cost(problem, tile, {"wide": wide_bytes(problem)} if problem.widened else {})
        return replace(
            cost,
            bytes_moved=cost.bytes_moved + table + zeros,
            weight_bytes=cost.weight_bytes + table + zeros,
            # A row's address once a tap, shared by the tap's channels: 4/3 of the time was measured for 3 of them.
            read_factor=1 + 1 / problem.c_group,
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)

        def table() -> te.Tensor:
            def element(*index: Any) -> Any:
                outer, (t, tap, i) = index[:-3], index[-3:]
                return _offset(problem, (*outer, t * tile.mr + i), tap).astype(OFFSET)

            return te.compute(table_shape(problem, tile), element, name="offsets")

        def zeros() -> te.Tensor:
            return te.compute((problem.c,), lambda _: zero(problem.accumulator), name="zeros")

        def gemm(data: te.Tensor, packed: te.Tensor, offsets: te.Tensor, *zeros: te.Tensor) -> te.Tensor:
            return _gemm(problem, tile, epilogue, data, packed, offsets, *zeros)

        stages = [pack_stage(problem, tile), Stage("offsets", (), table, "weight")]
        if _row_of_zeros(problem):
            stages.append(Stage("zeros", (), zeros, "weight", wide=True))
        source = "wide" if problem.widened else "data"
        reads = (source, *(stage.name for stage in stages))
        first = (wide_stage(problem),) if problem.widened else ()
        return (*first, *stages, Stage("gemm", reads, gemm, "output"))


def _row_of_zeros(problem: ConvProblem) -> bool:
    """Whether padding is read from a row of zeros: a distance between tensors is a number only in one address space of
    one machine, so that a staged problem takes a condition instead."""
    return reaches_outside(problem) and not problem.staged


def _offset(problem: ConvProblem, out: tuple[Any, ...], tap: Any) -> Any:
    """The element of the image at which the row of `tap` for output pixel `out` begins, or OUTSIDE."""
    where = window_index(problem, out, unflatten(tap, problem.kernel), padded=False)
    inside = [test for i, size in zip(where, problem.size, strict=True) for test in (i >= 0, i < size)]
    start = flatten(where, problem.size) * problem.c
    # Rows of the last tile past the output's end are read and thrown away: at any place that can be read.
    elsewhere = tirx.if_then_else(out[-1] < problem.out_size[-1], OUTSIDE, 0)
    return tirx.if_then_else(tirx.all(out[-1] < problem.out_size[-1], *inside), start, elsewhere)


def _gemm(
    problem: ConvProblem,
    tile: Tile,
    epilogue: Epilogue,
    data: te.Tensor,
    packed: te.Tensor,
    offsets: te.Tensor,
    zeros: te.Tensor | None = None,
) -> te.Tensor:
    *outer, inner = problem.out_size
    image = problem.c * prod(problem.size)
    # Tensors of fewer than 2^31 elements: only a distance between two of them needs more.
    address = OFFSET if problem.staged else ADDRESS
    starts = None if zeros is None else (_address(data), _address(zeros))

    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        del n
        offset = offsets(*at[1:], x // tile.mr, k[0], x % tile.mr)
        start = offset.astype(address) + at[0].astype(address) * image
        if starts is not None:
            shift = tirx.const(problem.scratch_element.bit_length() - 1, ADDRESS)
            distance = tirx.shift_right(starts[1](0) - starts[0](0), shift)
            # The sign, all ones or none, chooses: TVM makes a branch inside the loop of a Select between loads.
            sign = tirx.shift_right(offset, tirx.const(31, OFFSET)).astype(ADDRESS)
            start = start + tirx.bitwise_and(sign, distance - start)
        value = data(*[0] * (problem.dims + 1), start + g * problem.c_group + k[1])
        if starts is None and reaches_outside(problem):
            return tirx.if_then_else(offset >= 0, value, zero(dtype_of(value)))
        return value

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        del at
        return packed(g, p, *unflatten(k[0], problem.kernel), k[1], j)

    def finish(value: Any, index: tuple[Any, ...]) -> Any:
        # Reading a zero at the end shows TVM that the zeros live so long: in one function with the stage that writes
        # them it would give their place to another buffer once their address is taken.
        return epilogue(value if zeros is None else value + zeros(0), index)

    return tile_gemm(
        outer=(problem.n, *outer),
        inner=inner,
        groups=problem.groups,
        n=problem.m_group,
        k_extents=(problem.taps, problem.c_group),
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        epilogue=finish,
        guard=False,
    )


def _address(tensor: te.Tensor) -> te.Tensor:
    """The address of a tensor's first element, as one number.

    It goes through memory because TVM turns a pointer into a number nowhere else: `address_of` may be declared an
    integer, as TVM itself does for descriptors, but only a store takes it as one.
    """

    def element(_: Any) -> Any:
        return tirx.call_intrin(ADDRESS, "tirx.address_of", tensor(*[0] * len(tensor.shape)))

    return te.compute((1,), element, name=f"{tensor.op.name}_address")
