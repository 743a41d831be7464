"""The forms that store patches: scratch to the byte, tails of strips, batches through one buffer, vectors."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from oracle import channels_first, random_arrays, reference
from tvm import s_tir, te, topi
from tvm.ir import TensorLoad
from tvm.tirx import For, ForKind

from gemmify.kernels import layer_kernels
from gemmify.layer import compile_layer
from gemmify.pipeline_build import kernel_workspace_bytes
from lowering import LOWERINGS, ConvProblem, conv2d
from lowering.im2row_strip import STRIP_BYTES, row_count, strip_rows
from schedules import Machine, parse_target, schedule_module
from schedules.cpu import rules
from schedules.cpu.tir_tools import collect

KEYS = ["im2row", "im2row-strip", "im2col", "im2col-batched"]
LAYERS: dict[str, ConvProblem] = {
    "tail-of-a-strip": conv2d(40, 31, 29, 24, 5),
    "strips-over-images": conv2d(64, 7, 7, 40, 3, n=5),
    "panels-over-images": conv2d(16, 13, 11, 20, 3, n=3),
    "groups": conv2d(24, 14, 14, 36, 3, n=2, g=3),
    "stride-and-dilation": conv2d(9, 33, 31, 17, 3, 2, d=2, n=2),
    "columns-too-long-to-write-out": conv2d(5, 6, 113, 9, 3, n=2),
    "one-dimension": ConvProblem(3, 13, 29, (61,), (5,), (1,), (4,), (0,), (2,)),
    "three-dimensions": ConvProblem(2, 6, 18, (5, 7, 8), (3, 3, 3), (1, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 1)),
    "float64": conv2d(8, 15, 15, 33, 3, n=2, dtype="float64"),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", LAYERS)
def test_numbers_and_scratch(key: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right against float64, and scratch as the formula says; a rule that gave up would fall to a slow schedule."""
    monkeypatch.setattr(rules, "_RULES", (*rules._RULES[:1], _no_other_rule if key != "im2row" else rules._RULES[1]))
    problem, target = LAYERS[name], parse_target("llvm")
    layer = compile_layer(problem, key, target, epilogue=())
    data, weight = random_arrays(problem, 5)
    first = LOWERINGS[key].layout == "NCHW"
    got = layer.run(channels_first(data) if first else data, weight)
    got = np.moveaxis(got, 1, -1) if first else got
    np.testing.assert_allclose(got, reference(problem, data, weight), atol=2e-4, rtol=1e-4)
    cost = layer.kernels.cost
    funcs = {f"f{i}": k.func for i, k in enumerate(layer.kernels.kernels) if k.kind != "weight"}
    for threads in (1, min(3, cost.tasks or 3)):
        hidden = kernel_workspace_bytes(tvm.IRModule(funcs), target, threads)
        assert layer.workspace_bytes + sum(hidden.values()) == cost.scratch(threads)


def _no_other_rule(func: object, machine: object, knobs: object) -> None:
    """A weight's packing has no rule of its own here; everything else must have been taken by the first."""
    del machine
    sch = s_tir.Schedule(func)  # type: ignore[arg-type]
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    assert len(blocks) == 1, "an annotated function fell through to the generic rules"
    return rules._fallback(func, Machine.from_target(parse_target("llvm")), knobs)  # type: ignore[arg-type, return-value]


def test_scratch_by_hand() -> None:
    """One image of patches for a batch; all columns of the batch, rounded up once; a strip for each thread."""
    problem = conv2d(8, 10, 12, 16, 3, n=3)
    tile = layer_kernels(LOWERINGS["im2col"], problem, Machine.from_target(parse_target("llvm"))).tile
    assert LOWERINGS["im2row"].cost(problem, tile).scratch(4) == 4 * 8 * 9 * 120
    nr = tile.nr
    assert LOWERINGS["im2col"].cost(problem, tile).scratch(4) == 4 * 8 * 9 * -(-120 // nr) * nr
    assert LOWERINGS["im2col-batched"].cost(problem, tile).workspace_bytes == 4 * 8 * 9 * -(-360 // nr) * nr
    rows = strip_rows(problem)
    assert LOWERINGS["im2row-strip"].cost(problem, tile).scratch(1) == 4 * 8 * 9 * rows * 12


@pytest.mark.parametrize(
    "problem", [conv2d(256, 56, 56, 256, 3), conv2d(512, 7, 7, 512, 3), conv2d(3, 224, 224, 64, 3)]
)
def test_a_strip_fits_a_cores_cache(problem: ConvProblem) -> None:
    rows = strip_rows(problem)
    assert 1 <= rows <= row_count(problem)
    size = rows * problem.out_size[-1] * problem.c * problem.taps * 4
    assert rows == 1 or size <= STRIP_BYTES


def test_columns_are_copied_in_vectors() -> None:
    """56 columns a row in panels of 32: what is copied alone lies at the ends of runs."""
    problem = conv2d(16, 56, 56, 64, 3)
    kernels = layer_kernels(LOWERINGS["im2col"], problem, Machine.from_target(parse_target("llvm -mcpu=x86-64-v4")))
    copy = next(k.func for k in kernels.kernels if k.name == "im2col")
    vectors = [loop for loop in collect(copy.body, For) if ForKind(loop.kind) == ForKind.VECTORIZED]
    lanes = sum(int(loop.extent.value) for loop in vectors if collect(loop.body, TensorLoad))
    assert lanes >= 0.75 * 224, "of the 224 elements of a period"


@pytest.mark.parametrize("key", KEYS)
def test_as_a_pass_on_a_foreign_function_and_scheduled(key: str) -> None:
    shapes = ((2, 8, 14, 14), (12, 8, 3, 3))
    a, w = te.placeholder(shapes[0], name="a"), te.placeholder(shapes[1], name="w")
    conv = topi.nn.relu(topi.nn.conv2d_nchw(a, w, 1, 1, 1))
    mod = tvm.IRModule({"main": te.create_prim_func([a, w, conv]).with_attr("global_symbol", "main")})
    target = parse_target("llvm")
    lowered = tvm.transform.Sequential([LOWERINGS[key]])(mod)
    assert lowered["main"].script() != mod["main"].script()
    lowered = schedule_module(lowered, Machine.from_target(target))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype("float32") for s in shapes]
    results = []
    for module in (mod, lowered):
        out = tvm.runtime.tensor(np.full((2, 12, 14, 14), np.nan, "float32"))
        tvm.compile(module, target=target)["main"](*map(tvm.runtime.tensor, arrays), out)
        results.append(out.numpy())
    np.testing.assert_allclose(results[1], results[0], atol=1e-3)
