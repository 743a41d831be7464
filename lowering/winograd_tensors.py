"""The tensors of minimal filtering: tiling, transforms as one-dimensional passes, the GEMMs between them.

Sizes come in tuples, one entry a spatial dimension; a dimension whose kernel is 1 passes through (`m = alpha = 1`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

from tvm import te, tirx

from .base import Epilogue, Tile, ceil_div, no_epilogue
from .cook_toom import Matrix, Transforms, apply_row, terms, transforms
from .problem import ConvProblem
from .tile_gemm import AXES_ANNOTATION, tile_gemm

CHAIN_ANNOTATION = "gemmify.chain"
BLOCK_ANNOTATION = "gemmify.block"
ONCE_ANNOTATION = "gemmify.once"

# Positions of a tile that the transforms may unroll: the code grows with them, and LLVM's time.
MOST_POSITIONS = 64
# The transformed tiles of one block should stay in a core's own cache.
BLOCK_BYTES = 640 << 10
BLOCK_TILES = 64
# From this many blocks on, blocks alone keep the cores busy and the input transform is fused into them.
FUSE_BLOCKS = 8
FUSE_TILES = 12
# Blocks that a tuner may try: fewer tiles make no register tile, more leave every cache.
FEWEST_TILES, MOST_TILES = 4, 256
# A staged problem's fused form holds a block's tiles, and their products for so many channels at a time, in so much
# shared memory: what every GPU gives a block without being asked.
SHARED_BYTES = 48 << 10
SHARED_TILES = 16
SHARED_CHANNELS = 16
# So many times BLOCK_BYTES the transformed tiles of a block may take there.
SPILL = 4


@dataclass(frozen=True)
class Form:
    """Sizes of one problem: `grid` tiles of `m` outputs an image, in blocks of `block` tiles; kernel `r`.

    `fused`: the input transform runs inside each block (no V in memory), not ahead of all of them.
    """

    m: tuple[int, ...]
    r: tuple[int, ...]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    fused: bool

    @property
    def alpha(self) -> tuple[int, ...]:
        return tuple(m + r - 1 for m, r in zip(self.m, self.r, strict=True))

    @property
    def positions(self) -> int:
        """Positions in a tile, each a GEMM of its own: `alpha^2`."""
        return prod(self.alpha)

    @property
    def tiles(self) -> int:
        """Tiles of a block: `Pb`."""
        return prod(self.block)

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(t // b for t, b in zip(self.grid, self.block, strict=True))

    @property
    def transforms(self) -> tuple[Transforms, ...]:
        return tuple(transforms(m, r) for m, r in zip(self.m, self.r, strict=True))


def tile_edge(problem: ConvProblem, m: int) -> tuple[int, ...]:
    """Outputs of a tile in each dimension: `m`, or 1 where the kernel is 1."""
    return tuple(m if k > 1 else 1 for k in problem.kernel)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@lru_cache(maxsize=4096)
def form_of(problem: ConvProblem, m: int, block: tuple[int, ...] | None = None, fused: bool | None = None) -> Form:
    """The tiling of `problem`, blocks never padded up; `block` and `fused` default to `_default`'s,
    each on its own."""
    if problem.staged:
        # One tile a block: the GEMM's rows, tiles of all images, then lie at one distance.
        shared = shared_block(problem, m) if fused else None
        block, fused = shared or (1,) * problem.dims, shared is not None
    if block is None or fused is None:
        usual_block, usual_fused = _default(problem, m)
        block, fused = usual_block if block is None else block, usual_fused if fused is None else fused
    edge, grid, _ = _tiling(problem, m)
    assert all(g % b == 0 for g, b in zip(grid, block, strict=True)), f"blocks of {block} in a grid of {grid}"
    return Form(edge, problem.kernel, grid, block, fused)


def _tiling(problem: ConvProblem, m: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(outputs of a tile, tiles of an image, positions of a tile)"""
    edge = tile_edge(problem, m)
    grid = tuple(ceil_div(size, e) for size, e in zip(problem.out_size, edge, strict=True))
    return edge, grid, prod(e + k - 1 for e, k in zip(edge, problem.kernel, strict=True))


@lru_cache(maxsize=1024)
def _default(problem: ConvProblem, m: int) -> tuple[tuple[int, ...], bool]:
    """(block, fused): the largest block within BLOCK_BYTES and BLOCK_TILES that leaves FUSE_BLOCKS blocks; where such
    blocks would be too small for a register tile, the largest block that there is (the input is then transformed ahead
    of all blocks)."""
    _, grid, positions = _tiling(problem, m)
    limit = max(1, min(BLOCK_TILES, BLOCK_BYTES // (positions * problem.c * problem.scratch_element)))
    blocks = [b for b in product(*map(_divisors, grid)) if prod(b) <= BLOCK_TILES]
    fused = [b for b in blocks if prod(b) <= limit and problem.n * prod(grid) >= FUSE_BLOCKS * prod(b)]
    fused = [b for b in fused if prod(b) >= FUSE_TILES]
    block = max(fused or blocks, key=lambda b: (prod(b), *reversed(b)))
    return block, problem.n * prod(grid) >= FUSE_BLOCKS * prod(block)


@lru_cache(maxsize=1024)
def shared_block(problem: ConvProblem, m: int) -> tuple[int, ...] | None:
    """The block of a staged problem whose transformed tiles and products stay in the shared memory of a GPU's block
    of threads: the most tiles, at most SHARED_TILES, that SHARED_BYTES hold. None where that are too few for a
    register tile, and for groups."""
    _, grid, positions = _tiling(problem, m)
    # One more vector a row keeps rows in different banks.
    tile_bytes = positions * (problem.c * problem.scratch_element + 16 + SHARED_CHANNELS * problem.scratch_element)
    most = min(SHARED_TILES, SHARED_BYTES // tile_bytes)
    blocks = [b for b in product(*map(_divisors, grid)) if min(FEWEST_TILES, prod(grid)) <= prod(b) <= most]
    if problem.groups > 1 or not blocks:
        return None
    return max(blocks, key=lambda b: (prod(b), -max(b), b))


@lru_cache(maxsize=1024)
def block_choices(problem: ConvProblem, m: int) -> tuple[tuple[int, ...], ...]:
    """Blocks that may be tried, the default first, then by their number of tiles.

    The divisors of the grid, FEWEST_TILES to MOST_TILES tiles (all of a smaller grid) whose transform takes at most
    SPILL times BLOCK_BYTES; of the same number of tiles the two shapes that are nearest to whole rows and to squares.
    """
    _, grid, positions = _tiling(problem, m)
    usual, _ = _default(problem, m)
    tile_bytes = positions * problem.c * problem.scratch_element
    most = max(prod(usual), min(MOST_TILES, SPILL * BLOCK_BYTES // tile_bytes))
    least = min(FEWEST_TILES, prod(grid))
    by_tiles: dict[int, list[tuple[int, ...]]] = {}
    for b in product(*map(_divisors, grid)):
        if least <= prod(b) <= most:
            by_tiles.setdefault(prod(b), []).append(b)
    kept = [usual]
    for _, same in sorted(by_tiles.items()):
        kept += [max(same, key=lambda b: b[::-1]), min(same, key=lambda b: (max(b) / min(b), b))]
    return tuple(dict.fromkeys(kept))


def _unravel(position: Any, extents: Sequence[int]) -> list[Any]:
    """The index of the row-major `position` in a box of `extents`, without superfluous divisions."""
    index: list[Any] = []
    for extent in reversed(extents[1:]):
        index.insert(0, position % extent)
        position = position // extent
    return [position, *index]


def transform_flops(form: Form, c: int, columns: int) -> int:
    """Multiply-adds of the input's transform (`c` channels) and the output's (`columns`) of one tile."""
    flops = 0
    for d, t in enumerate(form.transforms):
        if form.alpha[d] == 1:
            continue
        flops += terms(t.bt) * (form.positions // form.alpha[d]) * c
        flops += terms(t.at) * prod(form.m[:d]) * prod(form.alpha[d + 1 :]) * columns
    # Tiles of 64 values spill: half as much again was measured for the transforms of F(6x6, 3x3) and F(4x4, 5x5).
    return flops * 3 // 2 if form.positions == MOST_POSITIONS else flops


Read = Callable[[tuple[Any, ...]], Any]
"""An element by its whole index."""


def _passes(
    form: Form, matrices: Sequence[Matrix], lead: int, read: Read, store: Callable[[int, Read], Read], dtype: str
) -> Read:
    """Apply `matrices[d]` along axis `lead + d` of the index, one dimension after another.

    `read` gives the elements that the first pass takes; every pass but the last goes through `store(d, element)`, which
    makes a tensor of it. Returns the element of the last pass.
    """
    active = [d for d, (m, r) in enumerate(zip(form.m, form.r, strict=True)) if m > 1 or r > 1]
    for d in active:
        read = _one_pass(read, lead + d, matrices[d], dtype)
        if d != active[-1]:
            read = store(d, read)
    return read


def _one_pass(read: Read, axis: int, matrix: Matrix, dtype: str) -> Read:
    def element(index: tuple[Any, ...]) -> Any:
        return apply_row(index[axis], matrix, lambda s: read((*index[:axis], s, *index[axis + 1 :])), dtype)

    return element


def _stored(shape: Sequence[int], element: Read, name: str) -> Read:
    tensor = te.compute(tuple(shape), lambda *index: element(index), name=name)
    return lambda index: tensor(*index)


def transform_weight(problem: ConvProblem, form: Form, tile: Tile, weight: te.Tensor) -> te.Tensor:
    """`U = G g G^T`: `(M, *r, C)` to `[M/nr][*alpha][C][nr]`, zeros past the last channel."""
    dims, dtype, c = problem.dims, problem.accumulator, problem.c_group

    def store(d: int, element: Read) -> Read:
        sizes = (problem.m, *form.alpha[: d + 1], *form.r[d + 1 :], c)
        return _stored(sizes, element, f"winograd_weight_{d}")

    matrices = [t.g for t in form.transforms]
    transformed = _passes(form, matrices, 1, lambda index: weight(*index), store, dtype)

    def packed(p: Any, *index: Any) -> Any:
        m = p * tile.nr + index[-1]
        value = transformed((tirx.min(m, problem.m - 1), *index[:-1]))
        return value if problem.m % tile.nr == 0 else tirx.if_then_else(m < problem.m, value, tirx.const(0, dtype))

    shape = (ceil_div(problem.m, tile.nr), *form.alpha, c, tile.nr)
    attrs = {CHAIN_ANNOTATION: "o" + "u" * dims + "rv", ONCE_ANNOTATION: 1}
    return te.compute(shape, packed, name="packed", attrs=attrs)


def transform_input(problem: ConvProblem, form: Form, data: te.Tensor) -> te.Tensor:
    """`V = B^T d B`: `[N][*blocks][*alpha][Pb][C]`, the tile zero outside the input."""
    dims, dtype = problem.dims, problem.accumulator
    lead = 2 + dims  # the index within a tile stands behind N, the block and the tile of the block

    def gather(n: Any, *index: Any) -> Any:
        block, q, at, channel = index[:dims], _unravel(index[dims], form.block), index[dims + 1 : -1], index[-1]
        where = [
            (b * size + t) * m + i - before
            for b, size, t, m, i, before in zip(block, form.block, q, form.m, at, problem.pad_before, strict=True)
        ]
        inside = [test for w, size in zip(where, problem.size, strict=True) for test in (w >= 0, w < size)]
        # A branch, not a Select: that reads on both sides, and TVM drops a clamp which the condition makes needless.
        return tirx.if_then_else(tirx.all(*inside), data(n, *where, channel), tirx.const(0, dtype))

    shape = (problem.n, *form.blocks, form.tiles, *form.alpha, problem.c)
    tile = te.compute(shape, gather, name="winograd_tile")
    transformed = _passes(
        form,
        [t.bt for t in form.transforms],
        lead,
        lambda index: tile(*index),
        lambda d, element: _stored(shape, element, f"winograd_input_{d}"),
        dtype,
    )

    if problem.staged and not form.fused:
        # Position by position, so that the rows of each GEMM lie side by side.
        return te.compute(
            (*form.alpha, problem.n, *form.grid, problem.c),
            lambda *index: transformed((*index[dims:-1], 0, *index[:dims], index[-1])),
            name="winograd_input",
            attrs={CHAIN_ANNOTATION: "u" * dims + "o" * (1 + dims) + "v"},
        )

    def element(n: Any, *index: Any) -> Any:
        block, at, q, channel = index[:dims], index[dims : 2 * dims], index[-2], index[-1]
        return transformed((n, *block, q, *at, channel))

    return te.compute(
        (problem.n, *form.blocks, *form.alpha, form.tiles, problem.c),
        element,
        name="winograd_input",
        attrs={CHAIN_ANNOTATION: "o" * (1 + dims) + "u" * dims + "rv"},
    )


def multiply(
    problem: ConvProblem, form: Form, tile: Tile, epilogue: Epilogue, v: te.Tensor, packed: te.Tensor
) -> te.Tensor:
    """The alpha^2 GEMMs of a block, a panel of channels at a time, and the inverse transform `Y = A^T M A`."""
    dims, panels = problem.dims, ceil_div(problem.m, tile.nr)
    k = te.reduce_axis((0, problem.c_group), name="k0")
    per_group = problem.m_group // tile.nr

    def element(*index: Any) -> Any:
        at, p, (t, r, s) = index[: 1 + dims], index[1 + dims], index[-3:]
        position = index[2 + dims : -3]
        channel = k if problem.groups == 1 else p // per_group * problem.c_group + k
        return te.sum(v(*at, *position, t * tile.mr + r, channel) * packed(p, *position, k, s), axis=k)

    grid = (problem.n, *form.blocks, panels, *form.alpha)
    acc = te.compute(
        (*grid, form.tiles // tile.mr, tile.mr, tile.nr),
        element,
        name="gemm_acc",
        attrs={AXES_ANNOTATION: "o" * (1 + dims) + "p" + "o" * dims + "tij"},
    )
    product = te.compute(
        (*grid, form.tiles, tile.nr),
        lambda *index: acc(*index[:-2], index[-2] // tile.mr, index[-2] % tile.mr, index[-1]),
        name="winograd_product",
    )

    def of_block(index: tuple[Any, ...]) -> Any:
        n, at, p, position, s = index[0], index[1 : 1 + dims], index[1 + dims], index[2 + dims : -1], index[-1]
        q: Any = 0
        for t, size in zip(at, form.block, strict=True):
            q = q * size + t % size
        return product(n, *(t // size for t, size in zip(at, form.block, strict=True)), p, *position, q, s)

    return _inverse(problem, form, tile, epilogue, of_block)


def multiply_apart(problem: ConvProblem, form: Form, tile: Tile, v: te.Tensor, packed: te.Tensor) -> te.Tensor:
    """The alpha^2 GEMMs over the tiles of all images, `[*alpha][N][*grid][(g)][M/g]`, of a staged problem's V."""
    dims = problem.dims

    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        del n
        return v(*at, x, g * problem.c_group + k[0])

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        column = g * problem.m_group + p * tile.nr + j
        return packed(column // tile.nr, *at[:dims], k[0], column % tile.nr)

    *outer, inner = form.grid
    return tile_gemm(
        outer=(*form.alpha, problem.n, *outer),
        inner=inner,
        groups=problem.groups,
        n=problem.m_group,
        k_extents=(problem.c_group,),
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        epilogue=no_epilogue,
        name="winograd_product",
    )


def inverse_apart(problem: ConvProblem, form: Form, tile: Tile, epilogue: Epilogue, product: te.Tensor) -> te.Tensor:
    """`Y = A^T M A` from the tensor of `multiply_apart`."""
    dims = problem.dims

    def read(index: tuple[Any, ...]) -> Any:
        *tile_of, p = index[: 2 + dims]
        m = p * tile.nr + index[-1]
        channel = (m // problem.m_group, m % problem.m_group) if problem.groups > 1 else (m,)
        return product(*index[2 + dims : -1], *tile_of, *channel)

    return _inverse(problem, form, tile, epilogue, read)


def _inverse(problem: ConvProblem, form: Form, tile: Tile, epilogue: Epilogue, read: Read) -> te.Tensor:
    """The output from the products, which `read` gives by `(n, *tile, panel, *position, column)`."""
    dims, panels = problem.dims, ceil_div(problem.m, tile.nr)

    def store(d: int, element: Read) -> Read:
        sizes = (*form.m[: d + 1], *form.alpha[d + 1 :])
        return _stored((problem.n, *form.grid, panels, *sizes, tile.nr), element, f"winograd_output_{d}")

    outputs = _passes(form, [t.at for t in form.transforms], 2 + dims, read, store, problem.accumulator)
    tiles = te.compute(
        (problem.n, *form.grid, panels, *form.m, tile.nr),
        lambda *index: outputs(index),
        name="winograd_output",
        attrs={CHAIN_ANNOTATION: "o" + "b" * dims + "p" + "u" * dims + "v", BLOCK_ANNOTATION: list(form.block)},
    )

    def element(n: Any, *index: Any) -> Any:
        out, ch = index[:-1], index[-1]
        tile_of = [o // m for o, m in zip(out, form.m, strict=True)]
        within = [o % m for o, m in zip(out, form.m, strict=True)]
        return epilogue(tiles(n, *tile_of, ch // tile.nr, *within, ch % tile.nr), (n, *index))

    return te.compute((problem.n, *problem.out_size, problem.m), element, name="gemm")
