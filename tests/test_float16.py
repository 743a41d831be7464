"""float16 storage with float32 arithmetic: layers of every lowering, networks, what is stored how, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import numpy as np
import onnx
import pytest
import tvm
from onnx import numpy_helper
from test_float64 import MIDDLE, WEIGHTS, node, values
from tvm import te

import gemmify
from gemmify import verify
from gemmify.accuracy import UNIT, expected_error
from gemmify.commands import verify as verify_command
from gemmify.conformance import Case, check, compile_cases, scratch_differs
from gemmify.errors import UnsupportedError
from gemmify.fold import evaluate
from gemmify.layer import compile_layer
from gemmify.layer_reference import random_arrays, reference
from gemmify.random_layers import accepted
from lowering import LOWERINGS, ConvProblem, DenseProblem, TransposedConvProblem, conv2d
from lowering.base import Tile, operand_shapes
from lowering.epilogue import EpilogueOp
from schedules import Machine, parse_target, schedule_module

TARGET = parse_target("llvm")
MACHINE = Machine.from_target(TARGET)
IN_OUTPUT = ("kn2row-as", "kn2row-aa")
WIDE = ("winograd-2", "winograd-4", "winograd-6", "fft", "im2col", "im2col-batched", "kn2row")
HALF = [key for key in LOWERINGS if key not in IN_OUTPUT]
OPS = (EpilogueOp("scale", 0), EpilogueOp("add", 1), EpilogueOp("silu"))

needs_conversion = pytest.mark.skipif(not MACHINE.converts_float16, reason="this CPU does not convert float16")


def layers(key: str) -> list[Any]:
    """A few float16 layers that the lowering takes, one of them with more than a hundred terms a sum."""
    long = [conv2d(64, 7, 7, 20, 3), conv2d(300, 5, 5, 9, 1), DenseProblem(3, 700, 20), conv2d(48, 6, 6, 48, 3, g=48)]
    long.append(TransposedConvProblem(1, 64, 9, (4, 5), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), (0, 0)))
    low = LOWERINGS[key]
    found = [p for p in long if low.applicable(p) is None][:1] + accepted(low, 1, seed=16)
    return [replace(p, dtype="float16") for p in found]


# --- layers ----------------------------------------------------------------------------------------------------------


@needs_conversion
@pytest.mark.parametrize("key", HALF)
def test_lowering(key: str) -> None:
    """Within the rounding of float32 sums and of one float16 store; sums in float16 would be off by far more."""
    cases: list[Case] = [(problem, OPS) for problem in layers(key)]
    for layer in compile_cases(cases, MACHINE, TARGET, [LOWERINGS[key]]):
        assert (found := check(layer, OPS)) is None, found
        assert (found := scratch_differs(layer, TARGET)) is None, found
        kernels = layer.kernels.kernels
        assert kernels[-1].dtype == "float16" and {k.dtype for k in kernels if k.kind == "workspace"} <= {"float32"}


@needs_conversion
def test_the_error_is_one_rounding_of_the_output() -> None:
    problem = conv2d(512, 7, 7, 32, 3, dtype="float16")
    data, weight = random_arrays(problem, 3)
    want = reference(problem, data, weight)
    layer = compile_layer(problem, "implicit-gemm", TARGET, epilogue=())
    error = np.abs(layer.run(data, weight) - want).max() / np.abs(want).max()
    assert 0.2 * UNIT["float16"] < error < expected_error(layer.kernels.cost, "float16") < 1.1 * UNIT["float16"]
    narrow = np.zeros(want.shape[-1], "float16")  # the same sums in float16, of one pixel
    for tap in np.ndindex(3, 3):
        for c in range(512):
            narrow = narrow + data[0, 2 + tap[0], 2 + tap[1], c] * weight[:, tap[0], tap[1], c]
    assert np.abs(narrow - want[0, 3, 3]).max() / np.abs(want).max() > 3 * error


@needs_conversion
def test_extreme_values_pass_through() -> None:
    """Infinities, the largest number, subnormals; a sum beyond float16 in between is no overflow."""
    problem = DenseProblem(2, 4, 3, "float16")
    data = np.array([[60000, 60000, -60000, 0], [2.0**-24, np.inf, 0, 1]], "float16")
    weight = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], "float16")
    want = [[60000, 60000, 0], [np.inf, np.nan, np.nan]]
    got = compile_layer(problem, "dense", TARGET, epilogue=()).run(data, weight)
    np.testing.assert_array_equal(got, np.array(want, "float16"))
    data[1, 1] = 0
    got = compile_layer(problem, "dense", TARGET, epilogue=()).run(data, weight)
    np.testing.assert_array_equal(got[1], np.array([2.0**-24, 2.0**-24, 1], "float16"))


def test_what_is_stored_how() -> None:
    """Weights that are moved take 2 bytes an element, transformed ones and those read one by one 4, workspaces 4."""
    problem, tile = conv2d(32, 12, 12, 64, 5), Tile(4, 16)
    for key in HALF:
        low = LOWERINGS[key]
        if low.applicable(problem) is not None:
            continue
        wide, half = (low.cost(replace(problem, dtype=dtype), tile) for dtype in ("float32", "float16"))
        moved = key not in WIDE
        tables = key in ("precomp-gemm", "indirect-gemm")
        assert half.weight_bytes * (2 if moved else 1) == wide.weight_bytes or tables, key
        copied = half.workspace_bytes - wide.workspace_bytes
        assert copied in (0, 4 * 32 * 12 * 12) and half.thread_bytes == wide.thread_bytes, key
        assert half.macs == wide.macs and half.bytes_moved != wide.bytes_moved


def test_float32_is_as_it_was() -> None:
    """No stage is wrapped where nothing is stored in half precision."""
    problem, tile = conv2d(8, 9, 9, 16, 3), Tile(4, 16)
    for low in LOWERINGS.values():
        if low.applicable(problem) is None:
            texts = []
            for stages in (low.build(problem, tile), low.stages(problem, tile)):
                shapes = operand_shapes(problem, low.layout)
                made = {name: te.placeholder(shape, "float32", name=name) for name, shape in shapes.items()}
                for stage in stages:
                    made[stage.name] = stage.compute(*(made[name] for name in stage.reads))
                given = [made["data"], made["weight"], made[stages[-1].name]]
                texts.append(te.create_prim_func(given).script())
            assert texts[0] == texts[1] and "float16" not in texts[0]


@pytest.mark.parametrize("key", HALF)
def test_folding_loses_nothing_of_a_weight(key: str) -> None:
    problem = layers(key)[0]
    low = LOWERINGS[key]
    tile = gemmify.kernels.tile_for(low, problem, MACHINE)
    stage = next(s for s in low.stages(problem, tile) if s.kind == "weight" and s.reads == ("weight",))
    weight = random_arrays(problem, 5)[1]
    placeholder = te.placeholder(weight.shape, "float16", name="weight")
    folded = evaluate(stage.compute(placeholder), {placeholder: weight})
    plain = replace(problem, dtype="float32")
    exact = te.placeholder(weight.shape, "float32", name="weight")
    other = next(st for st in low.stages(plain, tile) if st.name == stage.name)
    want = evaluate(other.compute(exact), {exact: weight.astype("float32")})
    assert folded.dtype == ("float32" if stage.wide else "float16") and stage.wide == (key in WIDE)
    np.testing.assert_array_equal(folded, want)


@pytest.mark.parametrize("key", IN_OUTPUT)
def test_forms_that_add_up_in_the_output_refuse(key: str) -> None:
    reason = LOWERINGS[key].applicable(conv2d(8, 9, 9, 16, 3, dtype="float16"))
    assert str(reason) == "needs float32 or float64, because sums grow in the output, got float16"


@needs_conversion
@pytest.mark.parametrize("key", ["im2row", "winograd-2", "kn2col", "fft"])
def test_as_a_pass_on_a_function_written_by_hand(key: str) -> None:
    """A convolution in float16 that somebody else wrote: the lowered one adds up in float32."""
    problem = ConvProblem(1, 40, 12, (9, 9), (3, 3), (1, 1), (0, 0), (0, 0), (1, 1), 1, "float16")
    a, w = te.placeholder((1, 9, 9, 40), "float16", "a"), te.placeholder((12, 3, 3, 40), "float16", "w")
    y, x, c = (te.reduce_axis((0, extent)) for extent in (3, 3, 40))
    out = te.compute(
        (1, 7, 7, 12), lambda n, i, j, m: te.sum(a(n, i + y, j + x, c) * w(m, y, x, c), axis=[y, x, c]), name="conv"
    )
    mod = tvm.IRModule({"main": te.create_prim_func([a, w, out]).with_attr("global_symbol", "main")})
    lowered = LOWERINGS[key](mod)
    assert lowered["main"].script() != mod["main"].script()
    data, weight = random_arrays(problem, 1)
    got = tvm.runtime.tensor(np.full((1, 7, 7, 12), np.nan, "float16"))
    function = tvm.compile(schedule_module(lowered, MACHINE), target=TARGET, tir_pipeline="gemmify")["main"]
    function(tvm.runtime.tensor(data), tvm.runtime.tensor(weight), got)
    want = reference(problem, data, weight)
    assert np.abs(got.numpy() - want).max() < 1.1 * UNIT["float16"] * np.abs(want).max()


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "converts"),
    [
        ("llvm -mcpu=x86-64-v2 -mtriple=x86_64-linux-gnu", False),
        ("llvm -mcpu=x86-64-v3 -mtriple=x86_64-linux-gnu", True),
        ("llvm -mcpu=cortex-a72 -mtriple=aarch64-linux-gnu", True),
        ("llvm -mcpu=generic-rv64 -mtriple=riscv64-linux-gnu", False),
    ],
)
def test_which_targets_convert(target: str, converts: bool) -> None:
    assert Machine.from_target(parse_target(target)).converts_float16 == converts


def test_a_target_without_conversion_is_refused_in_words() -> None:
    old = "llvm -mcpu=x86-64-v2 -mtriple=x86_64-linux-gnu"
    with pytest.raises(UnsupportedError, match=r"layer computes in float16, but .* x86-64-v2, has no instructions"):
        compile_layer(conv2d(8, 9, 9, 16, 3, dtype="float16"), "im2row", parse_target(old))
    with pytest.raises(UnsupportedError, match=r"layer c computes in float16.*-mcpu=x86-64-v3, or convert"):
        gemmify.compile(network("clip"), target=old)


# --- networks --------------------------------------------------------------------------------------------------------


def network(middle: str) -> onnx.ModelProto:
    """conv, `middle`, max pool, conv, a mean whose sum float16 cannot hold, fc, softmax."""
    nodes = [
        node("Conv", "x w1", "c", pads=[1] * 4),
        *MIDDLE[middle],
        node("MaxPool", "t", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "p w2 b2", "d", pads=[1] * 4),
        node("Add", "d offset", "e"),
        node("GlobalAveragePool", "e", "h"),
        node("Mul", "h small", "f0"),
        node("Flatten", "f0", "f"),
        node("Gemm", "f w4 b3", "g", transB=1),
        node("Softmax", "g", "y"),
    ]
    every = {**WEIGHTS, "w4": values(5, 6), "offset": np.array(4000.0), "small": np.array(2.0**-12)}
    used = {name for n in nodes for name in n.input}
    weights = {name: value.astype(np.float16) for name, value in every.items() if name in used}
    return models.make_model(
        nodes, {"x": (2, 3, 12, 12)}, ["y", "t"], weights, opset=17, dtype=onnx.TensorProto.FLOAT16
    )


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers and operators in float64."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for tensor in wide.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*wide.graph.input, *wide.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return wide


@needs_conversion
@pytest.mark.parametrize("middle", ["batch-norm-relu", "hardswish", "lrn", "average-pool"])
@pytest.mark.parametrize("target", ["llvm", "llvm -mcpu=x86-64-v3"])
def test_small_network(middle: str, target: str) -> None:
    if "v3" in target and MACHINE.arch != "x86_64":
        pytest.skip("an x86 target")
    model, x = network(middle), (values(2, 3, 12, 12) * 10).astype(np.float16)
    want, _ = verify.reference_outputs(in_float64(model), {"x": x.astype(np.float64)}, ["y", "t"], "float64")
    again, _ = verify.reference_outputs(model, {"x": x}, ["y", "t"], "float64")
    assert all(np.array_equal(a, b) for a, b in zip(again, want, strict=True))
    got = gemmify.compile(model, target=target).run({"x": x})
    assert all(row["holds"] for row in verify.compare(["y", "t"], got, want))
    assert not any(row["holds"] for row in verify.compare(["y", "t"], got, want, 1e-6))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == np.float16 and np.unique(w).size > 4
        assert np.abs(g - w).max() < 6 * UNIT["float16"] * np.abs(w).max()


@needs_conversion
def test_verify_allows_for_float16_inside(tmp_path) -> None:
    """x -> Conv in float16 -> Cast -> y in float32: the output's dtype does not tell."""
    helper, half = onnx.helper, onnx.TensorProto.FLOAT16
    weight = numpy_helper.from_array(values(8, 4, 3, 3).astype(np.float16), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Cast", ["a"], ["y"], to=1)]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [info("x", half, [1, 4, 9, 9])], [info("y", 1, [1, 8, 7, 7])], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "half.onnx"
    onnx.save(model, str(path))
    found = verify_command.execute(str(path), reference="float64")
    (row,) = found["outputs"]
    assert found["holds"] and row["tolerance"] == verify.HALF_TOLERANCE and row["relative_error"] > 1e-5
    assert verify_command.execute(str(path), reference="float64", tolerance=1e-6)["outputs"][0]["tolerance"] == 1e-6
