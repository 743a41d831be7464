"""The machine code of the tensor-core cores: the instructions are there, every offered tile fits the registers.

Kernels are those of core_kernel.py (whole tiles, no epilogue); nvcc compiles them, no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import pytest
import tvm
from core_kernel import core_kernel

from gemmify.cuda.resources import parse_resources
from gemmify.cuda.toolchain import find_nvcc
from gemmify.errors import GemmifyError
from schedules import Machine, machine_of, parse_target
from schedules.cuda import mma
from schedules.cuda.block_tiles import group_tiles, tensor_tiles
from schedules.cuda.core import BlockTile
from schedules.cuda.device import gpu_of
from schedules.cuda.mma import MmaCore
from schedules.cuda.wgmma import WgmmaCore


def _nvcc() -> str:
    try:
        return find_nvcc()
    except GemmifyError as err:
        pytest.skip(str(err))


def _text(functions: dict[str, tvm.tirx.PrimFunc], arch: str) -> str:
    """The CUDA text of several kernels in one module."""
    named = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    module = tvm.compile(tvm.IRModule(named), target=parse_target(f"cuda -arch={arch}"), tir_pipeline="s_tir")
    return module.mod.imports[0].inspect_source()


class Code:
    """PTX of several kernels, and what ptxas says of it."""

    def __init__(self, functions: dict[str, tvm.tirx.PrimFunc], arch: str, folder) -> None:
        nvcc, text, ptx = _nvcc(), folder / "kernels.cu", folder / "kernels.ptx"
        text.write_text(_text(functions, arch.rstrip("a")), encoding="utf-8")
        self._run([nvcc, "-O3", "-std=c++17", "-w", f"-arch={arch}", "-ptx", "-o", ptx, text])
        words = [nvcc, f"-arch={arch}", "-Xptxas=-v", "-cubin", "-o", folder / "kernels.cubin", ptx]
        self.said = self._run(words)
        self.resources = {entry.name.removesuffix("_kernel"): entry for entry in parse_resources(self.said)}
        entries = re.split(r"\.entry (\w+)_kernel", ptx.read_text())
        self.ptx = dict(zip(entries[1::2], entries[2::2], strict=True))
        assert set(self.ptx) == set(self.resources) == set(functions)

    @staticmethod
    def _run(words) -> str:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr


def _fitting(tiles, size: int) -> dict[str, BlockTile]:
    """The offered tiles by name, with stages that fit into shared memory."""
    stages = [max(3, min(4, 160_000 // ((tile.bm + tile.bn) * tile.bk * size))) for tile in tiles]
    return {f"tile{i}": replace(tile, stages=stages[i]) for i, tile in enumerate(tiles)}


@pytest.mark.parametrize(
    "operand", ["float16", *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("bfloat16", "float32"))]
)
def test_mma_code(operand: str, tmp_path) -> None:
    """mma.sync, ldmatrix and cp.async.cg, no spills, for every offered tile; registers near the estimate."""
    size = mma.OPERANDS[operand]
    tiles = _fitting(tensor_tiles(size), size)
    gpu = machine_of(parse_target("cuda -arch=sm_80"))
    assert not isinstance(gpu, Machine)
    for tile in tiles.values():
        assert MmaCore.refuses(tile, operand, "float32", gpu) is None
    code = Code({n: core_kernel(MmaCore, tile, operand, (3, 3), 50) for n, tile in tiles.items()}, "sm_80", tmp_path)
    kind = {"float16": "m16n8k16.row.col.f32.f16", "bfloat16": "m16n8k16.row.col.f32.bf16"}
    for name, tile in tiles.items():
        resources = code.resources[name]
        assert not resources.spills and resources.stack == 0, (name, resources)
        assert resources.registers <= min(255, 1.15 * MmaCore.registers(tile)), (tile, resources.registers)
        found = code.ptx[name].count("mma.sync.aligned." + kind.get(operand, "m16n8k8.row.col.f32.tf32"))
        needed = tile.bk * size // 32 * tile.bm * tile.bn // (16 * 8 * tile.warps_m * tile.warps_n)
        assert found >= needed and found % needed == 0, (tile, found, needed)
        assert "ldmatrix.sync.aligned.m8n8.x4" in code.ptx[name]
        assert "cp.async.cg.shared.global.L2::128B" in code.ptx[name]


@pytest.mark.parametrize("operand", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
def test_wgmma_code(operand: str, tmp_path) -> None:
    """wgmma for every offered tile, no spills, and ptxas does not hold multiplications back."""
    size = mma.OPERANDS[operand]
    tiles = _fitting(group_tiles(size), size)
    gpu = machine_of(parse_target("cuda -arch=sm_90"))
    assert not isinstance(gpu, Machine)
    for tile in tiles.values():
        assert WgmmaCore.refuses(tile, operand, "float32", gpu) is None
    code = Code({n: core_kernel(WgmmaCore, tile, operand, (3, 3), 50) for n, tile in tiles.items()}, "sm_90a", tmp_path)
    assert "serializ" not in code.said.lower(), code.said[-2000:]
    kind = "tf32" if operand == "float32" else "f16"
    for name, tile in tiles.items():
        resources = code.resources[name]
        assert not resources.spills and resources.stack == 0, (name, resources)
        assert resources.registers <= min(255, 1.15 * WgmmaCore.registers(tile)), (tile, resources.registers)
        columns = tile.bn // tile.warps_n
        assert f"wgmma.mma_async.sync.aligned.m64n{columns}k{32 // size}.f32.{kind}.{kind}" in code.ptx[name]
        assert "wgmma.wait_group.sync.aligned 1;" in code.ptx[name]
        assert "fence.proxy.async" in code.ptx[name]


def test_one_text_serves_several_architectures(tmp_path) -> None:
    """float16's kernel for sm_75 takes the instructions that are there: 8 deep, no asynchronous copies."""
    tile = BlockTile(64, 64, 32, 2, 2, 2)
    kernel = core_kernel(MmaCore, tile, "float16", (1, 1), 20)
    code = Code({"tile": kernel}, "sm_75", tmp_path)
    assert "mma.sync.aligned.m16n8k8.row.col.f32.f16" in code.ptx["tile"]
    assert "m16n8k16" not in code.ptx["tile"] and "cp.async" not in code.ptx["tile"]
    assert not code.resources["tile"].spills


@pytest.mark.parametrize(
    "core, tile, operand, accumulator, archs, reason",
    [
        (MmaCore, (64, 64, 32, 2, 2), "int8", "float32", "sm_80", "operands of float16, bfloat16, float32, got int8"),
        (MmaCore, (64, 64, 32, 2, 2), "float64", "float64", "sm_80", "got float64"),
        (MmaCore, (64, 64, 32, 2, 2), "float16", "float16", "sm_80", "sum in float32 here, got float16"),
        (MmaCore, (64, 64, 32, 2, 2), "bfloat16", "float32", "sm_75", "bfloat16 from sm_80 on, got sm_75"),
        (MmaCore, (64, 64, 32, 2, 2), "float32", "float32", "sm_75", "float32 from sm_80 on, got sm_75"),
        (MmaCore, (64, 64, 8, 2, 2), "float16", "float32", "sm_80", "at least 32 bytes, got bk = 8"),
        (MmaCore, (64, 64, 48, 2, 2), "float16", "float32", "sm_80", "a power of two"),
        (MmaCore, (48, 64, 32, 2, 2), "float16", "float32", "sm_80", "multiples of 16 x 8, got 48 x 64"),
        (MmaCore, (64, 40, 32, 1, 2), "float16", "float32", "sm_80", "multiples of 16 x 8, got 64 x 40"),
        (MmaCore, (256, 128, 32, 2, 2), "float16", "float32", "sm_80", "at most 255 registers"),
        (MmaCore, (1024, 64, 32, 32, 2), "float16", "float32", "sm_80", "at most 1024 threads, got 2048"),
        (WgmmaCore, (64, 64, 64, 4, 1), "float16", "float32", "sm_80", "sm_90 alone, got sm_80"),
        (WgmmaCore, (64, 64, 64, 4, 1), "float16", "float32", "sm_80,sm_90", "sm_90 alone, got sm_80, sm_90"),
        (WgmmaCore, (64, 64, 32, 4, 1), "float16", "float32", "sm_90", "128 bytes a row, got bk = 32"),
        (WgmmaCore, (64, 64, 64, 2, 2), "float16", "float32", "sm_90", "4 warps for every multiple of 64 rows"),
        (WgmmaCore, (64, 64, 64, 8, 1), "float16", "float32", "sm_90", "4 warps for every multiple of 64 rows"),
        (WgmmaCore, (64, 320, 64, 4, 1), "float16", "float32", "sm_90", "8 columns up to 256, got 320"),
        (WgmmaCore, (64, 36, 64, 4, 1), "float16", "float32", "sm_90", "8 columns up to 256, got 36"),
        (WgmmaCore, (128, 256, 64, 4, 1), "float16", "float32", "sm_90", "at most 255 registers"),
        (WgmmaCore, (576, 64, 64, 36, 1), "float16", "float32", "sm_90", "at most 1024 threads, got 1152"),
    ],
)
def test_refuses(core, tile, operand: str, accumulator: str, archs: str, reason: str) -> None:
    gpu = gpu_of(tuple(archs.split(",")), Machine.from_target(parse_target("llvm")))
    said = core.refuses(BlockTile(*tile, stages=3), operand, accumulator, gpu)
    assert said is not None and reason in said, said


@pytest.mark.parametrize("row_chunks", [2, 4, 8, 16])
def test_swizzle_meets_no_bank_twice(row_chunks: int) -> None:
    """A permutation; 8 rows' equal chunks, and the 8 chunks that 8 threads copy, lie in all groups of banks."""
    places = {(row, c): mma.swizzled(row, c, row_chunks) for row in range(64) for c in range(row_chunks)}
    assert sorted(places.values()) == list(range(64 * row_chunks))
    for first in range(0, 64, 8):
        for c in range(row_chunks):
            assert {places[first + r, c] % 8 for r in range(8)} == set(range(8))
    for index in range(0, 64 * row_chunks, 8):
        assert {places[divmod(i, row_chunks)] % 8 for i in range(index, index + 8)} == set(range(8))


def test_swizzle_is_the_hardware_s() -> None:
    """Rows of 128 bytes: bits 4 .. 6 of the byte address XORed with bits 7 .. 9."""
    for row in range(16):
        for c in range(8):
            address = 128 * row + 16 * c
            assert mma.swizzled(row, c, 8) * 16 == address ^ ((address >> 7 & 7) << 4)
