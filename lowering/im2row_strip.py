"""`im2row-strip`: im2row a few output rows at a time, the patches in scratch of the thread (channels last)."""

from __future__ import annotations

from functools import lru_cache
from math import prod
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
    off_stack,
    require_conv,
)
from .copied import COPY_ANNOTATION, PRIVATE, PRIVATE_OPS, UNBLOCK_ANNOTATION
from .free_sizes import Size
from .im2row import patch_row_bytes
from .implicit_gemm import pack_stage, packed_bytes
from .problem import ConvProblem, Problem
from .tile_gemm import read_panels, tile_gemm
from .window import activation_bytes, read_padded, window_index

# The patches of a strip and a panel of weights share a core's own cache.
STRIP_BYTES = 640 << 10
# A panel of weights should meet this many pixels before the next one is fetched, and this many strips keep cores busy.
GOOD_PIXELS = 64
GOOD_STRIPS = 16
# A tuner may try strips whose patches take so many times STRIP_BYTES.
SPILL = 4


def row_count(problem: ConvProblem) -> int:
    """Output rows of the whole batch: `N Ho` (`N Do Ho` in three dimensions, `N` in one)."""
    return problem.n * prod(problem.out_size[:-1])


@lru_cache(maxsize=1024)
def row_choices(problem: ConvProblem) -> tuple[int, ...]:
    """Strip heights that may be tried, the default first: the powers of two, and the heights that cut the rows of the
    batch into equal strips, whose patches take at most SPILL times STRIP_BYTES."""
    rows, row_bytes = row_count(problem), patch_row_bytes(problem) * problem.out_size[-1]
    most = max(1, min(rows, SPILL * STRIP_BYTES // row_bytes))
    heights = {2**i for i in range(most.bit_length()) if 2**i <= most}
    heights |= {r for r in range(1, most + 1) if rows % r == 0 and rows // r <= 64}
    usual = strip_rows(problem)
    return (usual, *sorted(heights - {usual}))


@lru_cache(maxsize=1024)
def strip_rows(problem: ConvProblem) -> int:
    """`r`, the output rows of a strip: the least modelled time among those whose patches are at most STRIP_BYTES.

    What counts: rows of the last strip that lie past the output, pixels that a panel of weights meets while it is in
    the cache, and whole rounds of GOOD_STRIPS strips.
    """
    rows, wide = row_count(problem), problem.out_size[-1]
    most = max(1, min(rows, STRIP_BYTES // (patch_row_bytes(problem) * wide)))

    def modelled(r: int) -> float:
        strips = ceil_div(rows, r)
        waste = strips * r / rows
        balance = max(1.0, GOOD_STRIPS / strips) ** 0.25
        return waste * balance * (1 + GOOD_PIXELS / 8 / (r * wide))

    return min(range(1, most + 1), key=lambda r: (modelled(r), r))


class Im2rowStrip(Lowering):
    """im2row a strip of `r` output rows at a time: `R[x, kh, kw, c]` for the `r Wo` pixels of a strip, then their rows
    of the output, `O[x, :] = R[x, :]·W'`.

    GEMM `[r Wo x K^2 C]·[K^2 C x M]` a strip. Strips go over the rows of the whole batch and run in parallel; each
    thread owns one buffer, so the scratch is `threads e C K^2 r Wo` bytes, `r` such that the patches stay in a core's
    own cache. With groups the patches hold all `C` channels. Reads `(N, *size, C)`, writes `(N, *out, M)`. The last
    strip may be partial: its rows past the end are computed from the last row and not stored. Source: Jia,
    "Convolution in Caffe: a memo", its matrix cut into strips as in Anderson et al. 2017, section 3 (arXiv 1709.03395).
    """

    key = "im2row-strip"
    size_names = ("rows",)
    summary = "im2row a few output rows at a time, patches in scratch of the thread"
    gemm_formula = "[r Wo x K^2 C]·[K^2 C x M] a strip"
    workspace_formula = "threads e C K^2 r Wo"
    source = "Jia, Convolution in Caffe: a memo; in strips: Anderson et al. 2017, section 3 (arXiv 1709.03395)"

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is None and problem.staged:
            return Reason("needs a cache that threads keep a strip in, got kernels without scratch of their own")
        return reason

    def choices(self, problem: Problem) -> dict[str, tuple[Size, ...]]:
        """`rows`: output rows of a strip, `r`."""
        assert isinstance(problem, ConvProblem)
        rows = row_choices(problem)
        return {"rows": rows} if len(rows) > 1 else {}

    def _rows(self, problem: ConvProblem) -> int:
        sizes: dict[str, Any] = dict(self.sizes)
        return int(sizes.get("rows") or strip_rows(problem))

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        strips, pixels = _strips(problem, self._rows(problem))
        k = problem.taps * problem.c_group
        return GemmAxes(strips, pixels, problem.m_group, k, problem.groups, row_bytes=patch_row_bytes(problem))

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        strips, pixels = _strips(problem, self._rows(problem))
        k, weights = problem.taps * problem.c_group, packed_bytes(problem, tile)
        columns = problem.groups * ceil_div(problem.m_group, tile.nr) * tile.nr
        return LoweringCost(
            gemms=(GemmShape(problem.n * problem.pixels, problem.m_group, k, problem.groups),),
            macs=strips * ceil_div(pixels, tile.mr) * tile.mr * columns * k,
            bytes_moved=activation_bytes(problem) + strips * weights,
            workspace_bytes=0,
            weight_bytes=weights,
            error_growth=k**0.5,
            extra_flops=PRIVATE_OPS * strips * pixels * problem.taps * problem.c,
            weight_reads=strips,
            thread_bytes=off_stack(pixels * patch_row_bytes(problem)),
            tasks=strips,
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        r = self._rows(problem)

        def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            return _multiply(problem, r, tile, epilogue, _unroll(problem, r, data), packed)

        return (pack_stage(problem, tile), Stage("gemm", ("data", "packed"), gemm, "output"))


def _strips(problem: ConvProblem, r: int) -> tuple[int, int]:
    """(strips of the batch, pixels of a strip) of `r` output rows."""
    return ceil_div(row_count(problem), r), r * problem.out_size[-1]


def _unroll(problem: ConvProblem, r: int, data: te.Tensor) -> te.Tensor:
    """`R`: `(strips, r, Wo, *kernel, C)`, what lies past the last row copied from the last row."""
    rows, outer = row_count(problem), problem.out_size[:-1]
    strips, _ = _strips(problem, r)

    def element(strip: Any, y: Any, x: Any, *index: Any) -> Any:
        row = strip * r + y
        if rows % r:
            row = tirx.min(row, rows - 1)
        n, *out = _unflatten(row, outer)
        return read_padded(problem, data, n, window_index(problem, (*out, x), index[:-1], padded=False), index[-1])

    shape = (strips, r, problem.out_size[-1], *problem.kernel, problem.c)
    return te.compute(shape, element, name="im2row_strip", attrs={COPY_ANNOTATION: PRIVATE})


def _multiply(
    problem: ConvProblem, r: int, tile: Tile, epilogue: Epilogue, patches: te.Tensor, packed: te.Tensor
) -> te.Tensor:
    """The GEMM over the pixels of each strip, cut to the pixels that there are: `(N Ho Wo, (g,) M/g)`."""
    (strips, pixels), wide = _strips(problem, r), problem.out_size[-1]

    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        del n
        return patches(*at, x // wide, x % wide, *k[:-1], g * problem.c_group + k[-1])

    blocked = tile_gemm(
        outer=(strips,),
        inner=pixels,
        groups=problem.groups,
        n=problem.m_group,
        k_extents=(*problem.kernel, problem.c_group),
        read_a=read_a,
        read_b=read_panels(packed),
        tile=tile,
        epilogue=no_epilogue,
        name="strip",
    )

    def element(position: Any, *index: Any) -> Any:
        value = blocked(position // pixels, position % pixels, *index)
        channel = index[0] * problem.m_group + index[1] if len(index) > 1 else index[0]
        return epilogue(value, (*_unflatten(position, problem.out_size), channel))

    channels = (problem.groups, problem.m_group) if problem.groups > 1 else (problem.m_group,)
    shape = (problem.n * problem.pixels, *channels)
    return te.compute(shape, element, name="gemm", attrs={UNBLOCK_ANNOTATION: 1})


def _unflatten(position: Any, extents: tuple[int, ...]) -> list[Any]:
    """`(n, *index)` of the row-major `position` in a batch of tensors of shape `extents`."""
    index: list[Any] = []
    for d in range(len(extents)):
        index.append(position // prod(extents[d + 1 :]) % extents[d])
    return [position // prod(extents), *index]
