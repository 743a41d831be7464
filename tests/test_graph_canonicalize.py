"""`Canonicalize`: the same numbers, one spelling for each thing."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from graph_nets import Net, ops, same
from tvm import relax, topi
from tvm.relax import op

from lowering.graph import PASSES, Canonicalize
from lowering.graph._rewrite import Graph

nn = op.nn


def test_canonicalize_removes_what_does_nothing() -> None:
    def body(emit: Any, x: Any) -> Any:
        y = emit(relax.TupleGetItem(emit(nn.dropout(x, 0.3)), 0))
        y = emit(op.reshape(y, (1, 4, 6, 6)))
        y = emit(op.add(y, relax.const(0.0)))
        y = emit(op.multiply(relax.const(1.0), y))
        y = emit(op.astype(y, "float32"))
        y = emit(nn.pad(y, [0] * 8))
        y = emit(op.strided_slice(y, [1], [0], [4]))
        y = emit(op.permute_dims(emit(op.permute_dims(y, [0, 2, 3, 1])), [0, 3, 1, 2]))
        emit(op.exp(y))
        return emit(nn.relu(y))

    mod = Net()(body, (1, 4, 6, 6))
    out = Canonicalize()(mod)
    assert ops(out) == ["nn.relu"]
    same(mod, out, 0)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda e, x: e(op.minimum(e(op.maximum(x, relax.const(0.0))), relax.const(6.0))), ["clip"]),
        (lambda e, x: e(op.maximum(relax.const(0.0), x)), ["nn.relu"]),
        (lambda e, x: e(nn.relu(e(nn.relu6(x)))), ["clip"]),
        (lambda e, x: e(op.clip(e(op.clip(x, -1, 1)), -0.5, 3)), ["clip"]),
        (lambda e, x: e(op.multiply(e(op.sigmoid(x)), x)), ["nn.silu"]),
        (lambda e, x: e(op.divide(e(op.subtract(x, relax.const(0.5))), relax.const(3.0))), ["add", "multiply"]),
        (lambda e, x: e(op.reshape(e(op.squeeze(e(op.expand_dims(x, 0)), 0)), (4, 36))), ["reshape"]),
        (lambda e, x: e(nn.adaptive_avg_pool2d(x, 1)), ["mean"]),
        (lambda e, x: e(nn.avg_pool2d(x, (6, 6))), ["mean"]),
        (lambda e, x: e(op.mean(x, [2, 3], keepdims=False)), ["mean", "reshape"]),
        (lambda e, x: e(op.add(x, e(op.exp(e(op.reshape(relax.const([1.0, 2.0, 3.0, 4.0]), (1, 4, 1, 1))))))), ["add"]),
    ],
    ids=[
        "min-max",
        "max",
        "relu-relu6",
        "clip-clip",
        "silu",
        "affine",
        "reshapes",
        "adaptive",
        "global",
        "mean",
        "fold",
    ],
)
def test_canonicalize_has_one_spelling(build: Any, expected: list[str]) -> None:
    mod = Net()(build, (1, 4, 6, 6))
    out = Canonicalize()(mod)
    assert [name for name in ops(out)] == [*expected]
    same(mod, out)


def test_canonicalize_batch_norm_and_pad() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = net.conv(emit, emit(nn.pad(x, [0, 0, 0, 0, 1, 0, 2, 1])), 5, padding=[0, 1, 1, 0])
        return net.batch_norm(emit, y)

    mod = net(body, (2, 3, 7, 8))
    out = Canonicalize()(mod)
    assert ops(out) == ["nn.conv2d", "multiply", "add"]
    assert [int(p) for p in Graph(out["main"]).bindings[0][1].attrs.padding] == [1, 3, 1, 1]
    same(mod, out)


def test_canonicalize_keeps_a_pad_that_is_not_zero() -> None:
    net = Net()
    mod = net(lambda e, x: net.conv(e, e(nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], pad_value=2.0)), 4), (1, 3, 6, 6))
    out = Canonicalize()(mod)
    assert ops(out) == ["nn.pad", "nn.conv2d"]
    same(mod, out)


def test_canonicalize_keeps_training_and_integers() -> None:
    def body(emit: Any, x: Any) -> Any:
        i = emit(op.maximum(emit(op.astype(x, "int32")), relax.const(0, "int32")))
        return emit(op.divide(relax.const(1.0), emit(op.add(emit(op.astype(i, "float32")), relax.const(2.0)))))

    mod = Net()(body, (1, 3, 4, 4))
    assert ops(Canonicalize()(mod)) == ["astype", "maximum", "astype", "add", "divide"]


def test_importer_primfuncs_become_operators() -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 5, 5), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            y = bb.emit_te(topi.minimum, bb.emit_te(topi.maximum, x, 0.0), relax.const(6.0))
            y = bb.emit_te(topi.nn.pad, y, [0, 0, 1, 0], [0, 0, 2, 3], 1.5)
            y = bb.emit_output(bb.emit_te(topi.nn.mirror_pad, y, [0, 0, 1, 1], [0, 0, 1, 1], "REFLECT"))
        bb.emit_func_output(y)
    mod = bb.get()
    out = Canonicalize()(mod)
    assert ops(out) == ["clip", "nn.pad", "call_tir"]
    assert sum(isinstance(f, tvm.tirx.PrimFunc) for f in out.functions.values()) == 1
    same(mod, out)


@pytest.mark.parametrize("graph_pass", PASSES, ids=lambda p: p.__name__)
def test_a_module_without_main_is_refused(graph_pass: Any) -> None:
    with pytest.raises(ValueError, match="Relax function main, which this module does not hold"):
        graph_pass()(tvm.IRModule({}))


@pytest.mark.parametrize("graph_pass", PASSES, ids=lambda p: p.__name__)
def test_run_time_shapes_are_refused(graph_pass: Any) -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 4), "float32"))
    with bb.function("main", [x]):
        y = bb.match_cast(x, relax.TensorType((1, 4), "float32"))
        bb.emit_func_output(bb.emit(op.exp(y)))
    with pytest.raises(ValueError, match=r"straight line of static operators.*MatchCast"):
        graph_pass()(bb.get())
