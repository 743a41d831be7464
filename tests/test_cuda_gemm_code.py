"""The machine code of GEMM kernels: 128-bit accesses, asynchronous copies, no spills; nvcc compiles, without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tvm
from conv_gemm import Conv, conv_func, gpu_for

from gemmify.cuda.resources import parse_resources
from gemmify.cuda.toolchain import find_nvcc
from gemmify.errors import GemmifyError
from schedules import parse_target
from schedules.cuda.block_tiles import simt_tiles
from schedules.cuda.core import BlockTile
from schedules.cuda.gemm import gemm_kernel
from schedules.cuda.gemm_choice import tile_name
from schedules.cuda.simt import SimtCore, thread_tile

LAYER = Conv(n=8, h=28, w=28, c=128, m=256, ops=("bias", "add", "relu"))
"""A layer whose channels are whole 16-byte chunks: all its accesses are wide."""


def compiled(kernels: dict[str, Any], arch: str, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(PTX by kernel, resources by kernel); the kernels of function `f` are `f_kernel`, `f_kernel_1`."""
    try:
        nvcc = find_nvcc()
    except GemmifyError as err:
        pytest.skip(str(err))
    module = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in kernels.items()})
    built = tvm.compile(module, target=parse_target(f"cuda -arch={arch.rstrip('a')}"), tir_pipeline="s_tir")
    text, ptx = folder / "kernels.cu", folder / "kernels.ptx"
    text.write_text(built.mod.imports[0].inspect_source(), encoding="utf-8")
    said = ""
    for words in (
        ["-w", "-std=c++17", "-ptx", "-o", ptx, text],
        ["-Xptxas=-v", "-cubin", "-o", folder / "k.cubin", ptx],
    ):
        done = subprocess.run(
            [nvcc, "-O3", f"-arch={arch}", *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout + done.stderr
    entries = re.split(r"\.entry (\w+)\(", ptx.read_text())
    codes = dict(zip(entries[1::2], entries[2::2], strict=True))
    return codes, {entry.name: entry for entry in parse_resources(said)}


def no_spills(resources: dict[str, Any]) -> None:
    spilled = {name: entry for name, entry in resources.items() if entry.spills or entry.stack}
    assert not spilled, spilled


def check_simt(tiles: dict[str, BlockTile], arch: str, folder: Path) -> None:
    func, gpu = conv_func(LAYER), gpu_for(arch)
    kernels = {
        name: gemm_kernel(func, gpu, {"tile": tile_name("simt", tile), "split_k": 1}) for name, tile in tiles.items()
    }
    codes, resources = compiled(kernels, arch, folder)
    no_spills(resources)
    for name, tile in tiles.items():
        tm, tn = thread_tile(tile)
        code = codes[f"{name}_kernel"]
        assert code.count("fma.rn.f32") == tm * tn * tile.bk, "the multiply-adds of one stage, once"
        assert len(re.findall(r"ld\.shared\.v4", code)) == (tm + tn) * tile.bk // 4
        assert not re.search(r"ld\.shared\.(f32|u32|b32)", code), "operands are read 16 bytes at a time"
        assert "cp.async.cg.shared.global" in code and "cp.async.ca" not in code
        assert re.search(r"st\.global\.v4", code) and not re.search(r"st\.global\.(f32|u32|b32)", code)
        assert re.search(r"ld\.global(\.nc)?\.v4", code), "bias and residual are read as vectors"
        assert resources[f"{name}_kernel"].registers <= 255
        if tile.threads * 2 * SimtCore.registers(tile) <= 65536:
            assert resources[f"{name}_kernel"].registers * tile.threads * 2 <= 65536, "two blocks a multiprocessor fit"


def test_code_of_the_cuda_cores(tmp_path: Path) -> None:
    """The largest tile, and one warp's."""
    check_simt({"largest": simt_tiles(4)[0], "smallest": simt_tiles(4)[-1]}, "sm_90", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_code_of_every_tile_of_the_cuda_cores(arch: str, tmp_path: Path) -> None:
    check_simt({f"tile{i}": tile for i, tile in enumerate(simt_tiles(4))}, arch, tmp_path)


def test_code_of_halves_and_of_odd_channels(tmp_path: Path) -> None:
    """Default plans. Halves are copied asynchronously, multiplied by tensor cores and stored 16 bytes at a time; three
    channels of float32 come 4 bytes at a time, three of halves through registers; split-K is a second kernel."""
    half = Conv(n=8, h=28, w=28, c=128, m=256, dtype="float16", ops=("bias", "add", "relu"))
    first = Conv(n=8, h=56, w=56, c=3, m=64, r=7, stride=2, pad=3)
    first_half = Conv(n=8, h=56, w=56, c=3, m=64, r=7, stride=2, pad=3, dtype="float16")
    small = Conv(n=1, h=7, w=7, c=512, m=512, dtype="bfloat16")
    problems = {"half": half, "first": first, "first_half": first_half, "small": small}
    kernels = {name: gemm_kernel(conv_func(p), gpu_for("sm_80"), {}) for name, p in problems.items()}
    codes, resources = compiled(kernels, "sm_80", tmp_path)
    no_spills(resources)
    for instruction in ("mma.sync", "ldmatrix", "cp.async.cg", "st.global.v4"):
        assert instruction in codes["half_kernel"]
    assert not re.search(r"st\.global\.(u16|b16)", codes["half_kernel"])
    assert "cp.async.ca" in codes["first_kernel"]
    assert "mma.sync" in codes["first_half_kernel"] and re.search(r"ld\.global\S*u16", codes["first_half_kernel"])
    assert "mma.sync" in codes["small_kernel"] and "st.global.v4" in codes["small_kernel_1"]
