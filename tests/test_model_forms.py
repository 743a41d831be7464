"""One small network in every form that a file may give it: opsets, external weights, listed initializers, bytes."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import onnx
import pytest
from network_checks import assert_close, onnxruntime_outputs
from onnx import helper, numpy_helper, version_converter

import gemmify

pytest.importorskip("onnxruntime")

NEWEST = onnx.defs.onnx_opset_version()
X = {"x": np.random.default_rng(2).standard_normal((2, 3, 12, 12)).astype(np.float32)}


def assert_compiles(model: onnx.ModelProto, given: object = None, reference: onnx.ModelProto | None = None) -> None:
    """Compile `given` (default: the model) and compare with ONNX Runtime on `reference` (default: the model)."""
    compiled = gemmify.compile(model if given is None else given)
    assert len(compiled.layers) == 3
    assert [spec.name for spec in compiled.inputs] == ["x"]
    assert_close(compiled.run(X), onnxruntime_outputs(reference or model, X))


@pytest.mark.parametrize("opset", range(7, NEWEST + 1))
def test_opset(opset: int) -> None:
    """These operators mean the same since opset 7; ONNX Runtime, which may not know the newest, runs opset 17."""
    model = models.small_cnn(2)
    numbered = onnx.ModelProto()
    numbered.CopyFrom(model)
    numbered.opset_import[0].version = opset
    if opset < 9:  # IR version 3, the one of those opsets, wants each initializer among the inputs
        numbered.ir_version = 3
        list_initializers(numbered)
    assert_compiles(model, given=numbered)


@pytest.mark.parametrize("opset", [18, 21, NEWEST])
def test_a_network_that_onnx_converted(opset: int) -> None:
    model = models.small_cnn(2)
    converted = version_converter.convert_version(model, opset)
    assert converted.opset_import[0].version == opset
    assert_compiles(model, given=converted)


def list_initializers(model: onnx.ModelProto) -> None:
    """Name every initializer among the inputs too, as IR version 3 requires."""
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def test_initializers_listed_as_inputs() -> None:
    model = models.small_cnn(2)
    list_initializers(model)
    assert_compiles(model)


def test_weights_made_by_constant_nodes() -> None:
    model = models.small_cnn(2)
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    constants = [
        helper.make_node("Constant", [], [t.name], value=numpy_helper.from_array(numpy_helper.to_array(t)))
        for t in model.graph.initializer
    ]
    del moved.graph.initializer[:], moved.graph.node[:]
    moved.graph.node.extend([*constants, *model.graph.node])
    assert_compiles(model, given=moved)


def test_bytes() -> None:
    model = models.small_cnn(2)
    assert_compiles(model, given=model.SerializeToString())
    assert_compiles(model, given=bytearray(model.SerializeToString()))


@pytest.mark.parametrize("one_file", [True, False])
def test_weights_in_files_beside_the_model(one_file: bool, tmp_path: Path) -> None:
    model = models.small_cnn(2)
    path = tmp_path / "deep" / "net.onnx"
    path.parent.mkdir()
    split = onnx.ModelProto()
    split.CopyFrom(model)
    location = "weights.bin" if one_file else None
    onnx.save(
        split,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location=location,
        size_threshold=0,
    )
    assert len(list(path.parent.iterdir())) > 1
    assert_compiles(model, given=path)
    assert_compiles(model, given=str(path))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_an_open_batch(batch: int) -> None:
    model = models.small_cnn("N")
    x = {"x": np.random.default_rng(batch).standard_normal((batch, 3, 12, 12)).astype(np.float32)}
    compiled = gemmify.compile(model, shapes={"x": (batch, 3, 12, 12)})
    assert compiled.outputs[0].shape == (batch, 5)
    assert_close(compiled.run(x), onnxruntime_outputs(model, x))


def test_rows_along_several_axes_are_rows_of_one_matrix() -> None:
    weight = np.random.default_rng(3).standard_normal((4, 5)).astype(np.float32)
    model = models.single("MatMul", [[2, 3, 4]], [weight])
    x = np.random.default_rng(4).standard_normal((2, 3, 4)).astype(np.float32)
    compiled = gemmify.compile(model)
    assert [layer["lowering"] for layer in compiled.layers] == ["dense"]
    np.testing.assert_allclose(compiled.run([x])[0], x @ weight, rtol=1e-5, atol=1e-5)
