"""Schedules of everything that is no GEMM: numbers against numpy in float64, and the structure of the code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx, topi
from tvm.relax import op as R
from tvm.s_tir import ScheduleError

from schedules import IS_SCHEDULED, Machine, host_target, parse_target, schedule_func, schedule_module
from schedules.cpu import rules
from schedules.cpu.conditions import is_branch
from schedules.cpu.parallel import SERIAL_WORK
from schedules.cpu.tir_tools import collect

TARGET = host_target()
MACHINE = Machine.from_target(TARGET)
TWO_CORES = Machine(**{**MACHINE.__dict__, "cores": 2})
CHANNELS = (1, 3, 7, 17, 64, 96)
Shapes = list[tuple[int, ...]]


def fused(shapes: Shapes, build: Callable[..., Any]) -> tvm.IRModule:
    """A Relax function of `build` over float32 inputs, as the compiler hands it to the schedules."""
    bb = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(build(*params))
        bb.emit_func_output(out)
    mod = bb.get()
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(["main"]),
    ]
    with TARGET:
        return tvm.transform.Sequential(passes)(mod)


def kernels(mod: tvm.IRModule) -> list[tirx.PrimFunc]:
    return [func for func in mod.functions.values() if isinstance(func, tirx.PrimFunc)]


def inputs(shapes: Shapes) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def call(func: tirx.PrimFunc, arrays: list[np.ndarray], outs: list[tuple[tuple[int, ...], str]]) -> list[np.ndarray]:
    """Run one kernel into outputs that are poisoned: an element that is not written stays NaN (or the largest int)."""
    lib = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=TARGET)
    poison = [np.full(s, np.nan if "float" in d else np.iinfo(d).max, d) for s, d in outs]
    tensors = [tvm.runtime.tensor(array) for array in [*arrays, *poison]]
    lib["main"](*tensors)
    return [tensor.numpy() for tensor in tensors[len(arrays) :]]


def check(shapes: Shapes, build: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """The scheduled kernels of `build` equal `reference` (numpy, float64 in) to float32 accuracy."""
    mod = schedule_module(fused(shapes, build), TWO_CORES)
    assert all(func.attrs[IS_SCHEDULED] for func in kernels(mod))
    arrays = inputs(shapes)
    wanted = reference(*[array.astype("float64") for array in arrays])
    wanted = list(wanted) if isinstance(wanted, (tuple, list)) else [wanted]
    found = kernels(mod)
    if len(found) == 1:
        dtypes = ["float32" if w.dtype.kind == "f" else str(w.dtype) for w in wanted]
        got = call(found[0], arrays, list(zip([w.shape for w in wanted], dtypes, strict=True)))
    else:
        vm = relax.VirtualMachine(tvm.compile(mod, target=TARGET), tvm.cpu())
        result = vm["main"](*[tvm.runtime.tensor(array) for array in arrays])
        got = [r.numpy() for r in ([result] if hasattr(result, "numpy") else result)]
    for one, exact in zip(got, wanted, strict=True):
        scale = np.max(np.abs(exact)) if exact.size else 1.0
        np.testing.assert_allclose(one, exact, rtol=2e-6, atol=2e-6 * float(scale) + 1e-30)


def windows(x: np.ndarray, k: int, s: int, pad: tuple[int, int, int, int], fill: float) -> np.ndarray:
    """[k k, n, ho, wo, c] of the windows of an NHWC tensor padded by `fill` (top, left, bottom, right)."""
    top, left, bottom, right = pad
    x = np.pad(x, [(0, 0), (top, bottom), (left, right), (0, 0)], constant_values=fill)
    ho, wo = (x.shape[1] - k) // s + 1, (x.shape[2] - k) // s + 1
    taps = [x[:, i : i + s * ho - s + 1 : s, j : j + s * wo - s + 1 : s] for i in range(k) for j in range(k)]
    return np.stack(taps)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@pytest.mark.parametrize("c", CHANNELS)
def test_max_pool_with_padding(c: int) -> None:
    check(
        [(2, 13, 15, c)],
        lambda x: R.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), layout="NHWC"),
        lambda x: windows(x, 3, 2, (1, 1, 1, 1), -np.inf).max(axis=0),
    )


@pytest.mark.parametrize("c", CHANNELS)
def test_average_pool_behind_relu_counts_what_is_inside(c: int) -> None:
    def reference(x: np.ndarray) -> np.ndarray:
        inside = windows(np.ones_like(x), 3, 1, (1, 1, 1, 1), 0.0).sum(axis=0)
        return np.maximum(windows(x, 3, 1, (1, 1, 1, 1), 0.0).sum(axis=0) / inside, 0)

    check(
        [(1, 9, 11, c)],
        lambda x: R.nn.relu(R.nn.avg_pool2d(x, (3, 3), (1, 1), (1, 1, 1, 1), layout="NHWC")),
        reference,
    )


@pytest.mark.parametrize("c", [*CHANNELS, 1000])
def test_global_average_pool(c: int) -> None:
    check(
        [(1, 7, 5, c)],
        lambda x: R.nn.adaptive_avg_pool2d(x, (1, 1), layout="NHWC"),
        lambda x: x.mean(axis=(1, 2), keepdims=True),
    )


@pytest.mark.parametrize("c", CHANNELS)
def test_concat_of_channels(c: int) -> None:
    check(
        [(1, 9, 9, c), (1, 9, 9, 5), (1, 9, 9, c)],
        lambda *xs: R.nn.relu(R.concat(list(xs), axis=-1)),
        lambda *xs: np.maximum(np.concatenate(xs, axis=-1), 0),
    )


@pytest.mark.parametrize("c", [*CHANNELS, 1000])
def test_softmax_of_rows(c: int) -> None:
    check([(40, c)], lambda x: R.nn.softmax(x), lambda x: softmax(x, -1))


@pytest.mark.parametrize("c", CHANNELS)
def test_elementwise_chain_with_a_channel_vector(c: int) -> None:
    check(
        [(1, 21, 15, c), (1, 21, 15, c), (c,)],
        lambda x, y, b: R.multiply(R.nn.relu(R.add(R.add(x, y), b)), R.sigmoid(x)),
        lambda x, y, b: np.maximum(x + y + b, 0) / (1 + np.exp(-x)),
    )


@pytest.mark.parametrize("c", CHANNELS)
def test_layout_changes(c: int) -> None:
    check([(1, 20, 19, c)], lambda x: R.permute_dims(x, [0, 3, 1, 2]), lambda x: x.transpose(0, 3, 1, 2))
    check([(1, c, 20, 19)], lambda x: R.permute_dims(x, [0, 2, 3, 1]), lambda x: x.transpose(0, 2, 3, 1))


OTHERS: dict[str, tuple[Shapes, Callable[..., Any], Callable[..., Any]]] = {
    "pad": (
        [(1, 9, 9, 17)],
        lambda x: R.nn.pad(x, (0, 0, 1, 2, 1, 1, 1, 3)),
        lambda x: np.pad(x, [(0, 0), (1, 2), (1, 1), (1, 3)]),
    ),
    "split": ([(1, 9, 9, 90)], lambda x: R.split(x, [10, 37], axis=-1), lambda x: np.split(x, [10, 37], axis=-1)),
    "strided slice": (
        [(1, 9, 9, 64)],
        lambda x: R.strided_slice(x, [3], [3], [64], [2]),
        lambda x: x[..., 3::2],
    ),
    "concat of rows": (
        [(1, 9, 9, 32), (1, 5, 9, 32)],
        lambda *xs: R.concat(list(xs), axis=1),
        lambda *xs: np.concatenate(xs, axis=1),
    ),
    "nearest resize": (
        [(1, 7, 7, 24)],
        lambda x: R.image.resize2d(
            x,
            relax.ShapeExpr([14, 14]),
            layout="NHWC",
            method="nearest_neighbor",
            coordinate_transformation_mode="asymmetric",
            rounding_method="floor",
        ),
        lambda x: x.repeat(2, axis=1).repeat(2, axis=2),
    ),
    "softmax of channels": ([(1, 21, 9, 11)], lambda x: R.nn.softmax(x, axis=1), lambda x: softmax(x, 1)),
    "log softmax": ([(4, 1000)], lambda x: R.nn.log_softmax(x), lambda x: np.log(softmax(x, -1))),
    "variance": ([(4, 50, 60)], lambda x: R.variance(x, axis=[1]), lambda x: x.var(axis=1)),
    "sum of everything": ([(33, 100)], lambda x: R.sum(x), lambda x: np.asarray(x.sum())),
    "sum of columns": ([(333, 100)], lambda x: R.sum(x, axis=0), lambda x: x.sum(axis=0)),
    "sum of rows": ([(33, 1001)], lambda x: R.sum(x, axis=1), lambda x: x.sum(axis=1)),
    "largest of rows": ([(33, 1001)], lambda x: R.max(x, axis=1), lambda x: x.max(axis=1)),
    "argmax": ([(40, 641)], lambda x: R.argmax(x, axis=1), lambda x: x.argmax(axis=1)),
    "matmul": ([(4, 20, 30), (4, 30, 25)], R.matmul, np.matmul),
    "running sum": ([(4, 64)], lambda x: R.cumsum(x, axis=1), lambda x: x.cumsum(axis=1)),
    "sort": ([(4, 64)], lambda x: R.sort(x, axis=1), lambda x: np.sort(x, axis=1)),
    "select": (
        [(1, 9, 9, 65), (1, 9, 9, 65)],
        lambda x, y: R.where(R.greater(x, y), x, R.multiply(y, y)),
        lambda x, y: np.where(x > y, x, y * y),
    ),
    "layer norm": (
        [(40, 96), (96,), (96,)],
        lambda x, g, b: R.nn.layer_norm(x, g, b, axes=[-1]),
        lambda x, g, b: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * g + b,
    ),
    "first rows then channels": (
        [(1, 7, 7, 32)],
        lambda x: R.reshape(R.permute_dims(x, [0, 3, 1, 2]), (1, 7 * 7 * 32)),
        lambda x: x.transpose(0, 3, 1, 2).reshape(1, -1),
    ),
    "empty loop": ([(1, 1, 1, 1)], lambda x: R.exp(x), np.exp),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions(name: str) -> None:
    check(*OTHERS[name])


def lrn(shape: tuple[int, ...], size: int) -> tirx.PrimFunc:
    """x / (2 + 0.3 sum of squares in a window over the channels)^0.75, as one tensor expression."""
    before = (size - 1) // 2
    x = te.placeholder(shape, "float32", name="x")
    square = te.compute(shape, lambda *i: x(*i) * x(*i), name="square")
    padded = topi.nn.pad(square, [0, 0, 0, before], [0, 0, 0, size - 1 - before])
    r = te.reduce_axis((0, size), "r")
    total = te.compute(shape, lambda n, h, w, c: te.sum(padded[n, h, w, c + r], axis=r), name="total")
    constants = [tirx.FloatImm("float32", value) for value in (0.3, 2.0, 0.75)]
    scale = te.compute(shape, lambda *i: tirx.pow(total(*i) * constants[0] + constants[1], constants[2]), name="scale")
    return te.create_prim_func([x, te.compute(shape, lambda *i: x(*i) / scale(*i), name="out")])


@pytest.mark.parametrize("shape", [(1, 5, 5, 3), (1, 5, 7, 17), (2, 9, 9, 1), (1, 14, 14, 33), (1, 27, 27, 96)])
@pytest.mark.parametrize("size", [5, 2])
def test_normalisation_over_a_window_of_channels(shape: tuple[int, ...], size: int) -> None:
    (x,) = inputs([shape])
    wide = np.pad(x.astype("float64") ** 2, [(0, 0)] * 3 + [((size - 1) // 2, size - 1 - (size - 1) // 2)])
    total = sum(wide[..., i : i + shape[3]] for i in range(size))
    (got,) = call(schedule_func(lrn(shape, size), TWO_CORES), [x], [(shape, "float32")])
    np.testing.assert_allclose(got, x / (2 + 0.3 * total) ** 0.75, rtol=2e-6, atol=1e-7)


def loops(func: tirx.PrimFunc, kind: tirx.ForKind) -> list[tirx.For]:
    return [node for node in collect(func.body, tirx.For) if node.kind == kind]


LARGE: dict[str, tuple[Shapes, Callable[..., Any]]] = {
    "pool": ([(1, 56, 56, 64)], lambda x: R.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), layout="NHWC")),
    "relu": ([(1, 56, 56, 64)], R.nn.relu),
    "concat": ([(1, 28, 28, 128), (1, 28, 28, 90)], lambda x, y: R.concat([x, y], axis=-1)),
    "softmax": ([(64, 1000)], R.nn.softmax),
    "mean": ([(1, 14, 14, 1024)], lambda x: R.mean(x, [1, 2])),
    "exp": ([(1, 28, 28, 65)], R.exp),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_functions_run_on_all_cores_in_vectors(name: str) -> None:
    (func,) = kernels(schedule_module(fused(*LARGE[name]), TWO_CORES))
    assert loops(func, tirx.ForKind.PARALLEL)
    lanes = max(int(node.extent) for node in loops(func, tirx.ForKind.VECTORIZED))
    assert lanes >= MACHINE.lanes("float32")


@pytest.mark.parametrize("name", ["pool", "concat", "mean"])
def test_no_condition_is_left_in_an_inner_loop(name: str) -> None:
    (func,) = kernels(schedule_module(fused(*LARGE[name]), TWO_CORES))
    assert not [c for c in collect(func.body, tvm.ir.Call) if is_branch(c)]
    inner = [node for node in collect(func.body, tirx.For) if not collect(node.body, tirx.For)]
    assert not [c for node in inner for c in collect(node.body, tirx.IfThenElse)]


def test_intermediate_buffers_hold_one_piece_only() -> None:
    mod = fused([(1, 56, 56, 64)], lambda x: R.nn.relu(R.nn.avg_pool2d(x, (3, 3), (1, 1), (1, 1), layout="NHWC")))
    (func,) = kernels(schedule_module(mod, TWO_CORES))
    sizes = [np.prod([int(s) for s in node.buffer.shape]) for node in collect(func.body, tirx.AllocBuffer)]
    assert sizes and max(sizes) <= 64


def test_small_functions_start_no_threads() -> None:
    for size in (1, 64, SERIAL_WORK - 1):
        (func,) = kernels(schedule_module(fused([(size,)], R.nn.relu), TWO_CORES))
        assert not loops(func, tirx.ForKind.PARALLEL)


def test_one_core_starts_no_threads() -> None:
    one = Machine(**{**MACHINE.__dict__, "cores": 1})
    (func,) = kernels(schedule_module(fused(*LARGE["pool"]), one))
    assert not loops(func, tirx.ForKind.PARALLEL)


def test_vectors_follow_the_machine() -> None:
    machine = Machine.from_target(parse_target("llvm -mtriple=aarch64-linux-gnu"))
    (func,) = kernels(schedule_module(fused(*LARGE["relu"]), machine))
    assert {int(node.extent) for node in loops(func, tirx.ForKind.VECTORIZED)} == {4}


def test_a_scheduled_function_is_left_alone() -> None:
    (func,) = kernels(fused(*LARGE["relu"]))
    done = func.with_attr(IS_SCHEDULED, True)
    assert schedule_func(done, TWO_CORES).same_as(done)


def test_a_rule_that_fails_gives_way_to_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ScheduleError("refused")

    monkeypatch.setattr(rules, "inline_producers", refuse)
    (x,) = inputs([(64, 1000)])
    (func,) = kernels(fused(*LARGE["softmax"]))
    func = schedule_func(func, TWO_CORES)
    assert loops(func, tirx.ForKind.PARALLEL)
    (got,) = call(func, [x], [((64, 1000), "float32")])
    np.testing.assert_allclose(got, softmax(x.astype("float64"), -1), rtol=2e-6)
