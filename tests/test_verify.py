"""The float64 reference of `gemmify verify`, held against ONNX Runtime, operator by operator; and the choice of one."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import onnx
import pytest
from models import make_model, single, small_cnn
from network_checks import onnxruntime_outputs

from gemmify import verify
from gemmify.errors import InputError, UnsupportedError
from gemmify.frontend import TensorSpec
from gemmify.reference_ops import OPERATORS
from gemmify.runtime import random_inputs

RNG = np.random.default_rng(11)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def case(name: str, model: onnx.ModelProto) -> Any:
    return pytest.param(model, id=name)


def conv(name: str, size: tuple[int, ...], weight: tuple[int, ...], **attributes: Any) -> Any:
    channels = weight[1] * attributes.get("group", 1)
    return case(name, single("Conv", [(2, channels, *size)], [values(*weight), values(weight[0])], **attributes))


def transpose(name: str, size: tuple[int, ...], weight: tuple[int, ...], **attributes: Any) -> Any:
    bias = values(weight[1] * attributes.get("group", 1))
    return case(name, single("ConvTranspose", [(2, weight[0], *size)], [values(*weight), bias], **attributes))


def pool(name: str, op: str, size: tuple[int, ...], opset: int = 17, **attributes: Any) -> Any:
    return case(f"{op}-{name}", single(op, [(2, 3, *size)], opset=opset, **attributes))


def numbers(*given: float) -> np.ndarray:
    return np.array(given, np.float32)


def norm(name: str, opset: int, shape: Any = (2, 3, 4, 5), of: Any = (3,), **attributes: Any) -> Any:
    weights = [values(*of), values(*of), values(*of), np.abs(values(*of)) + numbers(0.5)]
    return case(name, single("BatchNormalization", [shape], weights, opset=opset, **attributes))


AXES = {"axes": [0, 1, 3]}
POOLS = [
    pool(name, op, size, **attributes)
    for op in ("MaxPool", "AveragePool")
    for name, size, attributes in [
        ("plain", (8, 9), {"kernel_shape": [2, 3]}),
        ("strided", (11, 8), {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 1]}),
        ("same-upper", (7, 10), {"kernel_shape": [3, 4], "strides": [2, 3], "auto_pad": "SAME_UPPER"}),
        ("same-lower", (7, 10), {"kernel_shape": [3, 4], "strides": [2, 3], "auto_pad": "SAME_LOWER"}),
        ("valid", (7, 10), {"kernel_shape": [3, 4], "strides": [2, 3], "auto_pad": "VALID"}),
        ("ceil", (8, 9), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        ("ceil-dropped", (6, 6), {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1, "pads": [1, 1, 1, 1]}),
        ("1d", (13,), {"kernel_shape": [4], "strides": [3], "pads": [2, 1]}),
        ("3d", (5, 6, 7), {"kernel_shape": [2, 3, 2], "strides": [1, 2, 2]}),
    ]
]
MODELS = [
    *POOLS,
    pool("dilated", "MaxPool", (9, 9), kernel_shape=[2, 3], dilations=[3, 2], pads=[1, 1, 0, 1]),
    pool("counted", "AveragePool", (8, 9), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, count_include_pad=1),
    *[
        pool(f"{p}-{opset}", "LpPool", (8, 9), opset, kernel_shape=[3, 2], strides=[2, 3], pads=[1, 0, 1, 1], p=p)
        for p, opset in ((1, 7), (2, 17), (3, 11))
    ],
    pool("ceil", "LpPool", (8, 9), 18, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    pool("same", "LpPool", (7, 10), 11, kernel_shape=[3, 4], strides=[2, 3], auto_pad="SAME_LOWER"),
    *[pool(f"{p}", "GlobalLpPool", (8, 9), p=p) for p in (1, 2, 3)],
    case("MaxPool-indices", single("MaxPool", [(2, 3, 6, 7)], outputs=2, kernel_shape=[3, 2], strides=[2, 1])),
    conv("conv", (8, 9), (5, 3, 3, 2), pads=[1, 0, 2, 1], strides=[2, 1]),
    conv("conv-groups", (8, 9), (6, 2, 3, 3), group=3, dilations=[2, 1]),
    conv("conv-same-lower", (8, 9), (4, 3, 4, 2), strides=[3, 2], auto_pad="SAME_LOWER"),
    conv("conv-same-upper", (8, 9), (4, 3, 4, 2), strides=[3, 2], auto_pad="SAME_UPPER"),
    conv("conv-1d", (9,), (4, 3, 3), pads=[2, 0]),
    conv("conv-3d", (4, 5, 6), (4, 3, 2, 3, 1), pads=[1, 0, 0, 0, 1, 2]),
    transpose("transpose", (4, 5), (3, 2, 3, 2), strides=[2, 3], pads=[1, 0, 0, 1], output_padding=[1, 0]),
    transpose("transpose-groups", (4, 5), (6, 2, 3, 3), group=3, strides=[2, 2], dilations=[2, 1]),
    transpose("transpose-output-shape", (4, 5), (3, 2, 4, 4), strides=[2, 2], output_shape=[8, 10]),
    transpose("transpose-odd", (4, 5), (3, 2, 3, 3), strides=[2, 2], output_shape=[8, 10]),
    transpose("transpose-odd-upper", (4, 5), (3, 2, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    transpose("transpose-odd-lower", (4, 5), (3, 2, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    transpose("transpose-same", (4, 5), (3, 2, 4, 4), strides=[2, 2], auto_pad="SAME_UPPER"),
    *[case(f"lrn-{n}", single("LRN", [(3, 9, 4, 5)], size=n, alpha=0.5, beta=0.7, bias=2.0)) for n in (1, 3, 5)],
    case("lrn-defaults", single("LRN", [(2, 9, 4, 5)], size=3)),
    *[norm(f"norm-opset{opset}", opset, epsilon=0.1) for opset in (7, 8, 9, 10, 12, 13, 14, 15, 17)],
    *[norm(f"norm-momentum-opset{opset}", opset, momentum=0.5) for opset in (7, 9, 13, 14)],
    norm("norm-of-rows", 9, (7, 3)),
    norm("norm-3d", 9, (2, 3, 2, 4, 3)),
    norm("norm-channels", 8, spatial=1),
    norm("norm-positions", 8, (4, 3, 2, 5), (3, 2, 5), spatial=0),
    *[case(f"mvn{axes}", single("MeanVarianceNormalization", [(2, 3, 4, 5)], opset=13, **axes)) for axes in ({}, AXES)],
    case("hardswish", single("HardSwish", [(2, 3, 4, 5)])),
    *[
        case(
            f"upsample-{mode}-opset7", single("Upsample", [(2, 3, 5, 8)], opset=7, mode=mode, scales=[1.0, 1, 1.5, 2.4])
        )
        for mode in ("nearest", "linear")
    ],
    *[
        case(f"{op}-{mode}-{scales}", single(op, [(2, 3, 8, 12)], [numbers(*scales)], opset=opset, mode=mode))
        for op, opset, scales in [
            ("Upsample", 9, (1, 1, 2, 3)),
            ("Upsample", 9, (1, 1, 1.5, 2.4)),
            ("Resize", 10, (1, 1, 2, 1.25)),
            ("Resize", 10, (1, 1, 0.75, 0.75)),
            ("Resize", 10, (1, 1, 0.6, 3)),
        ]
        for mode in ("nearest", "linear")
    ],
    case("resize", single("Resize", [(2, 3, 8, 12)], [None, numbers(1, 1, 1.5, 0.75)], opset=13, mode="linear")),
    *[
        case(f"pad-{mode}", single("Pad", [(2, 3, 4, 5)], opset=10, mode=mode, pads=[0, 0, 1, -2, 0, 1, -1, 2]))
        for mode in ("constant", "reflect", "edge")
    ],
    case("pad-value", single("Pad", [(2, 3, 4, 5)], opset=7, pads=[0, 0, 1, 2, 0, 0, 0, 1], value=1.5)),
    case("pad-inputs", single("Pad", [(2, 3, 4, 5)], [np.array([0, 1, 1, 2, -1, 0, 2, 1]), numbers(1.5)[0]], opset=13)),
    case("pad-axes", single("Pad", [(2, 3, 4, 5)], [np.array([1, -2, 2, 1]), None, np.array([2, -1])], opset=18)),
    *[
        case(f"{op}-opset{opset}-{axis}", single(op, [(2, 3, 4, 5)], opset=opset, **axis))
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for opset in (11, 13)
        for axis in ({}, {"axis": 2}, {"axis": -2})
    ],
]


def inputs_of(model: onnx.ModelProto, seed: int = 3) -> dict[str, np.ndarray]:
    specs = [
        TensorSpec(i.name, tuple(d.dim_value for d in i.type.tensor_type.shape.dim), "float32")
        for i in model.graph.input
    ]
    return random_inputs(specs, seed)


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_agrees_with_onnxruntime(model: onnx.ModelProto) -> None:
    names = [o.name for o in model.graph.output]
    if len(names) > 1:
        model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    x = inputs_of(model)
    got, engine = verify.reference_outputs(model, x, names, "float64")
    assert engine == "float64" and got[0].dtype == np.float64
    for have, want in zip(got, onnxruntime_outputs(model, x), strict=True):
        assert have.shape == want.shape and np.unique(want).size > 1
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_batch_normalization_in_training_mode_is_refused() -> None:
    of_three = [values(3), values(3), values(3), np.abs(values(3))]
    model = single("BatchNormalization", [(2, 3, 4, 5)], of_three, opset=15, outputs=3, training_mode=1)
    with pytest.raises(UnsupportedError, match="'node' is in training mode; export the model for inference"):
        verify.reference_outputs(model, inputs_of(model), ["y0"], "float64")


@pytest.mark.parametrize("opset", [7, 9, 12, 13, 14, 17])
def test_a_network_of_every_opset(opset: int) -> None:
    model = small_cnn(2)
    model.opset_import[0].version = opset
    if opset < 9:  # IR version 3, the one of those opsets, wants each initializer among the inputs
        model.ir_version = 3
        shapes = [onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer]
        model.graph.input.extend(shapes)
    x = {"x": values(2, 3, 12, 12)}
    (got,), _ = verify.reference_outputs(model, x, ["y"], "float64")
    np.testing.assert_allclose(got, onnxruntime_outputs(model, x)[0], rtol=1e-5, atol=1e-5)


def test_every_operator_of_ours_is_compared() -> None:
    compared = {node.op_type for param in MODELS for node in param.values[0].graph.node}
    assert compared == {op.__name__ for op in OPERATORS}


def test_float64_is_more_exact_than_float32() -> None:
    """The reference of a long sum: 1 + 1e-9 is 1 in float32."""
    weight = np.full((1, 4096), 1.0, np.float32)
    model = single("Gemm", [(1, 4096)], [weight], transB=1)
    x = np.full((1, 4096), 1e-9, np.float32)
    x[0, 0] = 1
    ((got,), _) = verify.reference_outputs(model, {"x0": x}, ["y0"], "float64")
    assert abs(got.item() - (1 + 4095 * float(np.float32(1e-9)))) < 1e-12


@pytest.mark.parametrize("installed", [True, False])
def test_auto_takes_onnxruntime_where_it_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "onnxruntime" else find(n, *a))
    else:
        pytest.importorskip("onnxruntime")
    model = small_cnn(2)
    x = inputs_of(model)
    got, engine = verify.reference_outputs(model, x, ["y"])
    assert engine == ("onnxruntime" if installed else "float64")
    np.testing.assert_allclose(got[0], onnxruntime_outputs(model, x)[0], rtol=1e-4, atol=1e-5)
    if not installed:
        with pytest.raises(InputError, match="ONNX Runtime is not installed"):
            verify.reference_outputs(model, x, ["y"], "onnxruntime")


@pytest.mark.parametrize("name", ["squeezenet", pytest.param("googlenet", marks=pytest.mark.slow)])
def test_a_network_of_the_zoo_in_float64(name: str) -> None:
    model = verify.onnx_model(name)
    x = inputs_of(model)
    (got,), _ = verify.reference_outputs(model, x, ["prob"], "float64")
    (row,) = verify.compare(["prob"], onnxruntime_outputs(model, x), [got], tolerance=1e-5)
    assert row["holds"], row


def test_the_widened_model_is_float64_throughout() -> None:
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], value_float=1.5),
        onnx.helper.make_node("Cast", ["x"], ["d"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Add", ["c", "d"], ["y"]),
    ]
    model = make_model(nodes, {"x": [2]}, ["y"])
    ((got,), _) = verify.reference_outputs(model, {"x": np.array([1.0, 2.0], np.float32)}, ["y"], "float64")
    assert got.dtype == np.float64 and got.tolist() == [2.5, 3.5]
