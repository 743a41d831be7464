"""A float32 network converted to half precision when it is compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import gemmify
from gemmify import cli
from gemmify.errors import InputError
from gemmify.frontend import import_model
from gemmify.frontend.convert_dtype import convert_dtype
from gemmify.frontend.imported import TensorSpec
from gemmify.verify import to_float64
from lowering.graph._rewrite import Graph, dtype_of, is_tensor


def network(scale: float = 0.2) -> onnx.ModelProto:
    """Convolution, batch norm, clip, pooling, a cast to integers and back, fully connected layer, softmax."""
    rng = np.random.default_rng(5)

    def weight(name: str, *shape: int, low: float = -1.0) -> None:
        values = rng.uniform(low, 1, shape).astype(np.float32) * np.float32(scale)
        weights.append(numpy_helper.from_array(values, name))

    weights: list[onnx.TensorProto] = []
    weight("w", 8, 3, 3, 3)
    for name in ("gamma", "beta", "mean", "var"):
        weight(name, 8, low=0.5)
    weight("fc", 8, 5)
    weights += [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("low", 0.0), ("high", 6.0))]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["b"]),
        helper.make_node("Clip", ["b", "low", "high"], ["r"]),
        helper.make_node("Cast", ["r"], ["i"], to=TensorProto.INT32),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["r", "f"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["g"]),
        helper.make_node("Flatten", ["g"], ["v"]),
        helper.make_node("MatMul", ["v", "fc"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 9, 9])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 5])
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_numbers_in_float16() -> None:
    compiled = gemmify.compile(network(), dtype="float16")
    assert [str(s.dtype) for s in (*compiled.inputs, *compiled.outputs)] == ["float16", "float16"]
    assert {layer["problem"]["dtype"] for layer in compiled.layers} == {"float16"}
    x = np.random.default_rng(1).standard_normal((2, 3, 9, 9)).astype(np.float16)
    from onnx.reference import ReferenceEvaluator

    (want,) = ReferenceEvaluator(to_float64(network())).run(None, {"x": x.astype(np.float64)})
    assert np.abs(compiled(x) - want).max() < 4e-3 * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_everything_is_converted(dtype: str) -> None:
    model = import_model(network())
    found = convert_dtype(model, dtype)
    assert found.inputs == (TensorSpec("x", (2, 3, 9, 9), dtype),) and found.outputs[0].dtype == dtype
    graph = Graph(found.mod["main"])
    tensors = [e for e in (*graph.params, *(v for v, _ in graph.bindings)) if is_tensor(e)]
    assert {dtype_of(e) for e in tensors} == {dtype, "int32", "int64", "bool"}
    assert found.source is None and model.inputs[0].dtype == "float32", "the model that was given has changed"
    assert convert_dtype(model, "float32") is model


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"converted to float16, bfloat16 or float32, got 'half'"):
        gemmify.compile(network(), dtype="half")
    with pytest.raises(InputError, match=r"a weight of .*e\+05 does not fit into float16 \(65504 at most\)"):
        import_model(network(1e5), dtype="float16")
    assert import_model(network(1e5), dtype="bfloat16").inputs[0].dtype == "bfloat16"
    path = tmp_path / "net.onnx"
    onnx.save(network(), str(path))
    assert cli.main(["explain", str(path), "--dtype", "int8"]) == 2
    assert "got 'int8'" in capsys.readouterr().err


def test_the_command_line_verifies_it(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(network(), str(path))
    assert cli.main(["verify", str(path), "--dtype", "float16", "--reference", "float64"]) == 0
