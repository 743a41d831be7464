"""Minimal filtering: the matrices are exact, the scratch is what the formula says, the errors are ordered by m."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import tvm
from oracle import random_arrays, reference
from tvm import te, topi

from gemmify.kernels import layer_kernels
from gemmify.layer import compile_layer
from gemmify.pipeline_build import kernel_workspace_bytes
from lowering import LOWERINGS, ConvProblem, conv2d
from lowering.cook_toom import POINTS, transforms
from schedules import Machine, parse_target, schedule_module

FORMS = [(2, 3), (4, 3), (6, 3), (2, 5), (4, 5)]
KEYS = ["winograd-2", "winograd-4", "winograd-6"]


@pytest.mark.parametrize(("m", "r"), FORMS)
def test_transforms_filter_exactly(m: int, r: int) -> None:
    t = transforms(m, r)
    rng = np.random.default_rng(m * 10 + r)
    d = [Fraction(int(v)) for v in rng.integers(-50, 50, m + r - 1)]
    g = [Fraction(int(v)) for v in rng.integers(-50, 50, r)]

    def apply(matrix: tuple[tuple[Fraction, ...], ...], vector: list[Fraction]) -> list[Fraction]:
        return [sum((x * v for x, v in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]

    product = [u * v for u, v in zip(apply(t.g, g), apply(t.bt, d), strict=True)]
    assert apply(t.at, product) == [sum((d[i + k] * g[k] for k in range(r)), Fraction(0)) for i in range(m)]


def test_too_few_points_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"{len(POINTS)} are known"):
        transforms(len(POINTS), 5)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "problem", [conv2d(64, 56, 56, 64, 3), conv2d(20, 14, 14, 33, 3), conv2d(16, 12, 28, 24, 3, g=2, n=2)]
)
def test_scratch_in_the_kernel_is_the_formula(key: str, problem: object) -> None:
    target = parse_target("llvm")
    kernels = layer_kernels(LOWERINGS[key], problem, Machine.from_target(target))  # type: ignore[arg-type]
    funcs = {f"f{i}": k.func for i, k in enumerate(kernels.kernels) if k.kind != "weight"}
    assert kernels.cost.tasks is not None
    for threads in (1, min(3, kernels.cost.tasks)):
        hidden = kernel_workspace_bytes(tvm.IRModule(funcs), target, threads)
        assert kernels.cost.workspace_bytes + sum(hidden.values()) == kernels.cost.scratch(threads)


def line(size: int, kernel: int, c: int, m: int, **options: int) -> ConvProblem:
    pad = (kernel // 2,)
    return ConvProblem(options.get("n", 1), c, m, (size,), (kernel,), (1,), pad, pad, (1,), options.get("groups", 1))


@pytest.mark.parametrize(
    ("problem", "keys"),
    [
        (line(37, 3, 17, 20), KEYS),
        (line(50, 5, 16, 33, n=2), KEYS[:2]),
        (line(30, 7, 6, 8, groups=2), KEYS[:1]),
        (ConvProblem(1, 8, 9, (12, 11), (1, 7), (1, 1), (0, 3), (0, 3), (1, 1)), KEYS[:1]),
        (ConvProblem(1, 8, 9, (12, 11), (3, 5), (1, 1), (1, 2), (1, 0), (1, 1)), KEYS[:2]),
        (ConvProblem(1, 12, 18, (5, 9, 8), (1, 3, 3), (1, 1, 1), (0, 1, 1), (0, 1, 1), (1, 1, 1), 2), KEYS),
        (ConvProblem(1, 12, 17, (5, 9, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)), KEYS[:1]),
    ],
    ids=lambda value: "x".join(map(str, value.kernel)) if isinstance(value, ConvProblem) else "",
)
def test_each_dimension_has_its_own_kernel(problem: ConvProblem, keys: list[str]) -> None:
    assert [key for key in KEYS if LOWERINGS[key].applicable(problem) is None] == keys
    data, weight = random_arrays(problem, 5)
    want = reference(problem, data, weight)
    for key in keys:
        layer = compile_layer(problem, key, parse_target("llvm"), epilogue=())
        assert layer.workspace_bytes == layer.kernels.cost.workspace_bytes
        np.testing.assert_allclose(layer.run(data, weight), want, atol=2e-5 * np.abs(want).max())


def test_error_grows_with_m_and_stays_small() -> None:
    problem = conv2d(64, 20, 20, 32, 3)
    data, weight = random_arrays(problem, 3)
    want = reference(problem, data, weight)
    errors = {}
    for key in ("implicit-gemm", *KEYS):
        got = compile_layer(problem, key, parse_target("llvm"), epilogue=()).run(data, weight)
        errors[key] = float(np.abs(got - want).max() / np.abs(want).max())
    assert errors["winograd-2"] < errors["winograd-4"] < errors["winograd-6"] < 5e-5
    assert errors["winograd-4"] < 1e-5


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (conv2d(8, 9, 9, 8, 3, 2), "needs stride 1, got 2x2"),
        (conv2d(8, 9, 9, 8, 3, d=2), "needs dilation 1, got 2x2"),
        (conv2d(8, 9, 9, 8, 1), "needs kernel sizes of 1, 3, 5 or 7, not all 1"),
        (conv2d(8, 9, 9, 8, 3, g=8), "more than one channel a group"),
    ],
)
def test_reasons(problem: object, text: str) -> None:
    for key in KEYS:
        reason = LOWERINGS[key].applicable(problem)  # type: ignore[arg-type]
        assert reason is not None and text in str(reason)


@pytest.mark.parametrize("key", [*KEYS, "im2row"])
def test_as_a_pass_on_a_foreign_function_and_scheduled(key: str) -> None:
    a, w = te.placeholder((1, 8, 14, 14), name="a"), te.placeholder((12, 8, 3, 3), name="w")
    conv = topi.nn.relu(topi.nn.conv2d_nchw(a, w, 1, 1, 1))
    mod = tvm.IRModule({"main": te.create_prim_func([a, w, conv]).with_attr("global_symbol", "main")})
    target = parse_target("llvm")
    lowered = tvm.transform.Sequential([LOWERINGS[key]])(mod)
    assert lowered["main"].script() != mod["main"].script()
    lowered = schedule_module(lowered, Machine.from_target(target))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype("float32") for s in ((1, 8, 14, 14), (12, 8, 3, 3))]
    results = []
    for module in (mod, lowered):
        out = tvm.runtime.tensor(np.full((1, 12, 14, 14), np.nan, "float32"))
        tvm.compile(module, target=target)["main"](*map(tvm.runtime.tensor, arrays), out)
        results.append(out.numpy())
    np.testing.assert_allclose(results[1], results[0], atol=1e-3)
