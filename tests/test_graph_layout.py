"""`ConvertLayout`: the same numbers, permutations at the borders only."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from graph_nets import Net, check, kinds, ops, sites
from tvm import relax
from tvm.relax import op

from lowering import TransposedConvProblem

nn = op.nn


def moves(mod: tvm.IRModule) -> int:
    """Permutations of `main` that move data."""
    return ops(mod).count("permute_dims")


def test_layout_converts_only_at_the_borders() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(nn.relu(net.conv(emit, x, 8)))
        z = emit(op.concat([net.conv(emit, y, 4, name="left"), emit(nn.max_pool2d(y, (3, 3), (1, 1), 1))], 1))
        parts = emit(op.split(z, [3, 7], 1))
        z = emit(op.concat([emit(relax.TupleGetItem(parts, i)) for i in (2, 0, 1)], axis=1))
        z = emit(nn.pad(emit(op.strided_slice(z, [1, 2], [2, 1], [12, 8])), [0, 0, 0, 0, 1, 0, 0, 2]))
        z = emit(op.image.resize2d(z, (10, 12), method="nearest_neighbor"))
        z = emit(nn.softmax(emit(nn.avg_pool2d(z, (2, 2), (2, 2))), axis=1))
        return emit(op.add(z, emit(op.mean(z, [2, 3], keepdims=True))))

    out = check(net(body, (2, 3, 8, 8)))
    assert moves(out) == 2


def test_layout_flatten_reorders_the_weight_instead() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(nn.relu(net.conv(emit, x, 5)))
        return net.dense(emit, emit(nn.relu(emit(op.reshape(y, (2, 5 * 6 * 4))))), 7)

    out = check(net(body, (2, 3, 6, 4)))
    assert moves(out) == 1  # the input
    assert sites(out)["fc"].weight.shape == (7, 120)


def test_layout_flatten_that_is_returned_keeps_its_order() -> None:
    net = Net()
    mod = net(lambda e, x: e(op.reshape(net.conv(e, x, 5), (1, 5 * 6 * 4))), (1, 3, 6, 4))
    assert moves(check(mod)) == 2


def test_layout_channel_shuffle_is_one_permutation() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(op.reshape(net.conv(emit, x, 6), (1, 2, 3, 4, 4)))
        y = emit(op.reshape(emit(op.permute_dims(y, [0, 2, 1, 3, 4])), (1, 6, 4, 4)))
        return emit(op.mean(net.conv(emit, y, 4, name="next"), [2, 3], keepdims=True))

    assert moves(check(net(body, (1, 3, 4, 4)))) == 2


def test_layout_cancels_the_permutations_of_an_exporter() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = net.conv(emit, emit(op.permute_dims(x, [0, 3, 1, 2])), 6)
        y = emit(nn.relu(emit(op.permute_dims(y, [0, 2, 3, 1]))))
        return emit(op.permute_dims(net.conv(emit, emit(op.permute_dims(y, [0, 3, 1, 2])), 4, name="b"), [0, 2, 3, 1]))

    out = check(net(body, (1, 5, 6, 3)))
    assert moves(out) == 0
    assert kinds(out)["conv"] == ("relu",)


def test_layout_squeeze_and_excite_stays_channels_last() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = net.conv(emit, x, 8)
        g = emit(nn.relu(net.conv(emit, emit(op.mean(y, [2, 3], keepdims=True)), 4, 1, "squeeze")))
        g = emit(op.sigmoid(net.conv(emit, g, 8, 1, "excite")))
        return net.conv(emit, emit(op.multiply(y, g)), 4, name="next")

    out = check(net(body, (1, 3, 6, 6)))
    assert moves(out) == 2
    assert kinds(out) == {"conv": (), "squeeze": ("relu",), "excite": ("sigmoid",), "next": ()}


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6])
def test_layout_lrn_is_one_primfunc(beta: float) -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = net.conv(emit, x, 8)
        s = emit(op.expand_dims(emit(op.multiply(y, y)), 1))
        s = emit(nn.avg_pool3d(s, (5, 1, 1), (1, 1, 1), (2, 0, 0, 2, 0, 0), count_include_pad=True))
        s = emit(op.add(emit(op.multiply(emit(op.squeeze(s, 1)), relax.const(0.3))), relax.const(2.0)))
        return emit(op.divide(y, emit(op.power(s, relax.const(beta)))))

    out = check(net(body, (1, 3, 6, 6)))
    assert [name for name in ops(out) if name not in ("", "permute_dims")] == ["call_tir"]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layout_other_ranks_and_transposed_convolutions(dims: int) -> None:
    net = Net()
    conv, transpose = getattr(nn, f"conv{dims}d"), getattr(nn, f"conv{dims}d_transpose")

    def body(emit: Any, x: Any) -> Any:
        y = emit(nn.relu(emit(conv(x, net.const(6, 4, *[3] * dims), padding=1), "down")))
        y = emit(transpose(y, net.const(6, 5, *[3] * dims), strides=2, padding=1, output_padding=1), "up")
        return emit(nn.relu(emit(op.add(y, net.const(1, 5, *[1] * dims)))))

    out = check(net(body, (1, 4, *(5, 4, 3)[:dims])))
    assert moves(out) == 2
    assert kinds(out) == {"down": ("relu",), "up": ("bias", "relu")}
    up = sites(out)["up"]
    assert isinstance(up.problem, TransposedConvProblem) and (up.problem.c, up.problem.m) == (6, 5)
    assert up.problem.size == (5, 4, 3)[:dims] and up.out_shape == (1, *up.problem.out_size, 5)


def test_layout_unknown_operators_see_the_sources_order() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(op.cumsum(net.conv(emit, x, 4), axis=1))
        return net.conv(emit, y, 4, name="next")

    check(net(body, (1, 3, 5, 6)))


def test_layout_is_followed_by_reductions_prelu_and_broadcasts() -> None:
    net = Net()

    def body(emit: Any, x: Any, b: Any) -> Any:
        y = emit(nn.prelu(net.conv(emit, x, 6), net.const(6), axis=1))
        y = emit(op.add(emit(op.where(emit(op.greater(y, relax.const(0.1))), y, emit(op.negative(y)))), b))
        y = emit(nn.log_softmax(y, axis=-3))
        total = emit(op.sum(y, [1]))
        return [
            emit(op.max(total, [-1], keepdims=True)),
            emit(op.mean(emit(op.multiply(y, net.const(6, 5, 4))), [0, 3])),
        ]

    out = check(net(body, (2, 3, 5, 4), (6, 1, 4)))
    assert moves(out) <= 3  # the input, the operand of lower rank, the second output


def test_layout_depth_to_space_is_one_permutation() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(op.reshape(net.conv(emit, x, 12), (1, 2, 2, 3, 4, 5)))
        y = emit(op.reshape(emit(op.permute_dims(y, [0, 3, 4, 1, 5, 2])), (1, 3, 8, 10)))
        return emit(op.mean(net.conv(emit, y, 4, name="next"), [2, 3], keepdims=True))

    assert moves(check(net(body, (1, 3, 4, 5)))) == 2


def test_layout_flatten_before_an_untransposed_weight() -> None:
    net = Net()

    def body(emit: Any, x: Any) -> Any:
        y = emit(op.reshape(net.conv(emit, x, 4), (1, 4, 12)))
        y = emit(op.tanh(emit(op.reshape(y, (1, 48)))))
        return [emit(op.matmul(y, net.const(48, 5)), "fc"), emit(op.exp(y))]

    assert moves(check(net(body, (1, 3, 3, 4)))) == 2


def test_layout_of_parameters_and_constants_that_are_returned() -> None:
    mod = Net()(lambda e, x: [x, relax.const([[1.0, 2.0]]), e(op.exp(x))], (1, 2, 3, 3))
    assert moves(check(mod)) == 0
