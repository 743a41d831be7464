"""`GatherEpilogues` and `describe_layer`: one function a layer, and what it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graph_nets import Net, check, kinds, run, same, sites
from tvm import relax
from tvm.relax import op

from lowering.graph import GatherEpilogues, describe_layer, normalize

nn = op.nn


def hardswish(emit: Any, x: Any, form: str) -> Any:
    if form == "onnx":  # x * (clip(x + 3, 0, 6) / 6)
        gate = emit(op.divide(emit(op.clip(emit(op.add(x, relax.const(3.0))), 0, 6)), relax.const(6.0)))
        return emit(op.multiply(x, gate))
    if form == "torch":  # x * clip(x + 3, 0, 6) / 6
        gate = emit(op.clip(emit(op.add(x, relax.const(3.0))), 0, 6))
        return emit(op.divide(emit(op.multiply(x, gate)), relax.const(6.0)))
    affine = emit(op.add(emit(op.multiply(x, relax.const(1 / 6))), relax.const(0.5)))
    return emit(op.multiply(emit(op.clip(affine, 0, 1)), x))


@pytest.mark.parametrize(
    ("activate", "expected"),
    [
        (lambda e, y: e(nn.relu(y)), ("bias", "relu")),
        (lambda e, y: e(op.clip(y, 0, 6)), ("bias", "clip")),
        (lambda e, y: e(nn.leakyrelu(y, 0.1)), ("bias", "leaky_relu")),
        (lambda e, y: e(op.multiply(y, e(op.sigmoid(y)))), ("bias", "silu")),
        (lambda e, y: e(op.tanh(y)), ("bias", "tanh")),
        (lambda e, y: hardswish(e, y, "onnx"), ("bias", "hardswish")),
        (lambda e, y: hardswish(e, y, "torch"), ("bias", "hardswish")),
        (lambda e, y: hardswish(e, y, "affine"), ("bias", "hardswish")),
        (lambda e, y: e(op.multiply(e(nn.relu(y)), relax.const(0.5))), ("bias", "relu", "scale")),
        (lambda e, y: e(nn.gelu(y)), ("bias",)),
        (lambda e, y: e(nn.relu(e(op.tanh(e(op.sigmoid(y)))))), ("bias", "sigmoid")),
    ],
    ids=["relu", "clip", "leaky", "silu", "tanh", "hs-onnx", "hs-torch", "hs-affine", "scale", "gelu", "two-exp"],
)
def test_gather_activations(activate: Any, expected: tuple[str, ...]) -> None:
    net = Net()
    mod = net(lambda e, x: activate(e, e(op.add(net.conv(e, x, 5), net.const(1, 5, 1, 1)))), (1, 3, 6, 6))
    out = check(mod)
    assert kinds(out)["conv"] == expected
    if expected[-1] == "hardswish":
        np.testing.assert_allclose(sites(out)["conv"].epilogue[-1].params, (1 / 6, 0.5), rtol=1e-6)


def test_gather_refuses_a_gate_that_is_not_hardswish() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = net.conv(emit, x, 5)
        return emit(op.multiply(y, emit(op.clip(emit(op.add(y, relax.const(3.0))), 1, 6))))

    assert kinds(check(net(body, (1, 3, 6, 6))))["conv"] == ()


def test_gather_residual_goes_to_the_later_layer() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        short = net.batch_norm(emit, net.conv(emit, x, 6, 1, "short"))
        y = emit(nn.relu(net.batch_norm(emit, net.conv(emit, x, 6, name="a"))))
        y = net.batch_norm(emit, net.conv(emit, y, 6, name="b"))
        return emit(nn.relu(emit(op.add(short, y))))

    out = check(net(body, (1, 4, 6, 6)))
    assert kinds(out) == {"short": ("bias",), "a": ("bias", "relu"), "b": ("bias", "add", "relu")}
    site = sites(out)["b"]
    assert [type(o) for o in site.operands] == [np.ndarray, int] and site.operands[1] != site.data


def test_gather_multi_use_and_returned_values_end_a_run() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(nn.relu(net.conv(emit, x, 4, name="a")))
        z = net.conv(emit, y, 4, name="b")
        return [emit(nn.relu(z)), z, emit(op.add(y, emit(op.exp(y))))]

    assert kinds(check(net(body, (1, 3, 5, 5)))) == {"a": ("relu",), "b": ()}


def test_gather_keeps_names_unique_and_describes_the_problem() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = net.conv(emit, x, 6, name="same", strides=2, padding=[0, 1, 2, 1], groups=2)
        return net.conv(emit, y, 6, name="same", dilation=2)

    mod = net(body, (2, 4, 9, 8))
    out = check(mod)
    assert len(sites(out)) == 2
    first = sites(out)["same"].problem
    assert (first.stride, first.pad_before, first.pad_after, first.groups) == ((2, 2), (0, 1), (2, 1), 2)
    assert (first.n, first.c, first.m, first.size, first.kernel) == (2, 4, 6, (9, 8), (3, 3))


def test_gather_rows_of_a_sequence_are_a_dense_problem() -> None:
    net = Net()
    out = check(net(lambda e, x: e(nn.relu(net.dense(e, x, 7))), (2, 5, 3)))
    site = sites(out)["fc"]
    assert (site.problem.n, site.problem.c, site.problem.m) == (10, 3, 7) and site.out_shape == (2, 5, 7)
    assert kinds(out)["fc"] == ("bias", "relu")


def test_gather_weights_that_are_inputs() -> None:
    def body(emit: Any, x: Any, w: Any, v: Any) -> Any:
        y = emit(nn.conv2d(x, w, padding=1), "conv")
        y = emit(op.reshape(emit(op.mean(y, [2, 3], keepdims=True)), (1, 5)))
        return emit(op.matmul(y, emit(op.permute_dims(v, [1, 0]))), "fc")

    out = check(Net()(body, (1, 3, 6, 6), (5, 3, 3, 3), (4, 5)))
    assert isinstance(sites(out)["conv"].weight, int) and isinstance(sites(out)["fc"].weight, int)


def test_describe_refuses_what_the_problems_do_not_express() -> None:
    net = Net()
    mod = net(lambda e, x: net.conv(e, x, 4), (1, 3, 5, 5))
    first = GatherEpilogues()(mod)  # still channels first
    assert sites(first) == {} and len(first.functions) == 2
    same(mod, first)
    assert describe_layer(mod["main"]) is None


def test_described_layer_computes_the_function() -> None:
    """The description alone, evaluated in float64, gives the function's numbers."""
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(op.reshape(emit(nn.relu(net.conv(emit, x, 4))), (2, 4 * 3 * 5)))
        return emit(nn.leakyrelu(net.dense(emit, y, 6), 0.2))

    mod = net(body, (2, 3, 3, 5))
    found = sites(normalize(mod))
    conv, fc = found["conv"], found["fc"]
    x = np.random.default_rng(1).standard_normal((2, 3, 3, 5)).transpose(0, 2, 3, 1)
    padded = np.pad(x.astype("float32").astype("float64"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    y = np.maximum(np.einsum("nyxcij,mijc->nyxm", windows, conv.weight), 0).reshape(2, -1)
    z = y @ fc.weight.T.astype("float64") + fc.operands[0]
    assert [step.kind for step in fc.epilogue] == ["bias", "leaky_relu"]
    np.testing.assert_allclose(run(mod)[0], np.where(z > 0, z, 0.2 * z), rtol=1e-4, atol=1e-4)
