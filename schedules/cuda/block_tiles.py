"""The block tile of a GEMM: which tiles a core offers, and which one a shape takes by default.

The model gives seconds for a tile, the largest of three times plus what cannot overlap:

    compute   waves * seconds of one block's multiply-adds, blocks of a multiprocessor side by side; edges count whole
    from L2   bytes that all blocks copy / bandwidth of the L2
    memory    bytes of A, B and C once / bandwidth

where waves = ceil(blocks / (multiprocessors * blocks that fit by registers, shared memory and threads)). Split-K
divides the reduction among `split` blocks; its partial sums are written, then read by another launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from .core import BlockTile, Core
from .device import MAX_THREADS, REGISTERS_PER_SM, Gpu

L2_PER_SM, L2_PORT = 45e9, 90e9
"""Bytes a second that the L2 delivers for every multiprocessor when all of them read, and to one that reads alone."""
LAUNCH = 2e-6
"""Seconds of one more kernel."""
STAGE_LATENCY = 0.7e-6
"""Seconds until the first stage of a block has arrived and its last sum is stored."""
SPLIT_MARGIN = 1.08
"""By how much a split must win: it takes workspace as well."""
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
MOST_PARTIAL = 2**28
"""Elements of all partial sums: 1 GiB of workspace would not pay."""
RESERVED = 1024
"""Bytes of shared memory that the system takes from every block."""


@dataclass(frozen=True)
class GemmSize:
    """`batch` products C[m][n] = A[m][k] B[n][k]^T; `element` and `out` are bytes of an operand's and of C's element;
    `a_bytes` what A occupies in memory (less than m k of them where its rows overlap)."""

    batch: int
    m: int
    n: int
    k: int
    element: int
    out: int
    a_bytes: int


@dataclass(frozen=True)
class Plan:
    """How a GEMM is divided: the block's tile, how often the reduction is split, and how many column tiles a group of
    blocks covers before the next rows (the raster)."""

    tile: BlockTile
    split: int = 1
    raster: int = 1


def simt_tiles(element: int) -> tuple[BlockTile, ...]:
    """Tiles of the CUDA cores; `element` is 4 or 8 bytes."""
    if element == 8:
        double = ((64, 64, 8, 2, 2), (64, 32, 8, 2, 1), (32, 32, 8, 2, 1), (16, 32, 8, 1, 1))
        return tuple(BlockTile(*shape, stages=3) for shape in double)
    shapes = (
        (128, 128, 16, 4, 2), (128, 64, 16, 4, 1), (64, 128, 16, 2, 2), (64, 64, 16, 2, 2), (128, 32, 16, 4, 1),
        (32, 128, 16, 2, 2), (64, 32, 16, 4, 1), (32, 64, 16, 2, 2), (32, 32, 16, 2, 1), (16, 64, 32, 1, 2),
        (16, 32, 32, 1, 1),
    )  # fmt: skip
    return tuple(BlockTile(*shape, stages=3) for shape in shapes)


def tensor_tiles(element: int) -> tuple[BlockTile, ...]:
    """Tiles of mma.sync; `element` is 2 (halves) or 4 bytes (TF32), a stage's row 64 or 128 bytes."""
    shapes = (
        (128, 128, 64, 2, 2), (128, 128, 128, 2, 2), (128, 256, 64, 2, 4), (256, 128, 64, 4, 2), (128, 64, 128, 2, 2),
        (64, 128, 128, 2, 2), (64, 64, 128, 2, 2), (64, 256, 64, 1, 4), (256, 64, 64, 4, 1), (32, 64, 128, 1, 2),
        (64, 32, 128, 2, 1), (32, 32, 128, 1, 1), (16, 64, 128, 1, 2), (16, 128, 128, 1, 4),
    )  # fmt: skip
    return tuple(BlockTile(m, n, row // element, wm, wn, stages=4) for m, n, row, wm, wn in shapes)


def group_tiles(element: int) -> tuple[BlockTile, ...]:
    """Tiles of the warp groups: a stage's row has 128 bytes."""
    shapes = ((128, 256, 8, 1), (128, 128, 8, 1), (128, 192, 8, 1), (128, 64, 8, 1), (64, 128, 4, 1), (64, 256, 4, 1),
              (64, 64, 4, 1))  # fmt: skip
    return tuple(BlockTile(m, n, 128 // element, wm, wn, stages=4) for m, n, wm, wn in shapes)


def stage_bytes(core: Core, element: int) -> int:
    """Bytes of one stage of both operands."""
    return (core.stage_elements(core.tile.bm) + core.stage_elements(core.tile.bn)) * element


def blocks_per_sm(tile: BlockTile, registers: int, shared: int, gpu: Gpu) -> int:
    """Blocks of a multiprocessor at a time, by registers, shared memory and threads; 0 where not even one fits."""
    if shared > gpu.shared_per_block or tile.threads > MAX_THREADS:
        return 0
    # Registers are given out to warps in groups of 8 a thread.
    by_registers = REGISTERS_PER_SM // (tile.threads * -(-registers // 8) * 8)
    return min(by_registers, gpu.shared_per_sm // (shared + RESERVED), gpu.threads_per_sm // tile.threads, 32)


def seconds(size: GemmSize, plan: Plan, fit: int, rate: float, gpu: Gpu, issued: int = 0) -> float:
    """The model's time of `plan`, `fit` blocks a multiprocessor at a time, `rate` multiply-adds a second of the GPU;
    `issued` are the instructions that copy one stage of a block."""
    tile = plan.tile
    tiles = ceil(size.m / tile.bm) * ceil(size.n / tile.bn) * size.batch
    blocks = tiles * plan.split
    steps = ceil(ceil(size.k / tile.bk) / plan.split)
    waves, rest = divmod(blocks, gpu.multiprocessors * fit)
    # A multiprocessor divides its rate among the blocks it has; the last wave has fewer.
    last = ceil(rest / gpu.multiprocessors)
    warps = tile.warps_m * tile.warps_n
    work = (tile.bm * tile.bn * tile.bk / rate + issued / gpu.fma) * steps * gpu.multiprocessors
    compute = work * (waves * fit / _hidden(warps * fit) + last / _hidden(warps * max(1, last)))
    copied = blocks * (tile.bm + tile.bn) * tile.bk * steps * size.element
    moved = size.a_bytes + size.batch * (size.n * size.k * size.element + size.m * size.n * size.out)
    partial = 0 if plan.split == 1 else 2 * 4 * plan.split * size.batch * size.m * size.n
    busy = min(1.0, blocks / gpu.multiprocessors)
    l2 = min(L2_PER_SM * gpu.multiprocessors, L2_PORT * blocks)
    # Partial sums that fit stay in the L2. They are written while blocks multiply, and read when all are done.
    passed = partial / 2 / (l2 if partial < gpu.l2_bytes else gpu.bandwidth)
    memory = moved / gpu.bandwidth / busy + passed
    extra = LAUNCH + passed if plan.split > 1 else 0.0
    latency = STAGE_LATENCY * (waves + (1 if rest else 0))
    total = max(compute, copied / l2, memory) + latency + extra
    return total * (SPLIT_MARGIN if plan.split > 1 else 1.0)


def _hidden(warps: int) -> float:
    """The share of its rate that a multiprocessor reaches with so many warps: 8 hide the instructions' latency."""
    return min(1.0, 0.5 + 0.5 * warps / 8)


def efficiency(core: str, tile: BlockTile) -> float:
    """The share of the peak that the inner loop of a core can reach: what it reads from shared memory goes with the
    sides of the tile that a thread (simt), a warp (mma) or a warp group (wgmma) has, its work with the area."""
    if core == "wgmma":
        return tile.bn / (tile.bn + 32)
    rows, columns = tile.bm / tile.warps_m, tile.bn / tile.warps_n
    if core == "mma":
        return rows * columns / (rows * columns + 8 * (rows + columns))
    rows, columns = rows / 4, columns / 8
    return rows * columns / (rows * columns + 1.25 * (rows + columns))


def plans(size: GemmSize, tile: BlockTile) -> Iterator[Plan]:
    """The ways to split the reduction with `tile`; each part has at least 4 stages."""
    stages = ceil(size.k / tile.bk)
    for split in SPLITS:
        if split == 1 or (stages // split >= 4 and split * size.batch * size.m * size.n < MOST_PARTIAL):
            steps = ceil(stages / split)
            if ceil(stages / steps) == split:
                yield Plan(tile, split, default_raster(size, tile))


def default_raster(size: GemmSize, tile: BlockTile) -> int:
    """Column tiles that share rows: a group of blocks then covers a part of C that is about square."""
    columns = ceil(size.n / tile.bn)
    return max(width for width in (1, 2, 4, 8) if columns % width == 0)


def with_stages(plan: Plan, stages: int) -> Plan:
    """The same plan with another number of stages."""
    return replace(plan, tile=replace(plan.tile, stages=stages))
