"""Convolution by Fourier transforms: exact transforms, layers against float64, scratch by the formula, small errors."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import tvm
from oracle import random_arrays, reference
from tvm import te, topi

from gemmify.accuracy import expected_error
from gemmify.fold import evaluate
from gemmify.kernels import layer_kernels
from gemmify.layer import compile_layer
from gemmify.pipeline_build import TIR_PIPELINE, kernel_workspace_bytes
from lowering import LOWERINGS, ConvProblem, Tile, conv2d
from lowering.fft_form import POINTS, form_of
from lowering.fourier import Matrix, real_dft, real_idft
from schedules import Machine, parse_target, schedule_module

FFT = LOWERINGS["fft"]
TARGET = parse_target("llvm")
MACHINE = Machine.from_target(TARGET)

LAYERS = {
    "7x7": conv2d(16, 13, 13, 24, 7),
    "11x11": conv2d(16, 26, 26, 24, 11),
    "5x5 of two images, uneven pads": ConvProblem(2, 5, 19, (11, 7), (5, 5), (1, 1), (2, 0), (4, 1), (1, 1)),
    "dilated": conv2d(8, 9, 9, 16, 3, d=2),
    "grouped": conv2d(12, 9, 9, 40, 5, g=2),
    "depthwise": conv2d(7, 12, 12, 7, 5, g=7),
    "1-D": ConvProblem(2, 13, 17, (61,), (9,), (1,), (4,), (3,), (1,)),
    "7x1": ConvProblem(1, 4, 9, (15, 6), (7, 1), (1, 1), (3, 0), (3, 0), (1, 1)),
    "3-D, strided and dilated in depth": ConvProblem(
        2, 3, 6, (7, 9, 8), (3, 3, 3), (2, 1, 1), (2, 1, 1), (1, 1, 1), (2, 1, 1)
    ),
    "a kernel of nearly a tile": conv2d(2, 21, 21, 3, 19),
    "float64": conv2d(16, 14, 14, 20, 7, dtype="float64"),
}


def dense(rows: Matrix, columns: int) -> np.ndarray:
    matrix = np.zeros((len(rows), columns))
    for i, row in enumerate(rows):
        for j, value in row:
            matrix[i, j] = value
    return matrix


@pytest.mark.parametrize("points", [1, 4, *POINTS])
def test_the_factors_are_the_transform_and_its_inverse(points: int) -> None:
    x = np.random.default_rng(points).standard_normal(points)
    y = x
    for factor in real_dft(points):
        y = dense(factor, len(y)) @ y
    want = np.fft.rfft(x)
    np.testing.assert_allclose(y, np.stack([want.real, want.imag], 1).ravel(), atol=1e-13)
    weights = np.array([1.0 if k in (0, points / 2) else 2.0 for k in range(len(y) // 2)])
    back, wanted = y * np.repeat(weights, 2) / points, (points + 1) // 2
    for factor in real_idft(points, wanted):
        back = dense(factor, len(back)) @ back
    np.testing.assert_allclose(back, x[:wanted], atol=1e-14)


def test_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        real_dft(6)


SLOW = ("11x11", "a kernel of nearly a tile")  # long transforms: seconds in LLVM


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LAYERS])
def test_layers(name: str) -> None:
    problem = LAYERS[name]
    layer = compile_layer(problem, FFT, TARGET, epilogue=())
    data, weight = random_arrays(problem, 5)
    got, want = layer.run(data, weight), reference(problem, data, weight)
    cost = layer.kernels.cost
    error = float(np.abs(got - want).max() / np.abs(want).max())
    print(f"{name}: error {error:.2e}, expected {expected_error(cost, problem.dtype):.2e}")
    # As stated in the catalogue: 2 u ((sqrt(2 C) + log2 T^2) / 2 + 1), and in float32 never above 1e-5.
    assert error < expected_error(cost, problem.dtype) < 1e-5
    assert layer.workspace_bytes == cost.workspace_bytes
    funcs = {f"f{i}": k.func for i, k in enumerate(layer.kernels.kernels) if k.kind != "weight"}
    assert cost.tasks is not None
    for threads in (1, min(2, cost.tasks)):
        hidden = sum(kernel_workspace_bytes(tvm.IRModule(funcs), TARGET, threads).values())
        assert cost.workspace_bytes + hidden == cost.scratch(threads)


def test_workspace_is_the_specifications() -> None:
    for problem in (conv2d(64, 56, 56, 64, 11), conv2d(32, 64, 64, 48, 5, n=2), conv2d(24, 30, 17, 36, 3)):
        cost, (ty, tx) = FFT.cost(problem, Tile(8, 32)), form_of(problem).points
        (ho, wo), k = problem.out_size, problem.kernel[0]
        tiles = problem.n * ceil(ho / (ty - k + 1)) * ceil(wo / (tx - k + 1))
        numbers = 2 * 4 * ty * (tx // 2 + 1)
        assert cost.workspace_bytes == numbers * tiles * (problem.c + problem.m)
        columns = ceil(problem.m / 32) * 32
        assert cost.weight_bytes == numbers * problem.c * columns


@pytest.mark.parametrize("name", ["grouped", "7x1", "3-D, strided and dilated in depth"])
def test_filters_folded_by_numpy_are_those_of_compiled_code(name: str) -> None:
    problem = LAYERS[name]
    layer = compile_layer(problem, FFT, TARGET, epilogue=())
    data, weight = random_arrays(problem, 2)
    layer.bind(data, weight)
    stage = next(s for s in FFT.build(problem, layer.kernels.tile) if s.kind == "weight")
    placeholder = te.placeholder(weight.shape, problem.dtype)
    folded = evaluate(stage.compute(placeholder), {placeholder: weight})
    np.testing.assert_allclose(folded, layer._tensors["packed"].numpy(), atol=1e-6)


def test_every_transform_is_in_registers_and_parallel() -> None:
    """A rule that refuses falls through to generic code, right but slow: that code has no vector of 16 here."""
    problem = conv2d(32, 24, 24, 32, 5)
    for kernel in layer_kernels(FFT, problem, MACHINE).kernels:
        if kernel.name in ("fft_input", "output"):
            text = kernel.func.script()
            assert "T.parallel" in text and "T.unroll" in text and 'scope="local"' in text and "T.vectorized" in text


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (conv2d(8, 9, 9, 8, 3, 2), "needs stride 1 in height and width, got 2x2"),
        (conv2d(8, 9, 9, 8, 1), "needs a kernel above 1 in height or width, got 1x1"),
        (conv2d(2, 40, 40, 2, 33), "spans at most 31 inputs a side, got 33x33"),
        (conv2d(2, 40, 40, 2, 5, d=8), "spans at most 31 inputs a side, got 33x33"),
        (ConvProblem(1, 1, 1, (2,), (2,), (1,), (2,), (2,), (5,)), "got padding under every tap"),
    ],
)
def test_reasons(problem: ConvProblem, text: str) -> None:
    reason = FFT.applicable(problem)
    assert reason is not None and text in str(reason)


def test_as_a_pass_on_a_foreign_function_and_scheduled() -> None:
    a, w = te.placeholder((1, 8, 14, 14), name="a"), te.placeholder((12, 8, 5, 5), name="w")
    conv = topi.nn.relu(topi.nn.conv2d_nchw(a, w, 1, 2, 1))
    mod = tvm.IRModule({"main": te.create_prim_func([a, w, conv]).with_attr("global_symbol", "main")})
    lowered = tvm.transform.Sequential([FFT])(mod)
    assert lowered["main"].script() != mod["main"].script()
    lowered = schedule_module(lowered, MACHINE)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype("float32") for s in ((1, 8, 14, 14), (12, 8, 5, 5))]
    results = []
    for module in (mod, lowered):
        out = tvm.runtime.tensor(np.full((1, 12, 14, 14), np.nan, "float32"))
        function = tvm.compile(module, target=TARGET, tir_pipeline=TIR_PIPELINE)["main"]
        function(*map(tvm.runtime.tensor, arrays), out)
        results.append(out.numpy())
    np.testing.assert_allclose(results[1], results[0], atol=1e-3)
