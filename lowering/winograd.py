"""`winograd-2`, `winograd-4`, `winograd-6`: minimal filtering, fewer multiplications for small stride-1 kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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
    require_conv,
)
from .cook_toom import POINTS, amplification, apply_row, terms, transforms
from .problem import ConvProblem, Problem
from .tile_gemm import AXES_ANNOTATION
from .window import activation_bytes

CHAIN_ANNOTATION = "gemmify.chain"
BLOCK_ANNOTATION = "gemmify.block"
ONCE_ANNOTATION = "gemmify.once"

# The transformed tiles of one block should stay in a core's own cache.
BLOCK_BYTES = 640 << 10
BLOCK_TILES = 64
# From this many blocks on, blocks alone keep the cores busy and the input transform is fused into them.
FUSE_BLOCKS = 8
FUSE_TILES = 12


@dataclass(frozen=True)
class _Form:
    """Sizes of one problem: `th x tw` tiles an image in blocks of `bh x bw`, `alpha` the tile's edge."""

    m: int
    r: int
    th: int
    tw: int
    bh: int
    bw: int

    @property
    def alpha(self) -> int:
        return self.m + self.r - 1

    @property
    def tiles(self) -> int:
        return self.bh * self.bw

    @property
    def blocks(self) -> tuple[int, int]:
        return self.th // self.bh, self.tw // self.bw


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@lru_cache(maxsize=1024)
def form_of(problem: ConvProblem, m: int) -> _Form:
    """The tiling of `problem`, blocks never padded up.

    The largest block within BLOCK_BYTES and BLOCK_TILES that leaves FUSE_BLOCKS blocks; where such blocks would be too
    small for a register tile, the largest block that there is (the input is then transformed ahead of all blocks).
    """
    th, tw = (ceil_div(size, m) for size in problem.out_size)
    alpha = m + problem.kernel[0] - 1
    limit = max(1, min(BLOCK_TILES, BLOCK_BYTES // (alpha * alpha * problem.c * problem.element)))
    blocks = [(bh, bw) for bh in _divisors(th) for bw in _divisors(tw) if bh * bw <= BLOCK_TILES] or [(1, 1)]
    fused = [b for b in blocks if b[0] * b[1] <= limit and problem.n * th * tw >= FUSE_BLOCKS * b[0] * b[1]]
    fused = [b for b in fused if b[0] * b[1] >= FUSE_TILES]
    bh, bw = max(fused or blocks, key=lambda b: (b[0] * b[1], b[1]))
    return _Form(m, problem.kernel[0], th, tw, bh, bw)


class Winograd(Lowering):
    """F(m x m, r x r): each `alpha x alpha` input tile becomes `m x m` outputs through `alpha^2` GEMMs, `alpha = m +
    r - 1`.

        V = B^T d B,  U = G g G^T,  Y = A^T [sum_c U_c * V_c] A
        GEMM: [P x C]·[C x M] for each of the alpha^2 tile positions, P = N ceil(Ho/m) ceil(Wo/m) tiles

    Reads `(N, H, W, C)`, writes `(N, Ho, Wo, M)`. Blocks of `Pb` tiles go through transform, GEMM and inverse transform
    together, each transform as two 1-D passes. Multiplications fall by `(m r / alpha)^2`; weights grow to
    `e alpha^2 C M` and rounding errors with `m`. Source: Lavin & Gray 2015, section 4, algorithm 1 (arXiv 1509.09308).
    """

    m: int
    gemm_formula = "alpha^2 x [P x C]·[C x M]"
    workspace_formula = "e alpha^2 (P C + threads Pb nr); with many blocks threads e alpha^2 Pb (C + nr)"
    source = "Lavin & Gray 2015, section 4, algorithm 1 (arXiv 1509.09308)"

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is not None:
            return reason
        assert isinstance(problem, ConvProblem)
        if problem.dims != 2:
            return Reason(f"needs 2 spatial dimensions, got {problem.dims}")
        if problem.groups == problem.c:
            return Reason(f"needs more than one channel a group, got groups = C = {problem.groups}")
        if problem.stride != (1, 1):
            return Reason(f"needs stride 1, got {problem.stride[0]}x{problem.stride[1]}")
        if problem.dilation != (1, 1):
            return Reason(f"needs dilation 1, got {problem.dilation[0]}x{problem.dilation[1]}")
        kernel = problem.kernel
        if kernel[0] != kernel[1] or kernel[0] not in (3, 5) or self.m + kernel[0] - 1 > len(POINTS) + 1:
            return Reason(
                f"needs a 3x3 kernel, or 5x5 where m + 4 <= {len(POINTS) + 1}, "
                f"got {kernel[0]}x{kernel[1]} with m = {self.m}"
            )
        return None

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        form = form_of(problem, self.m)
        by, bx = form.blocks
        outer = problem.n * by * bx * form.alpha**2
        # A panel of channels must lie within one group.
        return GemmAxes(
            outer * problem.groups,
            form.tiles,
            problem.m_group,
            problem.c_group,
            nr_divides=problem.groups > 1,
            mr_divides=True,
        )

    def fused(self, problem: ConvProblem) -> bool:
        """Whether the input transform runs inside each block (no V in memory) or ahead of all of them."""
        by, bx = form_of(problem, self.m).blocks
        return problem.n * by * bx >= FUSE_BLOCKS

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        form = form_of(problem, self.m)
        positions, tiles = form.alpha**2, problem.n * form.th * form.tw
        columns = ceil_div(problem.m, tile.nr) * tile.nr
        weights = problem.element * positions * problem.c_group * columns
        workspace = {} if self.fused(problem) else {"winograd_input": problem.element * positions * tiles * problem.c}
        blocks = problem.n * form.blocks[0] * form.blocks[1]
        bt, at = terms(transforms(form.m, form.r).bt), terms(transforms(form.m, form.r).at)
        transform = tiles * (2 * form.alpha * bt * problem.c + (form.alpha + form.m) * at * columns)
        return LoweringCost(
            gemms=(GemmShape(tiles, problem.m_group, problem.c_group, positions * problem.groups),),
            macs=positions * tiles * problem.c_group * columns,
            bytes_moved=activation_bytes(problem) + weights + 2 * sum(workspace.values()),
            workspace_bytes=sum(workspace.values()),
            weight_bytes=weights,
            error_growth=problem.c_group**0.5 * float(amplification(self.m, form.r)),
            workspace=workspace,
            extra_flops=transform,
            weight_reads=blocks,
            tasks=blocks if not workspace else blocks * (columns // tile.nr),
            thread_bytes=problem.element * positions * form.tiles * (tile.nr + (problem.c if not workspace else 0)),
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        form = form_of(problem, self.m)
        weight = Stage("packed", ("weight",), lambda w: _transform_weight(problem, form, tile, w), "weight")
        if self.fused(problem):

            def whole(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
                return _multiply(problem, form, tile, epilogue, _transform_input(problem, form, data), packed)

            return (weight, Stage("gemm", ("data", "packed"), whole, "output"))

        def multiply(v: te.Tensor, packed: te.Tensor) -> te.Tensor:
            return _multiply(problem, form, tile, epilogue, v, packed)

        return (
            Stage("winograd_input", ("data",), lambda data: _transform_input(problem, form, data), "workspace"),
            weight,
            Stage("gemm", ("winograd_input", "packed"), multiply, "output"),
        )


def _transform_weight(problem: ConvProblem, form: _Form, tile: Tile, weight: te.Tensor) -> te.Tensor:
    """`U = G g G^T`: `(M, r, r, C)` to `[M/nr][alpha][alpha][C][nr]`, zeros past the last channel."""
    g, a, dtype = transforms(form.m, form.r).g, form.alpha, problem.dtype
    rows = te.compute(
        (problem.m, a, form.r, problem.c_group),
        lambda m, i, k, c: apply_row(i, g, lambda s: weight(m, s, k, c), dtype),
        name="winograd_weight_rows",
    )

    def element(p: Any, i: Any, j: Any, c: Any, column: Any) -> Any:
        m = p * tile.nr + column
        value = apply_row(j, g, lambda s: rows(tirx.min(m, problem.m - 1), i, s, c), dtype)
        return value if problem.m % tile.nr == 0 else tirx.Select(m < problem.m, value, tirx.const(0, dtype))

    shape = (ceil_div(problem.m, tile.nr), a, a, problem.c_group, tile.nr)
    return te.compute(shape, element, name="packed", attrs={CHAIN_ANNOTATION: "ouurv", ONCE_ANNOTATION: 1})


def _transform_input(problem: ConvProblem, form: _Form, data: te.Tensor) -> te.Tensor:
    """`V = B^T d B`: `[N][By][Bx][alpha][alpha][Pb][C]`, the tile read with clamped addresses and masked outside."""
    bt, a, dtype = transforms(form.m, form.r).bt, form.alpha, problem.dtype
    by, bx = form.blocks
    c = problem.c

    def gather(n: Any, y: Any, x: Any, q: Any, i: Any, j: Any, channel: Any) -> Any:
        where = (
            (y * form.bh + q // form.bw) * form.m + i - problem.pad_before[0],
            (x * form.bw + q % form.bw) * form.m + j - problem.pad_before[1],
        )
        clamped = [tirx.min(tirx.max(w, 0), size - 1) for w, size in zip(where, problem.size, strict=True)]
        inside = [test for w, size in zip(where, problem.size, strict=True) for test in (w >= 0, w < size)]
        return tirx.Select(tirx.all(*inside), data(n, *clamped, channel), tirx.const(0, dtype))

    tile = te.compute((problem.n, by, bx, form.tiles, a, a, c), gather, name="winograd_tile")
    rows = te.compute(
        (problem.n, by, bx, form.tiles, a, a, c),
        lambda n, y, x, q, i, j, ch: apply_row(i, bt, lambda s: tile(n, y, x, q, s, j, ch), dtype),
        name="winograd_input_rows",
    )
    return te.compute(
        (problem.n, by, bx, a, a, form.tiles, c),
        lambda n, y, x, i, j, q, ch: apply_row(j, bt, lambda s: rows(n, y, x, q, i, s, ch), dtype),
        name="winograd_input",
        attrs={CHAIN_ANNOTATION: "ooouurv"},
    )


def _multiply(
    problem: ConvProblem, form: _Form, tile: Tile, epilogue: Epilogue, v: te.Tensor, packed: te.Tensor
) -> te.Tensor:
    """The alpha^2 GEMMs of a block, a panel of channels at a time, and the inverse transform `Y = A^T M A`."""
    at, a, dtype, m = transforms(form.m, form.r).at, form.alpha, problem.dtype, form.m
    (by, bx), panels = form.blocks, ceil_div(problem.m, tile.nr)
    k = te.reduce_axis((0, problem.c_group), name="k0")
    per_group = problem.m_group // tile.nr
    grid = (problem.n, by, bx, panels)

    def multiply(n: Any, y: Any, x: Any, p: Any, i: Any, j: Any, t: Any, r: Any, s: Any) -> Any:
        channel = k if problem.groups == 1 else p // per_group * problem.c_group + k
        return te.sum(v(n, y, x, i, j, t * tile.mr + r, channel) * packed(p, i, j, k, s), axis=k)

    acc = te.compute(
        (*grid, a, a, form.tiles // tile.mr, tile.mr, tile.nr),
        multiply,
        name="gemm_acc",
        attrs={AXES_ANNOTATION: "ooopootij"},
    )
    product = te.compute(
        (*grid, a, a, form.tiles, tile.nr),
        lambda n, y, x, p, i, j, q, s: acc(n, y, x, p, i, j, q // tile.mr, q % tile.mr, s),
        name="winograd_product",
    )
    tiles_grid = (problem.n, form.th, form.tw, panels)

    def position(ty: Any, tx: Any) -> tuple[Any, Any, Any]:
        return ty // form.bh, tx // form.bw, (ty % form.bh) * form.bw + tx % form.bw

    def product_row(n: Any, ty: Any, tx: Any, p: Any, i: Any, j: Any, s: Any) -> Any:
        y, x, q = position(ty, tx)
        return apply_row(i, at, lambda l: product(n, y, x, p, l, j, q, s), dtype)

    rows = te.compute((*tiles_grid, m, a, tile.nr), product_row, name="winograd_output_rows")
    tiles = te.compute(
        (*tiles_grid, m, m, tile.nr),
        lambda n, ty, tx, p, i, j, s: apply_row(j, at, lambda l: rows(n, ty, tx, p, i, l, s), dtype),
        name="winograd_output",
        attrs={CHAIN_ANNOTATION: "obbpuuv", BLOCK_ANNOTATION: [form.bh, form.bw]},
    )

    def element(n: Any, y: Any, x: Any, ch: Any) -> Any:
        value = tiles(n, y // m, x // m, ch // tile.nr, y % m, x % m, ch % tile.nr)
        return epilogue(value, (n, y, x, ch))

    return te.compute((problem.n, *problem.out_size, problem.m), element, name="gemm")


class Winograd2(Winograd):
    """F(2x2, 3x3) or F(2x2, 5x5): 2.25 or 2.78 times fewer multiplications; the mildest rounding."""

    key, m = "winograd-2", 2
    summary = "minimal filtering, 2x2 outputs a tile"


class Winograd4(Winograd):
    """F(4x4, 3x3) or F(4x4, 5x5): 4 or 6.25 times fewer multiplications."""

    key, m = "winograd-4", 4
    summary = "minimal filtering, 4x4 outputs a tile"


class Winograd6(Winograd):
    """F(6x6, 3x3): 5.06 times fewer multiplications, the largest rounding errors."""

    key, m = "winograd-6", 6
    summary = "minimal filtering, 6x6 outputs a tile"
