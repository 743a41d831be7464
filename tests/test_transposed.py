"""Transposed convolutions: their phases, what their lowerings refuse and cost, and networks of them.

Numbers layer by layer are the work of tests/test_conformance.py.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import models
import numpy as np
import onnx
import pytest
import tvm
from network_checks import TOLERANCE, onnxruntime_outputs
from onnx import helper

import gemmify
from gemmify.kernels import layer_kernels
from gemmify.pipeline_build import kernel_workspace_bytes
from gemmify.select import consider
from lowering import LOWERINGS, DenseProblem, Problem, Tile, TransposedConvProblem, conv2d
from lowering.phases import Phases, piecewise
from schedules import Machine, parse_target

FORMS = ("sub-convolution", "col2im")


def square(c: int, h: int, m: int, k: int, s: int, p: int = 0, extra: int = 0, **more: Any) -> TransposedConvProblem:
    """A square two-dimensional problem, dilation 1."""
    return TransposedConvProblem(1, c, m, (h, h), (k, k), (s, s), (p, p), (p, p), (1, 1), (extra, extra), **more)


def test_phases_find_every_tap_once() -> None:
    """For each output position the (input, tap) pairs are the solutions of `i s + k d = o + p`, no more, no fewer."""
    for size, kernel, stride, dilation, pad in product((1, 2, 5), range(1, 6), range(1, 5), range(1, 5), range(4)):
        out = (size - 1) * stride - pad + dilation * (kernel - 1) + 2
        phases = Phases(size, kernel, stride, dilation, pad, out)
        for o in range(out):
            pairs = product(range(-40, 40), range(kernel))
            wanted = sorted((i, k) for i, k in pairs if i * stride + k * dilation == o + pad)
            j, r = divmod(o, stride)
            steps = [u for u in range(phases.taps) if all(phases.exists(r, u))]
            assert sorted((phases.where(r, u, j), phases.tap(r, u)) for u in steps) == wanted, (phases, o)
            before, after = phases.reach
            assert all(-before <= phases.where(r, u, j) < size + after for u in steps)


@pytest.mark.parametrize("values", [(3,), (1, 0), (2, 3, 0, 1), (4, 4, 4), (0, 5, 1, 5, 5, 2)])
def test_piecewise_is_the_table(values: tuple[int, ...]) -> None:
    analyzer = tvm.sym.Analyzer()
    for i, value in enumerate(values):
        found = analyzer.simplify(piecewise(values, tvm.tirx.const(i, "int32")))
        assert int(found) == value == piecewise(values, i)


def test_sizes() -> None:
    assert square(3, 5, 4, 4, 2, 1).out_size == (10, 10)
    assert square(3, 5, 4, 3, 2, 1).out_size == (9, 9)
    assert square(3, 5, 4, 3, 2, 1, 1).out_size == (10, 10)
    assert square(3, 5, 4, 3, 2, 1).macs == 25 * 9 * 3 * 4
    with pytest.raises(ValueError, match="the pads leave nothing of the output"):
        square(3, 1, 4, 3, 2, 2)
    with pytest.raises(ValueError, match="output_padding holds a value that is too small"):
        square(3, 5, 4, 3, 2, 1, -1)
    with pytest.raises(ValueError, match="must divide the channels"):
        square(3, 5, 4, 3, 2, groups=2)


def test_each_kind_of_layer_is_refused_by_the_lowerings_of_the_others() -> None:
    up, conv, dense = square(4, 5, 6, 4, 2, 1), conv2d(4, 5, 5, 6, 3), DenseProblem(1, 4, 6)
    for key, lowering in LOWERINGS.items():
        reason = lowering.applicable(up)
        if key in FORMS:
            assert reason is None
            assert str(lowering.applicable(conv)) == "needs a transposed convolution, got a convolution"
            assert str(lowering.applicable(dense)) == "needs a transposed convolution, got a fully connected layer"
        elif key != "direct":
            assert str(reason) == "needs a convolution, got a transposed convolution", key


def test_phases_of_fewer_taps_cost_fewer_multiplications() -> None:
    """3x3 with stride 2: 1, 2, 2 and 4 taps, nine in all, not four times four."""
    problem = square(16, 8, 32, 3, 2, 1, 1)
    cost = LOWERINGS["sub-convolution"].cost(problem, Tile(8, 16))
    assert cost.macs == problem.macs
    assert [(g.k // 16, g.count) for g in cost.gemms] == [(4, 1), (2, 2), (1, 1)]


SCRATCH: dict[str, Problem] = {
    "wide": square(8, 4, 700, 4, 2, 1),
    "cut": square(8, 4, 70, 3, 2, 1),
    "grouped": square(8, 4, 300, 3, 2, 1, 1, groups=2),
    "depthwise": square(64, 4, 64, 4, 2, 1, groups=64),
}


@pytest.mark.parametrize("name", SCRATCH)
def test_kernels_take_no_scratch_and_the_gemm_rule_schedules_them(name: str) -> None:
    target = parse_target("llvm")
    for key in FORMS:
        kernels = layer_kernels(LOWERINGS[key], SCRATCH[name], Machine.from_target(target)).kernels
        functions = {kernel.name: kernel.func for kernel in kernels if kernel.kind != "weight"}
        assert not kernel_workspace_bytes(tvm.IRModule(functions), target)
        multiply = [f for f in functions.values() if "gemmify.axes" in str(f)]
        assert len(multiply) == 1
        assert 'scope="local"' in str(multiply[0]), "the accumulators are not in registers"


def test_auto_takes_products_in_one_gemm_where_phases_are_too_small() -> None:
    """A map of one pixel, and three output channels: there the phases waste most of a tile."""
    machine = Machine.from_target(parse_target("llvm"))
    for problem, best in (
        (square(100, 1, 512, 4, 1), "col2im"),
        (square(64, 32, 3, 4, 2, 1), "col2im"),
        (square(256, 28, 128, 2, 2), "sub-convolution"),
        (square(64, 28, 64, 4, 2, 1, groups=64), "sub-convolution"),
    ):
        assert min(consider(problem, machine), key=lambda c: c.cycles).lowering.key == best, problem


def generator() -> onnx.ModelProto:
    """A decoder from one pixel to 3 x 31 x 33: DCGAN's 4x4 s2 p1, output padding, groups, uneven pads, a residual."""
    rng = np.random.default_rng(3)
    nodes, weights = [], {}

    def up(x: str, c: int, m: int, k: int, act: str, **how: Any) -> str:
        i, groups = len(weights) // 2, how.get("group", 1)
        weights[f"w{i}"] = (rng.standard_normal((c, m // groups, k, k)) / np.sqrt(c)).astype(np.float32)
        weights[f"b{i}"] = rng.standard_normal(m).astype(np.float32)
        nodes.append(helper.make_node("ConvTranspose", [x, f"w{i}", f"b{i}"], [f"u{i}"], name=f"up{i}", **how))
        if act == "Add":
            nodes.append(helper.make_node("Add", [f"u{i}", x], [f"r{i}"]))
        nodes.append(
            helper.make_node("Relu" if act == "Add" else act, [f"{'r' if act == 'Add' else 'u'}{i}"], [f"a{i}"])
        )
        return f"a{i}"

    y = up("z", 20, 32, 4, "Relu")
    y = up(y, 32, 24, 4, "Relu", strides=[2, 2], pads=[1, 1, 1, 1])
    y = up(y, 24, 12, 3, "Relu", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
    y = up(y, 12, 12, 3, "Add", pads=[1, 1, 1, 1])
    y = up(y, 12, 6, 3, "Sigmoid", strides=[2, 2], pads=[0, 1, 2, 0], group=3, output_padding=[0, 1])
    y = up(y, 6, 3, 3, "Tanh", dilations=[2, 2], pads=[2, 2, 2, 2])
    return models.make_model(nodes, {"z": [1, 20, 1, 1]}, [y], weights)


@pytest.mark.parametrize("lowering", ["auto", *FORMS, "direct"])
def test_a_generator_equals_onnxruntime(lowering: str) -> None:
    model = generator()
    inputs = {"z": np.random.default_rng(5).standard_normal((1, 20, 1, 1)).astype(np.float32)}
    compiled = gemmify.compile(model, lowering=lowering)
    (want,), (got,) = onnxruntime_outputs(model, inputs), compiled.run(inputs)
    assert want.shape == got.shape and float(np.max(np.abs(got - want))) <= TOLERANCE
    assert [layer["op"] for layer in compiled.layers] == ["conv2d_transpose"] * 6
    assert [layer["epilogue"] for layer in compiled.layers][3] == ["bias", "add", "relu"]
    assert all(layer["problem"]["output_padding"] is not None for layer in compiled.layers)
    if lowering != "auto":
        assert {layer["lowering"] for layer in compiled.layers} == {lowering}
