"""The tiles of `fft`: how long a transform is, how many tiles there are, what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from .base import ceil_div
from .fourier import operations
from .problem import ConvProblem

POINTS = (8, 12, 16, 20, 24, 28, 32)
# Longer transforms take LLVM seconds and gained nothing measured, except for kernels that leave few outputs otherwise.
PLENTY = 24
# A tuner may try tiles of so many times the least modelled work.
MOST_WORK = 1.5
# Channels that go through a transform together: a cache line of them.
LINE_BYTES = 64
# What a byte of filters or of spectra weighs against a multiply-add when the tile is chosen: one is read once from
# far, the other is written and read near by.
FILTER_BYTE, SPECTRUM_BYTE = 2, 2
# What an operation of a transform takes with its loads and stores, as measured against a multiply-add of a GEMM.
WITH_LOADS = 2.5


@dataclass(frozen=True)
class FftForm:
    """Sizes of one problem. `points` and `step`: points and outputs of a tile along y and x; `tiles`: tiles along each.

    A third dimension is no part of the transform: its taps are summed by the GEMM, `depth` slices in, `out` slices out.
    """

    points: tuple[int, int]
    step: tuple[int, int]
    tiles: tuple[int, int]
    n: int
    depth: int
    out: int
    kd: int

    @property
    def columns(self) -> int:
        """Frequencies along x: half a spectrum."""
        return self.points[1] // 2 + 1

    @property
    def frequencies(self) -> int:
        return self.points[0] * self.columns

    @property
    def volume(self) -> bool:
        return (self.depth, self.out, self.kd) != (1, 1, 1)

    @property
    def slabs(self) -> tuple[int, int]:
        """Slices of input and of output, which the GEMM's rows do not run across; 1 without a third dimension."""
        return (self.n * self.depth, self.n * self.out) if self.volume else (1, 1)

    @property
    def rows(self) -> int:
        """Tiles of one slab: the GEMM has two rows for each, real and imaginary part."""
        return prod(self.tiles) * (1 if self.volume else self.n)

    @property
    def tiles_in(self) -> int:
        return self.slabs[0] * self.rows

    @property
    def tiles_out(self) -> int:
        return self.slabs[1] * self.rows


def reach_of(problem: ConvProblem) -> tuple[int, ...]:
    """Inputs under the kernel along the last two dimensions, 1 for one that is missing: `d (K - 1) + 1`."""
    spans = tuple(d * (k - 1) + 1 for d, k in zip(problem.dilation, problem.kernel, strict=True))
    return (1, *spans)[-2:] if problem.dims == 1 else spans[-2:]


@lru_cache(maxsize=1024)
def form_of(problem: ConvProblem, points: tuple[int, int] | None = None) -> FftForm:
    """The tile of `points` inputs along y and x (1 across a kernel of height 1); the one of least modelled work, from
    POINTS, where none is given."""
    return _forms(problem)[0] if points is None else _form(problem, points)


def point_choices(problem: ConvProblem) -> tuple[tuple[int, int], ...]:
    """Tiles that may be tried, the default first, then by their modelled work up to MOST_WORK times the least."""
    forms = _forms(problem)
    return tuple(form.points for form in forms if _work(problem, form) <= MOST_WORK * _work(problem, forms[0]))


def _forms(problem: ConvProblem) -> list[FftForm]:
    """Every tile, the least modelled work first."""
    reach = reach_of(problem)
    longest = [max(PLENTY, 2 * r) for r in reach]
    heights = [1] if reach[0] == 1 else [t for t in POINTS if reach[0] < t <= longest[0]]
    widths = [t for t in POINTS if reach[1] < t <= longest[1]]
    return sorted((_form(problem, (ty, tx)) for ty in heights for tx in widths), key=lambda f: _work(problem, f))


def _form(problem: ConvProblem, points: tuple[int, int]) -> FftForm:
    step = tuple(t - r + 1 for t, r in zip(points, reach_of(problem), strict=True))
    out = (1, *problem.out_size)[-2:]
    tiles = tuple(ceil_div(o, s) for o, s in zip(out, step, strict=True))
    third = problem.dims == 3
    return FftForm(
        points,
        (step[0], step[1]),
        (tiles[0], tiles[1]),
        problem.n,
        problem.padded_size[0] if third else 1,
        problem.out_size[0] if third else 1,
        problem.kernel[0] if third else 1,
    )


def _work(problem: ConvProblem, form: FftForm) -> float:
    """Multiply-adds of transforms and GEMMs, and the bytes between them in the same coin."""
    macs = 4 * form.frequencies * form.tiles_out * form.kd * problem.c_group * problem.m
    numbers = 2 * form.frequencies
    spectra = numbers * (form.tiles_in * problem.c + form.tiles_out * problem.m)
    filters = numbers * form.kd * problem.c_group * problem.m
    moved = problem.scratch_element * (SPECTRUM_BYTE * spectra + FILTER_BYTE * filters)
    return macs + transform_work(problem, form) + moved


def transform_work(problem: ConvProblem, form: FftForm) -> int:
    """Operations of all transforms of activations, each with its loads and stores; a chunk counts as a full line."""
    (ty, tx), (my, _) = form.points, form.step
    columns = 2 * form.columns * operations(ty) if ty > 1 else 0
    forward, inverse = ty * operations(tx) + columns, my * operations(tx) + columns
    read, written = (
        channels // chunk_of(channels, problem.scratch_element) * (LINE_BYTES // problem.scratch_element)
        for channels in (problem.c, problem.m)
    )
    return int(WITH_LOADS * (form.tiles_in * read * forward + form.tiles_out * written * inverse))


def chunk_of(channels: int, element: int) -> int:
    """Channels that are transformed together: the largest divisor of `channels` within a cache line."""
    return max(d for d in range(1, LINE_BYTES // element + 1) if channels % d == 0)
