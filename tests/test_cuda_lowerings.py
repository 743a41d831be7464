"""Every lowering in every precision as it is built for a GPU, on a machine that has none.

The tensor expressions are compiled for the CPU and compared with float64; their workspaces and weights are those of
`cost`. The kernels are compiled by nvcc for sm_80 and sm_90: tensor cores where they must be, 128-bit loads, no
registers spilt. The default cases meet every lowering; the full matrix runs with `-m slow`.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import te

from gemmify.conformance import EPILOGUES, expected, tolerance
from gemmify.cuda.resources import parse_resources
from gemmify.cuda.toolchain import find_nvcc
from gemmify.errors import GemmifyError
from gemmify.guarded import poison
from gemmify.kernels import GPU_TILE, layer_kernels, on_machine
from gemmify.layer_reference import channels_first
from gemmify.pipeline_build import TIR_PIPELINE
from lowering import LOWERINGS, DenseProblem, Lowering, Problem, TransposedConvProblem, conv2d
from lowering.base import operand_shapes
from lowering.problem import dtype_bytes
from lowering.staged import as_staged
from schedules import machine_of, parse_target

SMALL: dict[str, Problem] = {
    "plain": conv2d(8, 9, 7, 12, 3, n=2),
    "groups": conv2d(8, 9, 7, 12, 3, n=3, g=2, d=2),
    "strided": conv2d(6, 9, 11, 10, 5, s=2, n=2),
    "depthwise": conv2d(12, 7, 7, 12, 3, g=12),
    "pointwise": conv2d(16, 6, 5, 10, 1, n=2, p=0),
    "cover": conv2d(6, 4, 4, 10, 4, p=0, n=2),
    "dense": DenseProblem(3, 20, 10),
    "transposed": TransposedConvProblem(2, 8, 12, (5, 4), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), (1, 0)),
}
DTYPES = ("float32", "float16", "bfloat16")


def usable(problem: Problem) -> list[Lowering]:
    return [low for low in LOWERINGS.values() if low.applicable(as_staged(problem)) is None]


PAIRS = [(name, low.key) for name, problem in SMALL.items() for low in usable(problem)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_cost_is_what_the_stages_hold(name: str, key: str, dtype: str) -> None:
    """Every workspace of its own, to the byte, in the dtype that it is stored in; no scratch inside kernels."""
    problem, low = as_staged(replace(SMALL[name], dtype=dtype)), LOWERINGS[key]
    cost = low.cost(problem, GPU_TILE)
    known = {name: (shape, dtype) for name, shape in operand_shapes(problem, low.layout).items()}
    held: dict[str, dict[str, int]] = {"workspace": {}, "weight": {}, "output": {}}
    for stage in low.stages(problem, GPU_TILE):
        out = stage.compute(*(te.placeholder(*known[r], name=r) for r in stage.reads))
        shape, stored = tuple(map(int, out.shape)), str(out.dtype)
        known[stage.name] = (shape, stored)
        held[stage.kind][stage.name] = int(np.prod(shape)) * dtype_bytes(stored)
        if stage.moves:
            assert stored == dtype, f"{stage.name} only moves elements"
    assert held["workspace"] == cost.workspace
    assert cost.scratch(1024) == cost.workspace_bytes == sum(cost.workspace.values())
    assert sum(held["weight"].values()) == cost.weight_bytes


NUMBERS = [
    pytest.param(
        name, key, dtype, marks=[] if dtype == "float16" and name in ("plain", "transposed") else pytest.mark.slow
    )
    for name, key in PAIRS
    for dtype in DTYPES[:2]
]


@pytest.mark.parametrize(("name", "key", "dtype"), NUMBERS)
def test_numbers_on_the_cpu(name: str, key: str, dtype: str) -> None:
    """The tensor expressions of a GPU, compiled stage by stage for the CPU without a schedule."""
    problem, low, ops = as_staged(replace(SMALL[name], dtype=dtype)), LOWERINGS[key], EPILOGUES[0]
    want = expected(problem, ops)
    data = channels_first(want.data) if low.layout == "NCHW" and want.data.ndim > 2 else want.data
    arrays = {name: array for name, array in zip(operand_shapes(problem, low.layout), (data, want.weight), strict=True)}
    stages = low.stages(problem, GPU_TILE)
    for stage in stages:
        inputs = [te.placeholder(arrays[r].shape, str(arrays[r].dtype), name=r) for r in stage.reads]
        out = stage.compute(*inputs)
        func = tvm.compile(te.create_prim_func([*inputs, out]), target="llvm")
        empty = poison(str(out.dtype))
        made = tvm.runtime.tensor(np.full(tuple(map(int, out.shape)), empty, str(out.dtype)))
        func(*(tvm.runtime.tensor(arrays[r]) for r in stage.reads), made)
        arrays[stage.name] = made.numpy()
    got = arrays[stages[-1].name].astype("float64")
    if low.layout == "NCHW":
        got = np.moveaxis(got.reshape(problem.n, problem.m, *problem.out_size), 1, -1)
    limit = tolerance(dtype, want, low.cost(problem, GPU_TILE).error_growth, ops)
    assert np.max(np.abs(got.reshape(want.result.shape) - want.result)) <= limit


def test_forms_that_need_scratch_inside_their_kernels_are_refused() -> None:
    problem = as_staged(SMALL["plain"])
    for key in ("im2row-strip", "fft"):
        assert "got kernels without scratch of their own" in str(LOWERINGS[key].applicable(problem))
    assert on_machine(SMALL["plain"], machine_of(parse_target("llvm"))) is SMALL["plain"]


# --- machine code ----------------------------------------------------------------------------------------------------

LAYERS: dict[str, Problem] = {
    "conv": conv2d(64, 28, 28, 64, 3, n=8),
    "first": conv2d(3, 64, 64, 64, 7, s=2, n=8),
    "pointwise": conv2d(256, 14, 14, 512, 1, n=8, p=0),
    "dense": DenseProblem(64, 1024, 1000),
    "depthwise": conv2d(96, 28, 28, 96, 3, g=96, n=8),
    "transposed": TransposedConvProblem(4, 64, 32, (14, 14), (4, 4), (2, 2), (1, 1), (1, 1), (1, 1), (0, 0)),
}
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
BY_DEFAULT = {
    ("sm_90", "float16", "pointwise"),
    ("sm_80", "tf32", "dense"),
    ("sm_80", "float32", "pointwise"),
    ("sm_80", "bfloat16", "depthwise"),
}
CODE = [
    pytest.param(arch, precision, name, marks=[] if (arch, precision, name) in BY_DEFAULT else pytest.mark.slow)
    for arch in ("sm_80", "sm_90")
    for precision in PRECISIONS
    for name in LAYERS
]
NO_GEMM = ("depthwise", "direct")


def _run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def _kernels(arch: str, precision: str, name: str, folder: Path) -> dict[str, tuple[str, bool]]:
    """PTX of each kernel of every lowering, and whether registers were spilt."""
    try:
        nvcc = find_nvcc()
    except GemmifyError as err:
        pytest.skip(str(err))
    goal = parse_target({"kind": "cuda", "arch": arch, "tf32": precision == "tf32"})
    problem = replace(LAYERS[name], dtype="float32" if precision == "tf32" else precision)
    functions = {}
    for low in usable(problem):
        for kernel in layer_kernels(low, problem, machine_of(goal), EPILOGUES[1]).kernels:
            if kernel.kind != "weight":
                called = f"{low.key}_{kernel.name}".replace("-", "_")
                functions[called] = kernel.func.with_attr("global_symbol", called)
    module = tvm.compile(tvm.IRModule(functions), target=goal, tir_pipeline=TIR_PIPELINE)
    text, ptx, own = folder / "k.cu", folder / "k.ptx", "sm_90a" if arch == "sm_90" else arch
    text.write_text(module.mod.imports[0].inspect_source(), encoding="utf-8")
    _run(nvcc, "-O3", "-std=c++17", "-w", f"-arch={own}", "-ptx", "-o", ptx, text)
    said = _run(nvcc, f"-arch={own}", "-Xptxas=-v", "-cubin", "-o", folder / "k.cubin", ptx)
    entries = re.split(r"\.entry (\w+)", ptx.read_text(encoding="utf-8"))
    code = dict(zip(entries[1::2], entries[2::2], strict=True))
    return {found.name: (code[found.name], found.spills) for found in parse_resources(said)}


@pytest.mark.parametrize(("arch", "precision", "name"), CODE)
def test_machine_code(arch: str, precision: str, name: str, tmp_path: Path) -> None:
    kernels = _kernels(arch, precision, name, tmp_path)
    assert kernels
    assert not [called for called, (_, spilt) in kernels.items() if spilt]
    products = {called: ptx for called, (ptx, _) in kernels.items() if len(re.findall(r"fma\.rn|mma", ptx)) > 60}
    for called, ptx in products.items():
        tensor = re.search(r"mma\.sync|wgmma\.mma_async", ptx) is not None
        computed = called.startswith("winograd")
        if precision == "float32" or (called.startswith("direct") and precision == "tf32"):
            assert not tensor, f"{called} rounds float32"
        elif not called.startswith(NO_GEMM) and not computed and name != "depthwise":
            assert tensor, f"{called} leaves the tensor cores idle"
        if name in ("pointwise", "dense") and not called.startswith(NO_GEMM):
            assert re.search(r"cp\.async\.cg\.shared\.global[^;]*, 16", ptx), f"{called} copies in small chunks"
