"""`sub-convolution`: a transposed convolution as one convolution of stride 1 for each phase of the output."""

from __future__ import annotations

from collections import Counter
from itertools import product
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
    dtype_of,
    no_epilogue,
    require_transposed,
    zero,
)
from .implicit_gemm import pack_stage, packed_bytes
from .phases import phases_of
from .problem import Problem, TransposedConvProblem
from .tile_gemm import pack_panels, read_panels, tile_gemm
from .window import activation_bytes


class SubConvolution(Lowering):
    """The `s^2` phases of the output, each a stride-1 convolution by its own part of the kernel, none of it stored.

        O[n, s j + r, m] = sum_{u, c} I[n, j + base(r) - u rise, c] W[m, first(r) + u step, c]      r < s (`phases`)
        GEMM: s^2 x [Ho/s Wo/s x (K/s)^2 C]·[(K/s)^2 C x M], one a phase, image and group

    Reads `(N, *size, C)`; writes `(N, *out, M)`, the phases interleaved, as `(N, Ho/s, s, Wo/s, s, M)`, which are the
    same bytes. Phases of fewer taps run fewer steps (a 3x3 kernel with stride 2: 1, 2, 2 and 4 taps). A depthwise layer
    is vectorised over its channels. The workspace is the input in its frame of zeros, `e N C (H + b + a)(W + b + a)`,
    where a tap reaches outside (`Phases.reach`); where `s` does not divide `Ho` or `Wo` also the uncut output,
    `e N M s ceil(Ho/s) s ceil(Wo/s)`. Source: Shi et al. 2016 (arXiv 1609.07009), section 2; the flipped sub-kernels of
    Dumoulin & Visin 2016, section 4 (arXiv 1603.07285).
    """

    key = "sub-convolution"
    summary = "transposed convolution as s^2 stride-1 convolutions, their outputs interleaved"
    gemm_formula = "s^2 x [Ho/s Wo/s x (K/s)^2 C]·[(K/s)^2 C x M]"
    workspace_formula = "e N C (H + b + a)(W + b + a) where a tap reaches out, + e N M s^2 ceil(Ho/s) ceil(Wo/s) if odd"
    source = "Shi et al. 2016, section 2 (arXiv 1609.07009)"

    def applicable(self, problem: Problem) -> Reason | None:
        return require_transposed(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, TransposedConvProblem)
        phases = phases_of(problem)
        *outer, inner = (p.positions for p in phases)
        rows = problem.n * prod(problem.stride) * prod(outer)
        # Phases differ in taps: what counts is how many they have on average.
        k = max(1, round(prod(len(p.present) / p.stride for p in phases) * problem.c_group))
        if _by_channel(problem):
            return GemmAxes(rows, inner, problem.c, k, vector_a=True, nr_divides=True)
        return GemmAxes(rows, inner, problem.m_group, k, problem.groups, row_bytes=problem.c * problem.moved_element)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, TransposedConvProblem)
        phases = phases_of(problem)
        *outer, inner = (p.positions for p in phases)
        taps = prod(len(p.present) for p in phases)  # of all phases together
        columns = problem.groups * ceil_div(problem.m_group, tile.nr) * tile.nr
        weights = packed_bytes(problem, tile)
        if _by_channel(problem):
            columns, weights = problem.c, problem.element * problem.c * problem.taps
        rows = problem.n * prod(outer) * ceil_div(inner, tile.mr) * tile.mr
        workspace = {}
        if _copies_input(problem):
            workspace["pad"] = problem.moved_element * problem.n * problem.c * prod(_padded_size(problem))
        if not _whole(problem):
            every = prod(p.stride * p.positions for p in phases)
            workspace["phases"] = problem.scratch_element * problem.n * problem.m * every
        total = sum(workspace.values())
        gemms = _gemms(problem)
        return LoweringCost(
            gemms=gemms,
            macs=rows * columns * taps * problem.c_group,
            bytes_moved=activation_bytes(problem) + weights + 2 * total,
            workspace_bytes=total,
            weight_bytes=weights,
            error_growth=sqrt(gemms[0].k),
            workspace=workspace,
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, TransposedConvProblem)
        whole = _whole(problem)

        def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            return _gemm(problem, tile, epilogue if whole else no_epilogue, data, packed)

        def cut(phases: te.Tensor) -> te.Tensor:
            def element(n: Any, *index: Any) -> Any:
                split = [v for o, s in zip(index[:-1], problem.stride, strict=True) for v in (o // s, o % s)]
                return epilogue(phases(n, *split, *_channel(problem, index[-1])), (n, *index))

            return te.compute((problem.n, *problem.out_size, problem.m), element, name="cut")

        stages: list[Stage] = []
        source = "data"
        if _copies_input(problem):
            source = "pad"
            stages.append(Stage("pad", ("data",), lambda data: _pad(problem, data), "workspace", moves=True))
        stages.append(_by_channel_pack(problem, tile) if _by_channel(problem) else pack_stage(problem, tile))
        if whole:
            return (*stages, Stage("gemm", (source, "packed"), gemm, "output"))
        stages.append(Stage("phases", (source, "packed"), gemm, "workspace"))
        return (*stages, Stage("cut", ("phases",), cut, "output"))


def _gemms(problem: TransposedConvProblem) -> tuple[GemmShape, ...]:
    """The GEMMs of an image and group by the number of taps of their phases, the longest first."""
    phases = phases_of(problem)
    taps = [Counter(r for r, _ in p.present) for p in phases]
    found = Counter(prod(t[r] for t, r in zip(taps, at, strict=True)) for at in product(*map(range, problem.stride)))
    positions, count = prod(p.positions for p in phases), problem.n * problem.groups
    return tuple(
        GemmShape(positions, problem.m_group, k * problem.c_group, phase * count)
        for k, phase in sorted(found.items(), reverse=True)
        if k
    )


def _by_channel(problem: TransposedConvProblem) -> bool:
    """Whether every output channel reads its own input channel: then A is a vector, too."""
    return problem.groups == problem.c == problem.m


def _whole(problem: TransposedConvProblem) -> bool:
    """Whether the phases fill the output exactly, so that they are written where they belong."""
    return all(p.whole for p in phases_of(problem))


def _padded_size(problem: TransposedConvProblem) -> tuple[int, ...]:
    return tuple(sum(p.reach) + p.size for p in phases_of(problem))


def _copies_input(problem: TransposedConvProblem) -> bool:
    """Whether a tap reaches out, or the GEMM would widen each element of its A where it reads it."""
    return _padded_size(problem) != problem.size or (problem.widened and not _by_channel(problem))


def _pad(problem: TransposedConvProblem, data: te.Tensor) -> te.Tensor:
    """The input in its frame of zeros: `(N, *padded, C)`."""

    def element(n: Any, *index: Any) -> Any:
        where, inside = [], []
        for i, p in zip(index[:-1], phases_of(problem), strict=True):
            before, after = p.reach
            where.append(i - before)
            inside += ([i >= before] if before else []) + ([i < before + p.size] if after else [])
        value = data(n, *where, index[-1])
        return tirx.if_then_else(tirx.all(*inside), value, zero(dtype_of(value))) if inside else value

    return te.compute((problem.n, *_padded_size(problem), problem.c), element, name="pad")


def _by_channel_pack(problem: TransposedConvProblem, tile: Tile) -> Stage:
    extents = (*problem.kernel, 1)
    return Stage("packed", ("weight",), lambda w: pack_panels(w, 1, problem.c, extents, tile.nr), "weight")


def _channel(problem: TransposedConvProblem, m: Any) -> list[Any]:
    """The last indices of a channel in the GEMM's output, which has an axis for the groups where there are several."""
    if problem.groups == 1 or _by_channel(problem):
        return [m]
    return [m // problem.m_group, m % problem.m_group]


def _gemm(
    problem: TransposedConvProblem, tile: Tile, epilogue: Epilogue, data: te.Tensor, packed: te.Tensor
) -> te.Tensor:
    """All phases as one GEMM whose outer axes are the image, the phases and the positions but the last; stored as
    `(N, J, s, J, s, (g,) M/g)`.
    """
    phases, dims = phases_of(problem), problem.dims
    *outer, inner = (p.positions for p in phases)
    fronts = [p.reach[0] for p in phases]
    b = read_panels(packed)
    by_channel = _by_channel(problem)
    ragged = not all(p.even for p in phases)
    # Phases outside keep a panel of one phase's weights in the cache. Where phases differ in work they go inside, so
    # that equal shares of the rows are equal shares of the work.
    at_phase, at_row = (dims, 1) if ragged else (1, 1 + dims)
    extents = (problem.n, *outer, *problem.stride) if ragged else (problem.n, *problem.stride, *outer)
    rows = (*range(at_row, at_row + dims - 1), 2 * dims)

    def guarded(at: tuple[Any, ...], k: tuple[Any, ...], value: Any) -> Any:
        exists = [c for p, r, u in zip(phases, at[at_phase : at_phase + dims], k, strict=True) for c in p.exists(r, u)]
        return tirx.if_then_else(tirx.all(*exists), value, zero(problem.accumulator)) if exists else value

    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        position = [(*at, x)[row] for row in rows]
        steps = zip(phases, at[at_phase : at_phase + dims], k[:-1], position, fronts, strict=True)
        where = [p.where(r, u, j) + front for p, r, u, j, front in steps]
        return guarded(at, k[:-1], data(at[0], *where, n if by_channel else g * problem.c_group + k[-1]))

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        steps = zip(phases, at[at_phase : at_phase + dims], k[:-1], strict=True)
        taps = [phase.tap(r, u) for phase, r, u in steps]
        return guarded(at, k[:-1], b(at, g, p, j, (*taps, k[-1])))

    def at_output(value: Any, index: tuple[Any, ...]) -> Any:
        sides = zip((index[row] for row in rows), problem.stride, index[at_phase : at_phase + dims], strict=True)
        return epilogue(value, (index[0], *(j * s + r for j, s, r in sides), index[-1]))

    return tile_gemm(
        outer=extents,
        inner=inner,
        groups=1 if by_channel else problem.groups,
        n=problem.c if by_channel else problem.m_group,
        k_extents=(*(p.taps for p in phases), problem.c_group),
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        epilogue=at_output,
        order=(0, *(axis for d in range(dims) for axis in (rows[d], at_phase + d))),
        ragged=dims if ragged else 0,
    )
