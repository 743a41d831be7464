"""Numbers of the tensor-core cores alone (core_kernel.py: whole tiles, nothing around), on a GPU or the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from core_kernel import core_kernel

from schedules.cuda import mma
from schedules.cuda.block_tiles import group_tiles, tensor_tiles
from schedules.cuda.core import BlockTile, Core
from schedules.cuda.mma import MmaCore
from schedules.cuda.wgmma import WgmmaCore

QUICK = {(16, 64), (64, 64), (128, 64)}
"""Block tiles of the default run: g++ takes a second or two for each. All others are `slow`."""
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def _tiles(tiles: tuple[BlockTile, ...]) -> list:
    """The offered tiles as test parameters."""
    return [
        pytest.param(
            replace(tile, stages=3),
            id=f"{tile.bm}x{tile.bn}x{tile.bk}-{tile.warps_m}x{tile.warps_n}",
            marks=[] if (tile.bm, tile.bn) in QUICK else pytest.mark.slow,
        )
        for tile in tiles
    ]


def _integers(shape: tuple[int, int], dtype: str, seed: int) -> np.ndarray:
    """Whole numbers of -8 .. 8: exact in every operand's dtype, and so are float32 sums of their products."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(DTYPES[dtype])


def _check_exact(
    run_kernel: Callable, core: type[Core], tile: BlockTile, dtype: str, blocks, steps: int, arch: str
) -> None:
    a = _integers((blocks[0] * tile.bm, steps * tile.bk), dtype, 1)
    b = _integers((blocks[1] * tile.bn, steps * tile.bk), dtype, 2)
    (got,) = run_kernel(core_kernel(core, tile, dtype, blocks, steps), a, b, None, arch=arch)
    want = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("tile", _tiles(tensor_tiles(2)))
def test_mma_tiles(run_kernel, tile: BlockTile) -> None:
    """Every offered tile, a reduction longer than the pipeline."""
    _check_exact(run_kernel, MmaCore, tile, "float16", (1, 1), 4, "sm_80")


@pytest.mark.parametrize("bk", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_mma_halves(run_kernel, dtype: str, bk: int) -> None:
    """Every length of a stage's rows; several blocks, warps with 3 fragments of B, the odd one alone."""
    _check_exact(run_kernel, MmaCore, BlockTile(32, 48, bk, 2, 2, 2), dtype, (2, 2), 3, "sm_80")


@pytest.mark.parametrize(
    "dtype, bk",
    [
        ("bfloat16", 32),
        ("float32", 8),
        ("float32", 32),
        pytest.param("float16", 128, marks=pytest.mark.slow),
        pytest.param("float32", 16, marks=pytest.mark.slow),
        pytest.param("float32", 64, marks=pytest.mark.slow),
    ],
)
def test_mma_types(run_kernel, dtype: str, bk: int) -> None:
    """Every dtype, as above."""
    _check_exact(run_kernel, MmaCore, BlockTile(32, 48, bk, 2, 2, 2), dtype, (2, 2), 3, "sm_80")


def test_mma_on_sm_75(run_kernel) -> None:
    """float16 without asynchronous copies."""
    _check_exact(run_kernel, MmaCore, BlockTile(64, 64, 32, 2, 2, 2), "float16", (1, 2), 3, "sm_75")


@pytest.mark.parametrize("tile", _tiles(group_tiles(2)))
def test_wgmma_tiles(run_kernel, tile: BlockTile) -> None:
    """Every offered tile; one group of multiplications stays in flight, so a stage that is overwritten early shows."""
    _check_exact(run_kernel, WgmmaCore, tile, "float16", (1, 1), 4, "sm_90")


@pytest.mark.parametrize("dtype, steps", [("float16", 1), ("bfloat16", 2), ("float32", 5)])
def test_wgmma_types(run_kernel, dtype: str, steps: int) -> None:
    """Every dtype, reductions shorter and longer than the pipeline, several blocks."""
    bk = 128 // mma.OPERANDS[dtype]
    _check_exact(run_kernel, WgmmaCore, BlockTile(128, 40, bk, 8, 1, 4), dtype, (2, 2), steps, "sm_90")


def _rounded(x: np.ndarray) -> np.ndarray:
    """float32 rounded to 10 bits of mantissa, ties away from zero."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _cut(x: np.ndarray) -> np.ndarray:
    """float32 without its lower 13 bits."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize(
    "core, shape, as_tf32, arch",
    [(MmaCore, (2, 2), _rounded, "sm_80"), (WgmmaCore, (4, 1), _cut, "sm_90")],
)
def test_tf32_operands(run_kernel, core: type[Core], shape: tuple[int, int], as_tf32: Callable, arch: str) -> None:
    """float32 operands enter as mma.py rounds them and as wgmma.py says that the hardware cuts them."""
    tile = BlockTile(64, 64, 32, *shape, 3)
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal((64, 128)).astype(np.float32) for _ in range(2))
    (got,) = run_kernel(core_kernel(core, tile, "float32", (1, 1), 4), a, b, None, arch=arch)
    exact_a, exact_b = (as_tf32(x).astype(np.float64) for x in (a, b))
    scale = np.abs(exact_a) @ np.abs(exact_b).T
    assert np.abs(got - exact_a @ exact_b.T).max() <= (scale * 2**-20).max()
    plain = np.abs(got - a.astype(np.float64) @ b.astype(np.float64).T) / scale
    assert 2**-16 < plain.max() < 2**-9, "the operands are rounded, and by no more than TF32"


def test_tf32_keeps_what_is_no_number(run_kernel) -> None:
    """Rounding does not turn NaN into a number nor infinity into NaN."""
    tile = BlockTile(32, 32, 16, 2, 2, 2)
    a, b = (np.ones((32, 16), np.float32) for _ in range(2))
    a[3, 5], a[7, 0] = np.float32(np.nan), np.inf
    a.view(np.uint32)[9, 1] = 0x7FFFFFFF  # the NaN that GPUs make
    (got,) = run_kernel(core_kernel(MmaCore, tile, "float32", (1, 1), 1), a, b, None, arch="sm_80")
    assert np.isnan(got[[3, 9]]).all() and np.isposinf(got[7]).all()
    assert (np.delete(got, [3, 7, 9], axis=0) == 16).all()


class _Hasty(WgmmaCore):
    """Tells the skeleton that nothing is in flight, and leaves a group in flight nevertheless."""

    in_flight = 0

    def settle(self) -> None:
        self.in_flight = 1
        super().settle()
        self.in_flight = 0


def test_a_stage_overwritten_in_flight_shows(run_kernel, emulated: bool) -> None:
    """The tests above would see a skeleton that overwrites a stage which wgmma still reads."""
    if not emulated:
        pytest.skip("a race has no certain result on a GPU")
    tile = BlockTile(64, 64, 64, 4, 1, 3)
    with pytest.raises(pytest.fail.Exception, match="race"):
        _check_exact(run_kernel, _Hasty, tile, "float16", (1, 1), 4, "sm_90")
