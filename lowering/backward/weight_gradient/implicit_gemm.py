"""`implicit-gemm` of the weight gradient: the patches are addresses, never stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from ..split import VECTOR_BYTES, Split, at_once, by_tap, partial_bytes, pixel, split_of, sum_stage


@dataclass(frozen=True)
class _Form:
    """How the GEMM lies: `columns` read as vectors are "input" channels, "output" channels, or those of all "groups".

    | columns | rows | GEMMs | for |
    | --- | --- | --- | --- |
    | input | M/g | one a tap: `[M/g x P]·[P x C/g]` | most layers: the result needs no transposition |
    | output | K^2 C/g | one: `[K^2 C/g x P]·[P x M/g]` | few input channels, as in a first layer |
    | groups | K^2 | a vector of M inner products | one input channel a group (depthwise) |
    """

    problem: WeightGradientProblem
    columns: str
    split: Split

    @property
    def outer(self) -> tuple[int, ...]:
        return (self.split.chunks, *(self.problem.conv.kernel if self.columns == "input" else ()))

    @property
    def rows(self) -> int:
        conv = self.problem.conv
        return {"input": conv.m_group, "output": conv.taps * conv.c_group, "groups": conv.taps}[self.columns]

    @property
    def n(self) -> int:
        conv = self.problem.conv
        return {"input": conv.c_group, "output": conv.m_group, "groups": conv.m}[self.columns]

    @property
    def groups(self) -> int:
        return 1 if self.columns == "groups" else self.problem.conv.groups

    def padded(self, tile: Tile) -> int:
        """Channels a group of the operand that is read as vectors, so that a whole panel of it can be read."""
        return self.n if self.columns == "groups" else ceil_div(self.n, tile.nr) * tile.nr

    def workspace(self, tile: Tile) -> dict[str, int]:
        """Bytes by stage."""
        conv, found = self.problem.conv, {}
        wide = self.padded(tile)
        image = conv.element * conv.n
        if self.columns == "output" and wide != self.n:
            found["columns"] = image * conv.pixels * conv.groups * wide
        channels = conv.groups * wide if self.columns == "input" else conv.c
        if conv.padded or channels != conv.c:
            found["pad"] = image * prod(conv.padded_size) * channels
        return found if self.at_once else {**found, "partial": partial_bytes(self.problem)}

    @property
    def at_once(self) -> bool:
        """Whether the GEMM writes the gradient itself."""
        return self.columns == "input" and at_once(self.problem)


def form_of(problem: WeightGradientProblem) -> _Form:
    """Vectors run along the channels that waste the least of them; input channels where both are equal."""
    conv, lanes = problem.conv, VECTOR_BYTES // problem.element
    if conv.c_group == 1 and conv.groups > 1:
        return _Form(problem, "groups", split_of(problem))
    used_c, used_m = (n / (ceil_div(n, lanes) * lanes) for n in (conv.c_group, conv.m_group))
    return _Form(problem, "output" if used_m > used_c else "input", split_of(problem))


class ImplicitGemm(Lowering[WeightGradientProblem]):
    """`dW` as a GEMM over all pixels, whose patches are addresses in the input.

        P[s, kh, kw, m, c] = sum_{(n, y, x) in chunk s} dO[n, y, x, m] I[n, y s + kh d - p, x s + kw d - p, c]
        dW[m, kh, kw, c]   = sum_s P[s, kh, kw, m, c]

    GEMM a tap and group `[M/g x N Ho Wo]·[N Ho Wo x C/g]`; with few input channels all taps form its rows and the
    output channels its columns. Reads `data` = dO `(N, *out, M)` and `input` = I `(N, *size, C)`, writes
    `(M, *kernel, C/g)`. The reduction is cut into S chunks of pixels whose partial sums take `e S M K^2 C/g` bytes,
    or none where one chunk and one group write the gradient at once;
    zero padding is a copy of the input, `e N C Hp Wp`. An operand is copied as well where its channels a group are no
    multiple of the register tile's width: rounded up, they are `roundup(C/g, nr)`.
    Source: Chetlur et al. 2014, cuDNN, section 3 (arXiv 1410.0759), with the operands of the weight's gradient.
    """

    key = "implicit-gemm"
    summary = "GEMM over all pixels, patches as addresses, the reduction in chunks"
    gemm_formula = "K^2 x [M x N Ho Wo]·[N Ho Wo x C]"
    workspace_formula = "e S M K^2 C (0 where S = 1), plus e N C Hp Wp where it pads"
    source = "Chetlur et al. 2014, cuDNN, section 3 (arXiv 1410.0759)"

    def applicable(self, problem: WeightGradientProblem) -> Reason | None:
        return require_gradient(problem, WeightGradientProblem)

    def axes(self, problem: WeightGradientProblem) -> GemmAxes:
        form = form_of(problem)
        depthwise = form.columns == "groups"
        return GemmAxes(
            prod(form.outer),
            form.rows,
            form.n,
            form.split.pixels,
            form.groups,
            vector_a=depthwise,
            nr_divides=depthwise,
        )

    def cost(self, problem: WeightGradientProblem, tile: Tile) -> LoweringCost:
        form, conv = form_of(problem), problem.conv
        workspace = form.workspace(tile)
        total = sum(workspace.values())
        rows, columns = ceil_div(form.rows, tile.mr) * tile.mr, ceil_div(form.n, tile.nr) * tile.nr
        depthwise = form.columns == "groups"
        calls = prod(form.outer[1:])
        count = conv.m if depthwise else calls * form.groups
        return LoweringCost(
            gemms=(GemmShape(form.rows, 1 if depthwise else form.n, problem.reduction, count),),
            macs=calls * form.groups * rows * columns * problem.reduction,
            bytes_moved=activation_bytes(conv) + problem.element * prod(problem.weight_size()) + 2 * total,
            workspace_bytes=total,
            weight_bytes=0,
            error_growth=sqrt(problem.reduction),
            workspace=workspace,
            extra_flops=form.split.chunks * prod(problem.weight_size()),
        )

    def build(self, problem: WeightGradientProblem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        form = form_of(problem)
        stages, workspace = [], form.workspace(tile)
        if "columns" in workspace:
            stages.append(Stage("columns", ("data",), lambda data: _pack_gradient(form, tile, data), "workspace"))
        if "pad" in workspace:
            stages.append(Stage("pad", ("input",), lambda given: _pad_input(form, tile, given), "workspace"))
        reads = ("columns" if "columns" in workspace else "data", "pad" if "pad" in workspace else "input")

        def multiply(gradient: te.Tensor, given: te.Tensor) -> te.Tensor:
            return _multiply(form, tile, epilogue, gradient, given)

        if form.at_once:
            return (*stages, Stage("gemm", reads, multiply, "output"))
        return (
            *stages,
            Stage("partial", reads, multiply, "workspace"),
            sum_stage(problem, lambda m, taps, c: _element_at(form, m, taps, c), epilogue),
        )


def _pack_gradient(form: _Form, tile: Tile, gradient: te.Tensor) -> te.Tensor:
    """dO in panels of channels, zeros past the last one: `(g, (M/g)/nr, N, *out, nr)`."""
    conv = form.problem.conv

    def element(g: Any, p: Any, n: Any, *index: Any) -> Any:
        column = p * tile.nr + index[-1]
        value = gradient(*pixel(form.problem, n, index[:-1]), g * form.n + column)
        return tirx.if_then_else(column < form.n, value, zero(conv.dtype))

    shape = (conv.groups, ceil_div(form.n, tile.nr), conv.n, *conv.out_size, tile.nr)
    return te.compute(shape, element, name="columns")


def _pad_input(form: _Form, tile: Tile, given: te.Tensor) -> te.Tensor:
    """I in a frame of zeros, in panels where its channels are read as vectors: `(g, (C/g)/nr, N, *padded, nr)`.

    A panel is read front to back, from consecutive cache lines. Otherwise one panel holds all channels of a group.
    """
    conv = form.problem.conv
    width = tile.nr if form.columns == "input" else conv.c
    groups = conv.groups if form.columns == "input" else 1
    channels = conv.c // groups

    def element(g: Any, p: Any, n: Any, *index: Any) -> Any:
        where = [i - before for i, before in zip(index[:-1], conv.pad_before, strict=True)]
        c = p * width + index[-1]

        def read(n: Any, *at: Any) -> Any:
            return given(*pixel(form.problem, n, at[:-1]), at[-1])

        value = read_padded(conv, read, n, where, g * channels + c)
        return value if channels % width == 0 else tirx.if_then_else(c < channels, value, zero(conv.dtype))

    shape = (groups, ceil_div(channels, width), conv.n, *conv.padded_size, width)
    return te.compute(shape, element, name="pad")


def _multiply(form: _Form, tile: Tile, epilogue: Epilogue, gradient: te.Tensor, given: te.Tensor) -> te.Tensor:
    """The partial sums, `(S, [*kernel,] rows, [g,] columns)`, or at once the gradient with its epilogue."""
    problem, conv, split = form.problem, form.problem.conv, form.split
    workspace = form.workspace(tile)

    nr = tile.nr

    def read_gradient(at: tuple[Any, ...], k: tuple[Any, ...], g: Any, m: Any) -> Any:
        n, out = split.position(at[0], k)
        return gradient(*pixel(problem, n, out), g * conv.m_group + m)

    def read_input(at: tuple[Any, ...], k: tuple[Any, ...], taps: Sequence[Any], g: Any, c: Any) -> Any:
        n, out = split.position(at[0], k)
        where, channel = window_index(conv, out, taps), g * conv.c_group + c
        return given(0, 0, n, *where, channel) if "pad" in workspace else given(*pixel(problem, n, where), channel)

    def read_a(at: tuple[Any, ...], x: Any, g: Any, column: Any, k: tuple[Any, ...]) -> Any:
        if form.columns == "input":
            return read_gradient(at, k, g, x)
        if form.columns == "output":
            return read_input(at, k, unflatten(x // conv.c_group, conv.kernel), g, x % conv.c_group)
        return read_input(at, k, unflatten(x, conv.kernel), column // conv.m_group, 0)

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        n, out = split.position(at[0], k)
        if form.columns == "input" and "pad" in workspace:
            return given(g, p, n, *window_index(conv, out, at[1:]), j)
        if form.columns == "input":
            return read_input(at, k, at[1:], g, p * nr + j)
        if "columns" in workspace:
            return gradient(g, p, n, *out, j)
        return read_gradient(at, k, g, p * nr + j)

    order, finish = by_tap(problem, epilogue) if form.at_once else (None, no_epilogue)
    return tile_gemm(
        outer=form.outer,
        inner=form.rows,
        groups=form.groups,
        n=form.n,
        k_extents=split.extents,
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        epilogue=finish,
        order=order,
        name="gemm" if form.at_once else "partial",
    )


def _element_at(form: _Form, m: Any, taps: Sequence[Any], c: Any) -> tuple[Any, ...]:
    """Where the partial sums hold `dW[m, taps, c]`, behind the chunk."""
    conv = form.problem.conv
    tap: Any = 0
    for position, extent in zip(taps, conv.kernel, strict=True):
        tap = tap * extent + position
    if form.columns == "groups":
        return tap, m
    group = (m // conv.m_group,) if conv.groups > 1 else ()
    if form.columns == "input":
        return (*taps, m % conv.m_group, *group, c)
    return (tap * conv.c_group + c, *group, m % conv.m_group)
