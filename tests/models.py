"""Models for tests: small ONNX graphs by hand, and the published architectures that the onnx package carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[Any]],
    outputs: Sequence[str],
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = OPSET,
    dtype: int = TensorProto.FLOAT,
    out_dtype: int | None = None,
) -> onnx.ModelProto:
    """An ONNX model of `nodes`; an input's shape may hold names for open dimensions; output shapes are left open."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, out_dtype or dtype, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def single(
    op: str,
    shapes: Sequence[Sequence[int]],
    weights: Sequence[np.ndarray | None] = (),
    opset: int = OPSET,
    outputs: int = 1,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node `node`: inputs x0, x1 ... of `shapes`, then `weights` (None: left out), outputs y0, y1 ..."""
    data = {f"x{i}": shape for i, shape in enumerate(shapes)}
    values = {f"w{i}": w for i, w in enumerate(weights) if w is not None}
    names = [*data, *(f"w{i}" if w is not None else "" for i, w in enumerate(weights))]
    outs = [f"y{i}" for i in range(outputs)]
    return make_model([helper.make_node(op, names, outs, name="node", **attributes)], data, outs, values, opset)


def small_cnn(batch: int | str = 1, seed: int = 0) -> onnx.ModelProto:
    """conv, batch norm, relu, pool, residual conv, flatten, fc: input `x` [batch, 3, 12, 12], output `y` [batch, 5]."""
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(max(prod(shape[1:]), 1))).astype(np.float32)

    weights = {
        "w1": values(8, 3, 3, 3),
        "gamma": 1 + 0.1 * values(8),
        "beta": values(8),
        "mean": values(8),
        "var": 1 + np.abs(values(8)),
        "w2": values(8, 8, 3, 3),
        "b2": values(8),
        "w3": values(5, 288),
        "b3": values(5),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="first/conv", pads=[1] * 4, kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c1", "gamma", "beta", "mean", "var"], ["n1"], name="first/bn"),
        helper.make_node("Relu", ["n1"], ["r1"], name="first/relu"),
        helper.make_node("MaxPool", ["r1"], ["p1"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p1", "w2", "b2"], ["c2"], name="second/conv", pads=[1] * 4),
        helper.make_node("Add", ["c2", "p1"], ["a2"], name="add"),
        helper.make_node("Relu", ["a2"], ["r2"], name="second/relu"),
        helper.make_node("Flatten", ["r2"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="fc", transB=1),
    ]
    return make_model(nodes, {"x": [batch, 3, 12, 12]}, ["y"], weights)


LIGHT = (
    "bvlc_alexnet",
    "vgg19",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "squeezenet",
    "densenet121",
    "shufflenet",
    "zfnet512",
)


def light_path(name: str) -> Path:
    """Where the onnx package keeps the architecture `name`, its weights written as ConstantOfShape nodes."""
    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"


def light_model(name: str, seed: int = 0) -> onnx.ModelProto:
    """The published architecture with seeded random initializers in place of its constant weights.

    Weights of convolutions and fully connected layers are scaled after He by their fan-in, batch norms get positive
    variances, so that activations keep a sane size. Every initializer is also listed as an input, as in the original.
    """
    model = onnx.load(light_path(name))
    graph = model.graph
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    roles = _roles(graph)
    rng = np.random.default_rng(seed)
    residual = any(node.op_type == "Sum" for node in graph.node)
    made = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "ConstantOfShape"}
    queries = set(made.values())
    # Drop the small things first: protobuf copies what moves, and the weights are large.
    _drop(graph.node, lambda n: n.op_type == "ConstantOfShape")
    _drop(graph.initializer, lambda t: t.name in queries)
    _drop(graph.input, lambda i: i.name in queries)
    for name, query in made.items():
        shape = tuple(int(d) for d in shapes[query])
        values = _values(roles.get(name, "shift"), shape, rng, residual)
        graph.initializer.add(name=name, dims=shape, data_type=TensorProto.FLOAT, raw_data=values.tobytes())
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return model


def _drop(items: Any, unwanted: Callable[[Any], bool]) -> None:
    for i in reversed(range(len(items))):
        if unwanted(items[i]):
            del items[i]


def _roles(graph: onnx.GraphProto) -> dict[str, str]:
    """Constant -> what it is to the node that reads it: weight, scale, variance or shift."""
    through = {n.output[0]: n.input[0] for n in graph.node if n.op_type in ("Unsqueeze", "Reshape")}
    roles: dict[str, str] = {}
    for node in graph.node:
        by_input = {
            "Conv": ["", "weight"],
            "Gemm": ["", "weight"],
            "MatMul": ["", "weight"],
            "Mul": ["", "scale"],
            "BatchNormalization": ["", "scale", "shift", "shift", "variance"],
        }.get(node.op_type, [])
        for name, role in zip(node.input, by_input, strict=False):
            if role:
                roles[through.get(name, name)] = role
    return roles


def _values(role: str, shape: tuple[int, ...], rng: np.random.Generator, residual: bool) -> np.ndarray:
    values = rng.random(shape, dtype=np.float32)
    if role == "weight":
        # He: variance 2 / fan-in keeps the mean square through a ReLU, which few matrices and depthwise layers have.
        limit = ((6.0 if len(shape) == 4 and shape[1] > 1 else 3.0) / max(prod(shape[1:]), 1)) ** 0.5
        low, high = -limit, limit
    elif role == "scale":
        low, high = (0.3, 0.6) if residual else (0.5, 1.0)  # small branches, so that sums do not grow block by block
    else:
        low, high = (0.8, 1.2) if role == "variance" else (-0.1, 0.1)
    values *= np.float32(high - low)
    values += np.float32(low)
    return values
