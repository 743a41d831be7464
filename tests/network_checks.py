"""Whole networks against ONNX Runtime: what the tests of networks share.

The last tensor in front of the softmax is an output too: a softmax over a thousand classes that are all near 1/1000
would hide an error that its input shows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import models
import numpy as np
import onnx
import pytest

from gemmify import zoo
from gemmify.runtime import random_inputs

TOLERANCE = 1e-4
LAYER_OPS = ("Conv", "Gemm", "MatMul")


def network(name: str, batch: int = 1) -> onnx.ModelProto:
    """A zoo network, `small`, or `light_<name>`; with a softmax at its end, what that reads is a second output."""
    if name == "small":
        return models.small_cnn(batch)
    if name in zoo.ZOO:
        return with_logits(zoo.build(name, batch=batch))
    assert batch == 1, "the published architectures have a fixed batch"
    return with_logits(models.light_model(name.removeprefix("light_")))


def with_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, changed: for each output made by a Softmax, what the Softmax reads becomes an output as well."""
    makers = {out: node for node in model.graph.node for out in node.output}
    for output in [o.name for o in model.graph.output]:
        if makers[output].op_type == "Softmax":
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(makers[output].input[0]))
            model.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return model


def onnxruntime_outputs(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of `model` by ONNX Runtime, in the model's order."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run([o.name for o in model.graph.output], inputs))


@lru_cache(maxsize=1)
def case(name: str, batch: int = 1) -> tuple[onnx.ModelProto, dict[str, np.ndarray], list[np.ndarray]]:
    """A network, seeded inputs for it, and what ONNX Runtime makes of them. One is kept: they are large."""
    model = network(name, batch)
    weights = {t.name for t in model.graph.initializer}
    real = [i for i in model.graph.input if i.name not in weights]
    specs = [Spec(i.name, tuple(d.dim_value for d in i.type.tensor_type.shape.dim)) for i in real]
    inputs = random_inputs(specs, seed=7)  # type: ignore[arg-type]
    return model, inputs, onnxruntime_outputs(model, inputs)


class Spec:
    """What `random_inputs` needs of an input."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape, self.dtype = name, shape, "float32"


def assert_close(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """Every output within 1e-4 of its largest value, and the last within 1e-4 of its largest distance from its mean.

    The second is what the classes differ by, which a common offset does not blur. Fails too for a reference in which
    the classes hardly differ: nothing could be seen there. Returns the largest relative error.
    """
    assert [g.shape for g in got] == [w.shape for w in want]
    worst = 0.0
    for have, ref in zip(got, want, strict=True):
        error = np.abs(have.astype(np.float64) - ref).max()
        worst = max(worst, error / np.abs(ref).max())
    logits = want[-1].reshape(len(want[-1]), -1).astype(np.float64)
    spread = np.abs(logits - logits.mean(axis=1, keepdims=True)).max()
    assert np.isfinite(logits).all() and np.unique(logits).size > logits.size // 2
    assert logits.std(axis=1).min() > 0.02 * np.abs(logits).mean(), "the classes hardly differ: nothing can be seen"
    worst = max(worst, np.abs(got[-1].reshape(logits.shape) - logits).max() / spread)
    assert worst <= TOLERANCE, f"relative error {worst:.3g} is above {TOLERANCE:g}"
    return float(worst)


def assert_lowered(model: onnx.ModelProto, layers: list[dict[str, Any]], key: str) -> None:
    """Every convolution and fully connected layer of `model` is among `layers`, with `key` wherever it applies."""
    assert len(layers) == sum(node.op_type in LAYER_OPS for node in model.graph.node)
    assert all(layer["kernels"] for layer in layers)
    assert len({layer["name"] for layer in layers}) == len(layers)
    if key != "auto":
        for layer in layers:
            refused = layer["reason"].startswith(f"{key} does not apply: ")
            assert refused or (layer["lowering"] == key and layer["reason"] == "as asked"), layer["name"]


def assert_memory(layers: list[dict[str, Any]], memory: dict[str, int]) -> None:
    """The workspace that is allocated is that of the layer that needs most: layers share one arena."""
    most = max(layer["workspace_bytes"] for layer in layers)
    assert memory["workspace"] <= memory["arena"]
    assert memory["workspace"] + memory["kernels"] >= most
    assert memory["workspace"] <= most
