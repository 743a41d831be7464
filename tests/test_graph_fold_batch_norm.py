"""`FoldBatchNorm`: the same numbers, no arithmetic left where a weight can take it."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from graph_nets import Net, ops, same
from tvm import relax
from tvm.relax import op

from lowering.graph import Canonicalize, FoldBatchNorm
from lowering.graph._rewrite import Graph

nn = op.nn


def fold(mod: tvm.IRModule) -> tvm.IRModule:
    out = FoldBatchNorm()(Canonicalize()(mod))
    same(mod, out)
    return out


def test_fold_chain_behind_a_convolution() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(op.add(net.conv(emit, x, 6, groups=3, name="stem"), net.const(1, 6, 1, 1)))
        y = net.batch_norm(emit, y)
        y = emit(op.multiply(y, net.const(6, 1, 1)))
        return emit(op.add(emit(op.multiply(y, relax.const(0.5))), net.const(1, 6, 1, 1)))

    out = fold(net(body, (2, 3, 6, 6)))
    assert ops(out) == ["nn.conv2d", "add"]
    assert Graph(out["main"]).bindings[0][0].name == "stem"


@pytest.mark.parametrize("groups", [1, 2])
def test_fold_behind_a_transposed_convolution(groups: int) -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(nn.conv2d_transpose(x, net.const(4, 6 // groups, 3, 3), strides=2, groups=groups))
        return net.batch_norm(emit, y)

    if groups > 1:  # TVM cannot compile it: look at the weight instead
        out = FoldBatchNorm()(Canonicalize()(net(body, (1, 4, 3, 3))))
        assert ops(out) == ["nn.conv2d_transpose", "add"]
    else:
        assert ops(fold(net(body, (1, 4, 3, 3)))) == ["nn.conv2d_transpose", "add"]


def test_fold_behind_a_fully_connected_layer() -> None:
    net = Net()
    out = fold(net(lambda e, x: net.batch_norm(e, net.dense(e, x, 7)), (3, 5)))
    assert ops(out) == ["permute_dims", "matmul", "add"]


@pytest.mark.parametrize("groups", [1, 2])
def test_fold_before_a_convolution_without_padding(groups: int) -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = net.conv(emit, net.batch_norm(emit, x), 6, padding=0, groups=groups)
        return net.batch_norm(emit, y)

    assert ops(fold(net(body, (1, 4, 6, 6)))) == ["nn.conv2d", "add"]


def test_fold_before_a_padded_convolution_only_factors() -> None:
    net = Net()
    offset = net(lambda e, x: net.conv(e, net.batch_norm(e, x), 6), (1, 4, 6, 6))
    assert ops(fold(offset)) == ["multiply", "add", "nn.conv2d"]
    factor = net(lambda e, x: net.conv(e, e(op.multiply(x, net.const(4, 1, 1))), 6), (1, 4, 6, 6))
    assert ops(fold(factor)) == ["nn.conv2d"]


def test_fold_stops_where_a_value_is_used_twice_or_returned() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = net.conv(emit, x, 4)
        return [net.batch_norm(emit, y), y]

    assert ops(fold(net(body, (1, 4, 5, 5))))[:3] == ["nn.conv2d", "multiply", "add"]


def test_fold_gives_each_sharer_of_a_weight_its_own() -> None:
    net = Net()
    weight = net.const(4, 4, 3, 3)

    def body(emit: Any, x: Any) -> Any:
        y = net.batch_norm(emit, emit(nn.conv2d(x, weight, padding=1), "first"))
        return net.batch_norm(emit, emit(nn.conv2d(emit(nn.relu(y)), weight, padding=1), "second"))

    out = fold(net(body, (1, 4, 5, 5)))
    assert ops(out) == ["nn.conv2d", "add", "nn.relu", "nn.conv2d", "add"]


def test_fold_leaves_a_bias_with_its_layer() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = net.batch_norm(emit, net.conv(emit, x, 4, 1, "expand"))
        return net.batch_norm(emit, net.conv(emit, y, 6, 1, "project"))

    assert ops(fold(net(body, (1, 3, 5, 5)))) == ["nn.conv2d", "add", "nn.conv2d", "add"]
