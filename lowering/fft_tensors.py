"""The tensors of `fft`: spectra of overlapping tiles, spectra of filters, their products, the tiles of the output."""

from __future__ import annotations

from math import cos, pi, sin
from typing import Any

from tvm import te, tirx

from .base import Epilogue, Tile, ceil_div, zero
from .fft_form import FftForm, chunk_of
from .fourier import Row, apply, combine, real_dft, real_idft
from .problem import ConvProblem
from .tile_gemm import AXES_ANNOTATION

SWEEP_ANNOTATION = "gemmify.sweep"
CHUNK_ANNOTATION = "gemmify.chunk"
STORED_ANNOTATION = "gemmify.stored"
STEP_ANNOTATION = "gemmify.step"


def spectra(problem: ConvProblem, form: FftForm, data: te.Tensor) -> te.Tensor:
    """`V = F I_tile`: `[Ty][Tx/2+1][slice][tile][part][C]`, each tile along x, then each of its frequencies along y."""
    (ty, tx), (slabs, _), rows, c = form.points, form.slabs, form.rows, problem.c
    step = {STEP_ANNOTATION: 1}

    def gather(slab: Any, r: Any, y: Any, x: Any, channel: Any) -> Any:
        where, n = _position(problem, form, slab, r, y, x)
        inside = []
        for at, size, low, high in zip(where, problem.size, problem.pad_before, _above(problem, form), strict=True):
            inside += ([at >= 0] if low else []) + ([at < size] if high else [])
        value = data(n, *where, channel)
        # A branch, not a Select: that reads on both sides, and TVM drops a clamp which the condition makes needless.
        return tirx.if_then_else(tirx.all(*inside), value, zero(problem.accumulator)) if inside else value

    tile = te.compute((slabs, rows, ty, tx, c), gather, name="fft_tile", attrs=step)
    # 1. along x: half a spectrum for every y
    lines = apply(tile, tile.shape, real_dft(tx), 3, "fft_lines", step, {SWEEP_ANNOTATION: "ooruv"})

    # 2. along y: the real and the imaginary part of a column apart (each is a real sequence), then put together
    def column(slab: Any, r: Any, kx: Any, s: Any, y: Any, channel: Any) -> Any:
        return lines(slab, r, y, 2 * kx + s, channel)

    shape = (slabs, rows, form.columns, 2, ty, c)
    halves = apply(column, shape, real_dft(ty), 4, "fft_columns", step)
    parts = [_join(ty, k, part) for k in range(ty) for part in range(2)]

    def element(ky: Any, kx: Any, slab: Any, r: Any, part: Any, channel: Any) -> Any:
        return combine(parts, 2 * ky + part, lambda at: halves(slab, r, kx, at % 2, at // 2, channel))

    chunk = chunk_of(c, problem.scratch_element)
    return te.compute(
        (ty, form.columns, slabs, rows, 2, c),
        element,
        name="fft_input",
        attrs={SWEEP_ANNOTATION: "uroouv", CHUNK_ANNOTATION: chunk, STORED_ANNOTATION: 1},
    )


def _join(points: int, k: int, part: int) -> Row:
    """`X[k] = A[k] + i B[k]` from the half spectra A, B of the real and the imaginary part; entry `2 l + s` is number
    `l` of half spectrum `s`. Beyond `T/2`, `A[k] = conj A[T-k]`.
    """
    at, sign = (k, 1.0) if 2 * k <= points else (points - k, -1.0)
    real, imaginary = 2 * (2 * at), 2 * (2 * at + 1)
    edge = at in (0, points / 2)
    if part == 0:
        return ((real, 1.0),) if edge else ((real, 1.0), (imaginary + 1, -sign))
    return ((real + 1, 1.0),) if edge else ((real + 1, 1.0), (imaginary, sign))


def _position(problem: ConvProblem, form: FftForm, slab: Any, r: Any, y: Any, x: Any) -> tuple[list[Any], Any]:
    """(where in the input, from its own corner; which image) element `y, x` of tile `r` of a slab lies."""
    th, tw = form.tiles
    n = slab // form.depth if form.volume else r // (th * tw)
    across = [
        (r // tw if form.volume else r // tw % th) * form.step[0] + y,
        r % tw * form.step[1] + x,
    ]
    where = [slab % form.depth, *across] if problem.dims == 3 else across[-problem.dims :]
    return [at - before for at, before in zip(where, problem.pad_before, strict=True)], n


def _above(problem: ConvProblem, form: FftForm) -> list[bool]:
    """Whether tiles reach beyond the end of the input, one entry a dimension."""
    ends = [
        tiles * step + points - step for tiles, step, points in zip(form.tiles, form.step, form.points, strict=True)
    ]
    ends = [form.depth, *ends] if problem.dims == 3 else ends[-problem.dims :]
    sides = zip(ends, problem.pad_before, problem.size, strict=True)
    return [end - before > size for end, before, size in sides]


def filters(problem: ConvProblem, form: FftForm, tile: Tile, weight: te.Tensor) -> te.Tensor:
    """`U = conj(F W) / (Ty Tx)`: `(M, *kernel, C/g)` to
    `[Ty][Tx/2+1][g][(M/g)/nr][Kd][C/g][part][nr]`, zeros past M.
    """
    (ty, tx), (kh, kw) = form.points, (1, *problem.kernel)[-2:]
    spacing = (1, *problem.dilation)[-2:]
    dtype, m, c = problem.accumulator, problem.m, problem.c_group

    def wave(points: int, tap: Any, k: Any, sine: Any) -> Any:
        """`cos` or `sin` of `2 pi tap k / points`."""
        values: Any = zero(dtype)
        for j in range(points):
            angle = 2 * pi * j / points
            value = tirx.Select(sine == 1, tirx.const(sin(angle), dtype), tirx.const(cos(angle), dtype))
            values = tirx.Select(tap * k % points == j, value, values)
        return values

    def along_x(tap: Any, k: Any, s: Any) -> Any:
        once = tirx.const(1 / (ty * tx), dtype)
        weight_of = tirx.Select(tirx.any(k == 0, k == tx // 2), once, once * 2)
        return wave(tx, tap * spacing[1], k, s) * weight_of

    def along_y(tap: Any, k: Any, part: Any, s: Any) -> Any:
        value = wave(ty, tap * spacing[0], k, (part + s) % 2)
        return tirx.Select(tirx.all(part == 0, s == 1), -value, value)

    table_x = te.compute((kw, form.columns, 2), along_x, name="fft_waves_x")
    table_y = te.compute((kh, ty, 2, 2), along_y, name="fft_waves_y")
    x, y, s = (te.reduce_axis((0, extent), name) for extent, name in ((kw, "x"), (kh, "y"), (2, "s")))

    def read(mi: Any, d: Any, yi: Any, xi: Any, ci: Any) -> Any:
        return weight(mi, *(d, yi, xi)[-problem.dims :], ci)

    lines = te.compute(
        (form.columns, 2, form.kd, kh, m, c),
        lambda k, part, d, yi, mi, ci: te.sum(table_x(x, k, part) * read(mi, d, yi, x, ci), axis=[x]),
        name="fft_filter_lines",
    )
    planes = te.compute(
        (ty, form.columns, 2, form.kd, m, c),
        lambda ky, kx, part, d, mi, ci: te.sum(table_y(y, ky, part, s) * lines(kx, s, d, y, mi, ci), axis=[y, s]),
        name="fft_filter_planes",
    )

    def element(ky: Any, kx: Any, g: Any, p: Any, d: Any, ci: Any, part: Any, j: Any) -> Any:
        column = p * tile.nr + j
        value = planes(ky, kx, part, d, g * problem.m_group + column, ci)
        if problem.m_group % tile.nr == 0:
            return value
        return tirx.if_then_else(column < problem.m_group, value, zero(dtype))

    panels = ceil_div(problem.m_group, tile.nr)
    return te.compute((ty, form.columns, problem.groups, panels, form.kd, c, 2, tile.nr), element, name="packed")


def multiply(problem: ConvProblem, form: FftForm, tile: Tile, v: te.Tensor, packed: te.Tensor) -> te.Tensor:
    """`Z[f] = V[f] U[f]` for every frequency: `[Ty][Tx/2+1][slice][tile, part][M]` (`[g][M/g]` where there are groups).

    Row `(p, s)` sums over `(c, t)`: `V[p, (s + t) mod 2, c] U[c, t]`, with a minus sign for the product of two
    imaginary parts; a vector of U is loaded once for both rows. A panel of B belongs to one frequency, hence the `p`.
    """
    inner, mr, nr, groups = 2 * form.rows, tile.mr, tile.nr, problem.groups
    tiles, panels = ceil_div(inner, mr), ceil_div(problem.m_group, nr)
    kd, kc, kt = (
        te.reduce_axis((0, extent), name) for extent, name in ((form.kd, "k0"), (problem.c_group, "k1"), (2, "k2"))
    )

    def product(ky: Any, kx: Any, slab: Any, t: Any, g: Any, p: Any, i: Any, j: Any) -> Any:
        source = slab
        if form.volume:
            depth = slab % form.out * problem.stride[0] + kd * problem.dilation[0]
            source = slab // form.out * form.depth + depth
        a = v(ky, kx, source, t * (mr // 2) + i // 2, (i % 2 + kt) % 2, g * problem.c_group + kc)
        if inner % mr:
            a = tirx.if_then_else(t * mr + i < inner, a, zero(problem.accumulator))
        minus = tirx.all(i % 2 == 0, kt == 1)
        sign = tirx.Select(minus, tirx.const(-1.0, problem.accumulator), tirx.const(1.0, problem.accumulator))
        return te.sum(a * sign * packed(ky, kx, g, p, kd, kc, kt, j), axis=[kd, kc, kt])

    grid = (form.points[0], form.columns, form.slabs[1])
    acc = te.compute(
        (*grid, tiles, groups, panels, mr, nr), product, name="fft_acc", attrs={AXES_ANNOTATION: "ppotppij"}
    )

    def element(ky: Any, kx: Any, slab: Any, x: Any, *column: Any) -> Any:
        g, n = column if groups > 1 else (0, column[0])
        return acc(ky, kx, slab, x // mr, g, n // nr, x % mr, n % nr)

    columns = (groups, problem.m_group) if groups > 1 else (problem.m,)
    return te.compute((*grid, inner, *columns), element, name="fft_product")


def inverse(problem: ConvProblem, form: FftForm, epilogue: Epilogue, z: te.Tensor) -> te.Tensor:
    """`O_tile = F^-1 Z`, along y, then along x, only the rows and columns that no wrap-around reached."""
    (ty, tx), (my, mx), (th, tw) = form.points, form.step, form.tiles
    step, m = {STEP_ANNOTATION: 1}, problem.m
    grid = (problem.n, form.out, th, tw)

    def read(at: tuple[Any, ...], ky: Any, kx: Any, part: Any, channel: Any) -> Any:
        n, d, a, b = at
        slab, r = (n * form.out + d, a * tw + b) if form.volume else (0, (n * th + a) * tw + b)
        column = (channel // problem.m_group, channel % problem.m_group) if problem.groups > 1 else (channel,)
        return z(ky, kx, slab, 2 * r + part, *column)

    # 1. along y: the half spectra whose transforms are the real and the imaginary part of a column
    pairs = [_pair(ty, entry // 2, entry % 2, s) for s in range(2) for entry in range(ty + 2 if ty > 1 else 1)]
    count = len(pairs) // 2

    def half(*index: Any) -> Any:
        at, kx, s, entry, channel = index[:4], index[4], index[5], index[6], index[7]
        return combine(pairs, s * count + entry, lambda e: read(at, e // 2, kx, e % 2, channel))

    sweep = {SWEEP_ANNOTATION: "ooooruuv"}
    shape = (*grid, form.columns, 2, count, m)
    columns = te.compute(shape, half, name="fft_pairs", attrs=step if ty > 1 else sweep)
    if ty > 1:
        columns = apply(columns, shape, real_idft(ty, my), 6, "fft_out_columns", step, sweep)

    # 2. along x
    def line(*index: Any) -> Any:
        at, y, entry, channel = index[:4], index[4], index[5], index[6]
        return columns(*at, entry // 2, entry % 2, y, channel)

    last = {SWEEP_ANNOTATION: "ooooruv", CHUNK_ANNOTATION: chunk_of(m, problem.scratch_element)}
    tiles = apply(line, (*grid, my, tx + 2, m), real_idft(tx, mx), 5, "fft_out_lines", step, last)

    def element(n: Any, *index: Any) -> Any:
        *where, channel = index
        d, y, x = (0, 0, *where)[-3:]
        return epilogue(tiles(n, d, y // my, x // mx, y % my, x % mx, channel), (n, *index))

    return te.compute((problem.n, *problem.out_size, m), element, name="output")


def _pair(points: int, k: int, part: int, s: int) -> Row:
    """Number `k, part` of the half spectrum whose inverse is part `s` of the inverse of Z; entry `2 k + t` is part `t`
    of `Z[k]`.

        s = 0: Re z = sum Re Z cos - Im Z sin          s = 1: Im z = sum Im Z cos + Re Z sin
    """
    edge = k in (0, points / 2)
    if part == 0:
        return ((2 * k + s, 1.0),) if edge else ((2 * k + s, 1.0), (2 * (points - k) + s, 1.0))
    sign = -1.0 if s else 1.0
    return () if edge else ((2 * k + 1 - s, sign), (2 * (points - k) + 1 - s, -sign))
