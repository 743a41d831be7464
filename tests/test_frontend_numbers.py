"""The front end's numbers: one operator a model, run with TVM's own lowering, against onnx's reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
from frontend_helpers import check, ints, layer_names, normal, op_names, run
from models import make_model, single
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from gemmify.errors import UnsupportedError
from gemmify.frontend import TensorSpec, import_model
from gemmify.reference_resize import Resize

WINDOWS = {
    "conv": single("Conv", [[2, 3, 7, 8]], [normal(4, 3, 3, 2), normal(4)], pads=[1, 0, 2, 1], strides=[2, 1]),
    "conv-groups": single("Conv", [[1, 4, 6, 6]], [normal(6, 2, 3, 3), normal(6)], group=2, dilations=[2, 1]),
    "conv-same-upper": single("Conv", [[1, 2, 7, 6]], [normal(3, 2, 4, 3)], auto_pad="SAME_UPPER", strides=[2, 3]),
    "conv-same-lower": single("Conv", [[1, 2, 7, 6]], [normal(3, 2, 4, 2)], auto_pad="SAME_LOWER"),
    "conv-valid": single("Conv", [[1, 2, 7, 6]], [normal(3, 2, 4, 2)], auto_pad="VALID"),
    "conv1d-same-dilated": single("Conv", [[1, 2, 9]], [normal(3, 2, 4)], auto_pad="SAME_UPPER", dilations=[2]),
    "conv3d-same": single("Conv", [[1, 2, 4, 5, 3]], [normal(2, 2, 2, 3, 2), normal(2)], auto_pad="SAME_LOWER"),
    "transpose": single(
        "ConvTranspose",
        [[1, 3, 4, 5]],
        [normal(3, 2, 3, 3), normal(2)],
        strides=[2, 2],
        pads=[1, 0, 1, 1],
        output_padding=[1, 0],
    ),
    "transpose-1d": single("ConvTranspose", [[1, 2, 5]], [normal(2, 3, 3)], strides=[2]),
    "max-pool-ceil": single("MaxPool", [[1, 2, 8, 7]], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "max-pool-ceil-window-past-the-end": single(
        "MaxPool", [[1, 1, 5, 5]], kernel_shape=[2, 2], strides=[3, 3], pads=[0, 0, 1, 1], ceil_mode=1
    ),
    "max-pool-dilated": single("MaxPool", [[1, 2, 8, 8]], kernel_shape=[3, 2], dilations=[2, 3]),
    "max-pool-1d": single("MaxPool", [[1, 2, 9]], kernel_shape=[3], strides=[2], pads=[1, 1]),
    "average-pool-pads": single("AveragePool", [[1, 2, 6, 7]], kernel_shape=[3, 3], pads=[1, 0, 1, 1]),
    "average-pool-count-pads": single(
        "AveragePool", [[1, 2, 6, 7]], kernel_shape=[3, 3], pads=[1, 0, 1, 1], count_include_pad=1
    ),
    "average-pool-ceil": single("AveragePool", [[1, 2, 8, 7]], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "average-pool-same-lower": single("AveragePool", [[1, 2, 7, 6]], kernel_shape=[2, 3], auto_pad="SAME_LOWER"),
    "average-pool-dilated": single("AveragePool", [[1, 2, 8, 8]], opset=19, kernel_shape=[2, 3], dilations=[3, 2]),
    "average-pool-3d": single("AveragePool", [[1, 2, 4, 5, 6]], kernel_shape=[2, 2, 3], strides=[2, 1, 2]),
}

OPERATORS = {
    "gemm": single("Gemm", [[3, 4]], [normal(5, 4), normal(5)], transB=1),
    "gemm-factors": single("Gemm", [[4, 3]], [normal(5, 4), normal(3, 1)], transA=1, transB=1, alpha=0.5, beta=2.0),
    "gemm-two-inputs": single("Gemm", [[3, 4], [5, 4]], transB=1, alpha=2.0),
    "gemm-no-bias": single("Gemm", [[3, 4]], [normal(4, 5)]),
    "matmul-batched": single("MatMul", [[2, 3, 4]], [normal(4, 5)]),
    "batch-norm": single(
        "BatchNormalization", [[2, 3, 4, 4]], [normal(3), normal(3), normal(3), np.abs(normal(3)) + 1]
    ),
    "clip": single("Clip", [[3, 4]], [np.array(0, np.float32), np.array(0.5, np.float32)]),
    "clip-below": single("Clip", [[3, 4]], [np.array(0, np.float32)]),
    "clip-above": single("Clip", [[3, 4]], [None, np.array(0.2, np.float32)]),
    "clip-10": single("Clip", [[3, 4]], opset=10, min=-0.5, max=0.5),
    "sum-3": single("Sum", [[3, 4], [4], [3, 1]]),
    "max-3": single("Max", [[3, 4], [4], [3, 1]]),
    "mean-3": single("Mean", [[3, 4], [4], [3, 1]]),
    "sum-1": single("Sum", [[3, 4]]),
    "softmax": single("Softmax", [[2, 3, 4]], axis=1),
    "log-softmax": single("LogSoftmax", [[2, 5]]),
    "global-average": single("GlobalAveragePool", [[2, 3, 4, 5]]),
    "reshape": single("Reshape", [[2, 3, 4]], [ints(0, -1)]),
    "flatten": single("Flatten", [[2, 3, 4]], axis=2),
    "slice": single("Slice", [[4, 6]], [ints(1), ints(-1), ints(1), ints(2)]),
    "slice-9": single("Slice", [[4, 6]], opset=9, starts=[1, 0], ends=[3, 5], axes=[1, 0]),
    "pad": single("Pad", [[1, 2, 3]], [ints(0, 0, 1, 0, 0, 2), np.array(1.5, np.float32)]),
    "pad-10": single("Pad", [[1, 2, 3]], opset=10, pads=[0, 0, 1, 0, 0, 2]),
    "squeeze-11": single("Squeeze", [[2, 1, 3, 1]], opset=11, axes=[1]),
    "split": single("Split", [[6, 4]], [ints(2, 4)], axis=0, outputs=2),
    "split-11": single("Split", [[6, 4]], opset=11, axis=0, split=[2, 4], outputs=2),
    "reduce-mean": single("ReduceMean", [[2, 3, 4]], axes=[1], keepdims=0),
    "reduce-sum": single("ReduceSum", [[2, 3, 4]], [ints(0, 2)], keepdims=1),
    "resize-nearest": single(
        "Resize",
        [[1, 2, 3, 4]],
        [None, np.array([1, 1, 2, 2], np.float32)],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    "resize-linear": single("Resize", [[1, 2, 3, 4]], [None, None, ints(1, 2, 6, 5)], mode="linear"),
    "resize-18-axes": single("Resize", [[1, 2, 3, 4]], [None, None, ints(9, 8)], opset=18, mode="linear", axes=[2, 3]),
    "upsample-9": single("Upsample", [[1, 2, 3, 4]], [np.array([1, 1, 2, 3], np.float32)], opset=9),
    "prelu": single("PRelu", [[1, 3, 2, 2]], [normal(3, 1, 1)]),
    "leaky-relu": single("LeakyRelu", [[3, 4]], alpha=0.2),
    "hard-swish": single("HardSwish", [[3, 4]]),
    "instance-norm": single("InstanceNormalization", [[2, 3, 4, 4]], [normal(3), normal(3)]),
    "layer-norm": single("LayerNormalization", [[2, 3, 4]], [normal(4), normal(4)]),
    "depth-to-space": single("DepthToSpace", [[1, 8, 2, 3]], blocksize=2),
    "transpose": single("Transpose", [[2, 3, 4]], perm=[2, 0, 1]),
    "concat": single("Concat", [[2, 3], [2, 1]], axis=1),
    "einsum": single("Einsum", [[2, 3], [3, 4]], equation="ij,jk->ik"),
    "swish-by-its-definition": single("Swish", [[3, 4]], opset=24),
    "mean-variance-norm": single("MeanVarianceNormalization", [[2, 3, 4, 4]]),
    "celu-by-its-definition": single("Celu", [[3, 4]], alpha=0.7),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_match_the_reference(name: str) -> None:
    imported = check(WINDOWS[name])
    if WINDOWS[name].graph.node[0].op_type in ("Conv", "ConvTranspose"):
        assert layer_names(imported) == ["node"]
        assert "relax.nn.pad" not in op_names(imported)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_match_the_reference(name: str) -> None:
    check(OPERATORS[name])


# onnx's reference pads these wrongly, or not at all: they must equal the same node with its pads written out.
EQUAL = {
    "max-pool-same-lower": (
        single("MaxPool", [[1, 2, 7, 6]], kernel_shape=[2, 3], strides=[2, 2], auto_pad="SAME_LOWER"),
        single("MaxPool", [[1, 2, 7, 6]], kernel_shape=[2, 3], strides=[2, 2], pads=[1, 1, 0, 0]),
    ),
    "max-pool-same-upper": (
        single("MaxPool", [[1, 2, 7, 6]], kernel_shape=[3, 2], strides=[2, 3], auto_pad="SAME_UPPER"),
        single("MaxPool", [[1, 2, 7, 6]], kernel_shape=[3, 2], strides=[2, 3], pads=[1, 0, 1, 0]),
    ),
}
TRANSPOSE_WEIGHT = normal(2, 3, 3, 3)
EQUAL["transpose-output-shape"] = tuple(
    single("ConvTranspose", [[1, 2, 4, 4]], [TRANSPOSE_WEIGHT], strides=[2, 2], **how)
    for how in ({"output_shape": [8, 8]}, {"pads": [1, 1, 0, 0]})
)
EQUAL["transpose-same-upper"] = tuple(
    single("ConvTranspose", [[1, 2, 4, 4]], [TRANSPOSE_WEIGHT], strides=[2, 2], **how)
    for how in ({"auto_pad": "SAME_UPPER"}, {"pads": [0, 0, 1, 1]})
)
EQUAL["transpose-larger-than-full"] = tuple(
    single("ConvTranspose", [[1, 2, 4, 4]], [TRANSPOSE_WEIGHT], strides=[2, 2], **how)
    for how in ({"output_shape": [10, 9]}, {"output_padding": [1, 0]})
)


@pytest.mark.parametrize("name", EQUAL)
def test_automatic_padding_equals_the_pads_written_out(name: str) -> None:
    model, explicit = EQUAL[name]
    x = {"x0": normal(*import_model(model).inputs[0].shape)}
    wanted = ReferenceEvaluator(explicit).run(None, x)[0]
    np.testing.assert_allclose(run(import_model(model), x)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "size"), [((2, 7, 3, 2), 5), ((2, 7, 3, 2), 4), ((1, 3, 2, 2), 9), ((2, 5, 4), 3)])
def test_lrn_by_its_definition(shape: tuple[int, ...], size: int) -> None:
    """onnx's reference confuses batch and channels, so the definition is written out here, in float64."""
    x = normal(*shape)
    got = run(import_model(single("LRN", [shape], size=size, alpha=0.3, beta=0.6, bias=1.5)), {"x0": x})[0]
    squares, sums = np.square(x.astype(np.float64)), np.zeros(shape)
    for c in range(shape[1]):
        low, high = max(0, c - (size - 1) // 2), min(shape[1] - 1, c + size // 2)
        sums[:, c] = squares[:, low : high + 1].sum(axis=1)
    np.testing.assert_allclose(got, x / (1.5 + 0.3 / size * sums) ** 0.6, rtol=1e-4)


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4), 1), ((2, 5, 1, 1), 1), ((2, 3, 4), 2), ((2, 3), -1)])
@pytest.mark.parametrize("log", [False, True])
def test_softmax_before_opset_13_runs_over_all_axes_from_its_own_on(
    shape: tuple[int, ...], axis: int, log: bool
) -> None:
    x = normal(*shape)
    got = run(import_model(single("LogSoftmax" if log else "Softmax", [shape], opset=11, axis=axis)), {"x0": x})[0]
    flat = np.exp(x.astype(np.float64)).reshape(*shape[: axis % len(shape)], -1)
    wanted = (flat / flat.sum(axis=-1, keepdims=True)).reshape(shape)
    np.testing.assert_allclose(got, np.log(wanted) if log else wanted, rtol=1e-4, atol=1e-5)


def test_average_pool_that_counts_padding_does_not_count_what_ceil_mode_adds() -> None:
    model = single(
        "AveragePool", [[1, 1, 4]], kernel_shape=[3], strides=[2], pads=[1, 0], ceil_mode=1, count_include_pad=1
    )
    x = np.arange(1, 5, dtype=np.float32).reshape(1, 1, 4)
    got = run(import_model(model), {"x0": x})[0]
    # windows on 0 1 2 3 4: (0 1 2), (2 3 4); then none, as 5 - 3 divides by 2
    np.testing.assert_allclose(got.ravel(), [1, 3], rtol=1e-6)
    model = single(
        "AveragePool", [[1, 1, 5]], kernel_shape=[3], strides=[2], pads=[1, 0], ceil_mode=1, count_include_pad=1
    )
    x = np.arange(1, 6, dtype=np.float32).reshape(1, 1, 5)
    # windows on 0 1 2 3 4 5: (0 1 2), (2 3 4), and (4 5) whose third place exists only by rounding up
    np.testing.assert_allclose(run(import_model(model), {"x0": x})[0].ravel(), [1, 3, 4.5], rtol=1e-6)


def test_small_network_end_to_end() -> None:
    imported = check(models.small_cnn())
    assert layer_names(imported) == ["first/conv", "second/conv", "fc"]
    assert imported.inputs == (TensorSpec("x", (1, 3, 12, 12), "float32"),)
    assert imported.outputs == (TensorSpec("y", (1, 5), "float32"),)


def test_float16_and_float64() -> None:
    for dtype, elem, tol in ((np.float16, TensorProto.FLOAT16, 1e-2), (np.float64, TensorProto.DOUBLE, 1e-9)):
        weight = normal(4, 3, 3, 3).astype(dtype)
        nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), helper.make_node("Relu", ["c"], ["y"])]
        imported = check(make_model(nodes, {"x": [1, 3, 5, 5]}, ["y"], {"w": weight}, dtype=elem), tol)
        assert imported.inputs[0].dtype == np.dtype(dtype).name


def test_upsample_of_opset_7_and_resize_of_opset_10_repeat_pixels() -> None:
    """onnx's reference has neither of these old forms."""
    x = normal(1, 2, 3, 4)
    scales = np.array([1, 1, 2, 3], np.float32)
    for model in (
        single("Upsample", [x.shape], opset=7, scales=scales.tolist()),
        single("Resize", [x.shape], [scales], opset=10, mode="nearest"),
    ):
        np.testing.assert_array_equal(run(import_model(model), {"x0": x})[0], x.repeat(2, axis=2).repeat(3, axis=3))


def test_resize_of_opset_10_that_shrinks_takes_the_value_behind() -> None:
    """As in the example `resize_downsample_nearest` of that opset: positions 0, 4/3, 8/3 and 4 read 0, 2, 3 and 4."""
    x = normal(1, 2, 6, 8)
    model = single("Resize", [x.shape], [np.array([1, 1, 0.5, 0.75], np.float32)], opset=10, mode="nearest")
    want = x[:, :, ::2][..., [0, 2, 3, 4, 6, 7]]
    np.testing.assert_array_equal(run(import_model(model), {"x0": x})[0], want)
    np.testing.assert_array_equal(ReferenceEvaluator(model, new_ops=[Resize]).run(None, {"x0": x})[0], want)
    model = single("Resize", [x.shape], [np.array([1, 1, 2, 0.5], np.float32)], opset=10, mode="nearest")
    with pytest.raises(UnsupportedError, match="one axis larger and another smaller, below opset 11"):
        import_model(model)


@pytest.mark.parametrize("opset", [9, 10, 17])
def test_top_k_keeps_both_outputs(opset: int) -> None:
    """k is an attribute before opset 10."""
    inputs, attributes = (["x"], {"k": 3}) if opset < 10 else (["x", "k"], {})
    node = helper.make_node("TopK", inputs, ["values", "indices"], **attributes)
    model = make_model([node], {"x": [3, 7]}, ["values"], {"k": ints(3)}, opset=opset)
    x = normal(3, 7)
    wanted = -np.sort(-x, axis=1)[:, :3]
    np.testing.assert_array_equal(run(import_model(model), {"x": x})[0], wanted)


def test_integer_inputs_keep_their_dtype() -> None:
    nodes = [helper.make_node("Gather", ["w", "x"], ["y"])]
    model = make_model(
        nodes, {"x": [3]}, ["y"], {"w": normal(5, 4)}, dtype=TensorProto.INT64, out_dtype=TensorProto.FLOAT
    )
    check(model, x=ints(4, 0, 2))


RUNTIME = """
import json, sys
import numpy as np, onnxruntime
for name in json.load(open(sys.argv[1])):
    session = onnxruntime.InferenceSession(name + ".onnx", providers=["CPUExecutionProvider"])
    np.savez(name + ".out.npz", *session.run(None, dict(np.load(name + ".in.npz"))))
"""


def test_everything_above_matches_onnx_runtime(tmp_path: Path) -> None:
    """In a process of its own: two compilers' thread pools in one process disturb each other."""
    pytest.importorskip("onnxruntime")
    cases = {**WINDOWS, **OPERATORS, **{name: pair[0] for name, pair in EQUAL.items()}}
    # ONNX Runtime refuses dilation with auto_pad, and computes a negative padding for strides above the kernel.
    cases = {k: v for k, v in cases.items() if k not in ("conv1d-same-dilated", "max-pool-same-upper")}
    feeds = {}
    for name, model in cases.items():
        feeds[name] = {s.name: normal(*s.shape) for s in import_model(model).inputs}
        onnx.save(model, tmp_path / f"{name}.onnx")
        np.savez(tmp_path / f"{name}.in.npz", **feeds[name])
    (tmp_path / "names.json").write_text(json.dumps(list(cases)))
    subprocess.run([sys.executable, "-c", RUNTIME, "names.json"], cwd=tmp_path, check=True, timeout=120)
    for name, model in cases.items():
        wanted = np.load(tmp_path / f"{name}.out.npz")
        for got, want in zip(run(import_model(model), feeds[name]), wanted.values(), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)
