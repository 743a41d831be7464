"""The kn2 forms: right on random layers, in the bytes that they claim, by the rule that was written for them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from oracle import random_arrays, reference
from tvm import s_tir, te, tirx, topi

from gemmify.conformance import check_lowering
from gemmify.kernels import layer_kernels
from gemmify.layer import compile_layer
from gemmify.pipeline_build import kernel_workspace_bytes
from lowering import LOWERINGS, ConvProblem, Tile, conv2d
from lowering.shift_add import sum_attributes
from schedules import Machine, parse_target, schedule_module
from schedules.cpu.accumulate import schedule_accumulate

KEYS = ["kn2row", "kn2col", "kn2row-as", "kn2row-aa"]
ODD = [
    conv2d(5, 7, 6, 37, 3, n=2),
    conv2d(8, 12, 12, 24, 3, p=0, g=2),
    conv2d(3, 5, 5, 4, 5, p=4),
    conv2d(4, 19, 20, 18, 3, d=2, dtype="float64"),
    ConvProblem(2, 3, 5, (20,), (4,), (1,), (2,), (0,), (2,)),
    ConvProblem(1, 3, 18, (5, 7, 6), (3, 2, 3), (1, 1, 1), (1, 1, 0), (2, 0, 1), (1, 1, 1), 3),
]


@pytest.mark.parametrize("key", KEYS)
def test_odd_layers(key: str) -> None:
    """Batch, groups, pads wider than the kernel, dilation, 1 and 3 dimensions; numbers, workspaces, scratch."""
    assert check_lowering(LOWERINGS[key], ODD).problems == tuple(ODD)


@pytest.mark.parametrize("key", KEYS)
def test_stride_is_refused(key: str) -> None:
    assert str(LOWERINGS[key].applicable(conv2d(4, 9, 9, 4, 3, 2))) == "needs stride 1, got 2x2"


def scratch(key: str, problem: ConvProblem, threads: int) -> tuple[int, int]:
    """What the kernels take inside themselves, and what the cost says of it."""
    target = parse_target("llvm")
    kernels = layer_kernels(LOWERINGS[key], problem, Machine.from_target(target))
    funcs = {f"f{i}": k.func for i, k in enumerate(kernels.kernels) if k.kind != "weight"}
    hidden = sum(kernel_workspace_bytes(tvm.IRModule(funcs), target, threads).values())
    return hidden, kernels.cost.scratch(threads) - kernels.cost.workspace_bytes


@pytest.mark.parametrize("problem", [conv2d(32, 28, 28, 64, 3), conv2d(24, 13, 21, 80, 5, n=2, g=2)])
def test_accumulating_forms_hold_what_they_say(problem: ConvProblem) -> None:
    for threads in (1, 2, 3):
        hidden, said = scratch("kn2row-as", problem, threads)
        assert 0 < hidden == said < problem.element * problem.m * problem.size[0] * problem.size[1]
        assert scratch("kn2row-aa", problem, threads) == (0, 0)
    assert LOWERINGS["kn2row-aa"].cost(problem, layer_kernels_tile(problem)).workspace_bytes == 0


def layer_kernels_tile(problem: ConvProblem) -> Tile:
    return layer_kernels(LOWERINGS["kn2row-aa"], problem, Machine.from_target(parse_target("llvm"))).tile


@pytest.mark.parametrize("key", KEYS)
def test_the_rule_was_taken(key: str) -> None:
    """No block is left, and neither the sum nor the products have a buffer of their own."""
    problem = conv2d(16, 14, 14, 32, 3)
    kernels = layer_kernels(LOWERINGS[key], problem, Machine.from_target(parse_target("llvm")))
    text = kernels.kernels[-1].func.script()
    assert "sblock_alloc_buffer" not in text and text.count("T.sblock(") == 1
    assert key in ("kn2row", "kn2col") or "T.parallel" in text


def test_one_thread_and_many_give_the_same() -> None:
    problem = conv2d(20, 17, 14, 40, 3, n=2)
    data, weight = random_arrays(problem, 3)
    want = reference(problem, data, weight)
    for key in ("kn2row-as", "kn2row-aa"):
        runs = [
            compile_layer(problem, key, parse_target(spec), epilogue=()).run(data, weight)
            for spec in ("llvm", "llvm -num-cores=1")
        ]
        np.testing.assert_allclose(runs[0], want, atol=1e-3)
        np.testing.assert_array_equal(runs[0], runs[1])


@pytest.mark.parametrize("key", KEYS)
def test_as_a_pass_on_a_foreign_function(key: str) -> None:
    a, w = te.placeholder((1, 8, 14, 14), name="a"), te.placeholder((12, 8, 3, 3), name="w")
    conv = topi.nn.relu(topi.nn.conv2d_nchw(a, w, 1, 1, 1))
    mod = tvm.IRModule({"main": te.create_prim_func([a, w, conv]).with_attr("global_symbol", "main")})
    target = parse_target("llvm")
    lowered = tvm.transform.Sequential([LOWERINGS[key]])(mod)
    assert schedule_accumulate(lowered["main"], Machine.from_target(target)) is not None
    scheduled = schedule_module(lowered, Machine.from_target(target))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype("float32") for s in ((1, 8, 14, 14), (12, 8, 3, 3))]
    results = []
    for module in (mod, lowered, scheduled):
        out = tvm.runtime.tensor(np.full((1, 12, 14, 14), np.nan, "float32"))
        tvm.compile(module, target=target)["main"](*map(tvm.runtime.tensor, arrays), out)
        results.append(out.numpy())
    np.testing.assert_allclose(results[1], results[0], atol=1e-3)
    np.testing.assert_allclose(results[2], results[0], atol=1e-3)


def shifted(guard: int) -> tirx.PrimFunc:
    """A sum over three taps of rows of 16, the first `guard` rows left out of it."""
    t = te.placeholder((3, 9, 16), name="t")
    k = te.reduce_axis((0, 3), name="k")
    total = te.compute(
        (9, 16),
        lambda y, j: te.sum(
            tirx.if_then_else(
                tirx.all(y + k - 1 >= guard, y + k - 1 < 9), t[k, y + k - 1, j], tirx.const(0, "float32")
            ),
            axis=k,
        ),
        name="total",
        attrs=sum_attributes(conv2d(1, 9, 9, 16, 3), "rj", "all"),
    )
    return te.create_prim_func([t, te.compute((9, 16), lambda y, j: total[y, j] + 1.0, name="out")])


def test_a_guard_that_says_more_than_bounds_is_refused() -> None:
    machine = Machine.from_target(parse_target("llvm"))
    assert schedule_accumulate(shifted(0), machine) is not None
    with pytest.raises(s_tir.ScheduleError, match="leaves out what lies outside T, and nothing else"):
        schedule_accumulate(shifted(1), machine)
