"""Networks in float64: compiled, they agree with the float64 reference to its last digits; nothing is narrowed."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import onnx
import pytest
from onnx import helper

import gemmify
from gemmify import verify

RNG = np.random.default_rng(5)
SHAPE = (2, 3, 12, 12)
TOLERANCE = 1e-12


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))


WEIGHTS = {
    "w1": values(8, 3, 3, 3),
    "scale": 1 + 0.1 * values(8),
    "bias": values(8),
    "mean": values(8),
    "var": 1 + np.abs(values(8)),
    "w2": values(6, 8, 3, 3),
    "b2": values(6),
    "w3": values(5, 216),
    "b3": values(5),
    "low": np.array(-0.2),
    "high": np.array(0.3),
    "six": np.array(6.0),
}


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def network(middle: list[onnx.NodeProto]) -> onnx.ModelProto:
    """conv, `middle` (reads c, writes t), max pool, conv, fc, softmax; the outputs are the classes y and t."""
    nodes = [
        node("Conv", "x w1", "c", pads=[1] * 4),
        *middle,
        node("MaxPool", "t", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "p w2 b2", "d", pads=[1] * 4),
        node("Flatten", "d", "f"),
        node("Gemm", "f w3 b3", "g", transB=1),
        node("Softmax", "g", "y"),
    ]
    used = {name for n in nodes for name in n.input}
    weights = {name: value for name, value in WEIGHTS.items() if name in used}
    return models.make_model(nodes, {"x": SHAPE}, ["y", "t"], weights, opset=17, dtype=onnx.TensorProto.DOUBLE)


# A given epsilon: its default is 1e-5 rounded to float32 for one engine, and not rounded for another.
NORM = node("BatchNormalization", "a scale bias mean var", "t", epsilon=2.0**-10)
MIDDLE = {
    "batch-norm": [node("Identity", "c", "a"), NORM],
    "batch-norm-relu": [
        node("BatchNormalization", "c scale bias mean var", "a", epsilon=2.0**-10),
        node("Relu", "a", "t"),
    ],
    "batch-norm-behind-relu": [node("Relu", "c", "a"), NORM],
    "batch-norm-behind-pool": [node("AveragePool", "c", "a", kernel_shape=[3, 3], pads=[1] * 4), NORM],
    "lrn": [node("LRN", "c", "t", size=5, alpha=0.1)],
    "lrn-power": [node("LRN", "c", "t", size=3, alpha=0.1, beta=0.6, bias=2.0)],
    "hardswish": [node("HardSwish", "c", "t")],
    "hardsigmoid": [node("HardSigmoid", "c", "a", alpha=0.3), node("Mul", "c a", "t")],
    "clip": [node("Clip", "c low high", "t")],
    "maximum": [node("Max", "c low", "t")],
    "average-pool": [node("AveragePool", "c", "t", kernel_shape=[3, 3], pads=[1] * 4)],
    "average-pool-counted": [node("AveragePool", "c", "t", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)],
    "global-pool": [node("GlobalAveragePool", "c", "a"), node("Mul", "c a", "t")],
    "difference": [node("Sub", "c high", "t")],
    "quotient": [node("Div", "c six", "t")],
    "elu": [node("Elu", "c", "t", alpha=0.4)],
    "selu": [node("Selu", "c", "t")],
    "thresholded-relu": [node("ThresholdedRelu", "c", "t", alpha=0.3)],
}


def difference(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """The largest error as a share of the largest value of its output."""
    assert [g.dtype for g in got] == [np.float64] * len(want) and [g.shape for g in got] == [w.shape for w in want]
    assert all(np.unique(w).size > 4 for w in want)
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("name", MIDDLE)
def test_small_network(name: str) -> None:
    model, x = network(MIDDLE[name]), {"x": values(*SHAPE) * 10}
    want, _ = verify.reference_outputs(model, x, ["y", "t"], "float64")
    assert difference(gemmify.compile(model).run(x), want) < TOLERANCE


@pytest.mark.parametrize("lowering", ["im2col", "winograd-2", "direct"])
def test_lowering(lowering: str) -> None:
    model, x = network(MIDDLE["batch-norm-relu"]), {"x": values(*SHAPE) * 10}
    want, _ = verify.reference_outputs(model, x, ["y", "t"], "float64")
    compiled = gemmify.compile(model, lowering=lowering)
    assert any(layer["lowering"] == lowering for layer in compiled.layers)
    assert difference(compiled.run(x), want) < TOLERANCE


def test_a_weight_narrowed_to_float32_is_seen() -> None:
    model, x = network(MIDDLE["batch-norm"]), {"x": values(*SHAPE) * 10}
    want, _ = verify.reference_outputs(model, x, ["y", "t"], "float64")
    for tensor in model.graph.initializer:
        if tensor.name == "var":
            narrowed = onnx.numpy_helper.to_array(tensor).astype(np.float32).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(narrowed, "var"))
    got, _ = verify.reference_outputs(model, x, ["y", "t"], "float64")
    assert difference(got, want) > 10 * TOLERANCE


def test_onnxruntime_agrees() -> None:
    """Its convolution knows no float64: a fully connected network, whose operators it does compute in float64."""
    runtime = pytest.importorskip("onnxruntime")
    nodes = [
        node("Gemm", "x w b", "g", transB=1),
        node("BatchNormalization", "g scale bias mean var", "n", epsilon=2.0**-10),
        node("Clip", "n low high", "c"),
        node("Softmax", "c", "y"),
    ]
    weights = {name: WEIGHTS[name] for name in ("scale", "bias", "mean", "var", "low", "high")}
    weights |= {"w": values(8, 20), "b": values(8)}
    model = models.make_model(nodes, {"x": (4, 20)}, ["y"], weights, opset=17, dtype=onnx.TensorProto.DOUBLE)
    x = {"x": values(4, 20) * 10}
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert difference(gemmify.compile(model).run(x), session.run(["y"], x)) < TOLERANCE
