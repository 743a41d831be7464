"""exp, log, tanh, erf, sigmoid and constant powers as vector arithmetic, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from schedules import Machine, host_target, schedule_func
from schedules.cpu.tir_tools import collect
from schedules.cpu.vector_math import HEAVY_CALLS, op_name

MACHINE = Machine.from_target(host_target())


def run(function: Callable[[Any], Any], x: np.ndarray) -> tuple[np.ndarray, tirx.PrimFunc]:
    a = te.placeholder(x.shape, "float32")
    b = te.compute(x.shape, lambda i: function(a[i]))
    func = schedule_func(te.create_prim_func([a, b]), MACHINE)
    lib = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=host_target())
    out = tvm.runtime.tensor(np.full(x.shape, np.nan, "float32"))
    lib["main"](tvm.runtime.tensor(x), out)
    return out.numpy(), func


def samples(low: float, high: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    near_zero = rng.uniform(-0.01, 0.01, 1000)
    x = np.concatenate([rng.uniform(low, high, 20000), near_zero]).astype("float32")
    return x[(x >= low) & (x <= high)]


def power(c: float) -> Callable[[Any], Any]:
    return lambda x: tirx.pow(x, tirx.FloatImm("float32", c))


CASES: list[tuple[str, Callable[[Any], Any], float, float, Callable[[Any], Any], float]] = [
    ("exp", tirx.exp, -87.0, 88.7, np.exp, 2e-7),
    ("log", tirx.log, 1e-30, 1e30, np.log, 2e-7),
    ("tanh", tirx.tanh, -10.0, 10.0, np.tanh, 5e-7),
    ("sigmoid", tirx.sigmoid, -80.0, 80.0, lambda x: 1 / (1 + np.exp(-x)), 3e-7),
    ("erf", tirx.erf, -5.0, 5.0, np.vectorize(math.erf), 6e-7),
    ("pow 0.75", power(0.75), 1e-6, 1e6, lambda x: x**0.75, 4e-7),
    ("pow -0.75", power(-0.75), 1e-6, 1e6, lambda x: x**-0.75, 4e-7),
    ("pow 0.5", power(0.5), 0.0, 1e6, np.sqrt, 2e-7),
    ("pow 3", power(3.0), -50.0, 50.0, lambda x: x**3, 3e-7),
    ("pow -1.25", power(-1.25), 1e-3, 1e3, lambda x: x**-1.25, 5e-7),
    ("pow 0.6", power(0.6), 1e-4, 1e4, lambda x: x ** float(np.float32(0.6)), 1e-6),
]


@pytest.mark.parametrize(("name", "function", "low", "high", "reference", "bound"), CASES, ids=[c[0] for c in CASES])
def test_close_to_float64_and_without_library_calls(
    name: str,
    function: Callable[[Any], Any],
    low: float,
    high: float,
    reference: Callable[[Any], Any],
    bound: float,
) -> None:
    x = samples(low, high)
    out, func = run(function, x)
    exact = reference(x.astype("float64"))
    error = np.abs(out - exact) / np.maximum(np.abs(exact), 1e-37)
    assert error.max() <= bound, f"{name}: {error.max():.2e} at {x[error.argmax()]}"
    assert not [call for call in collect(func.body, tvm.ir.Call) if op_name(call) in HEAVY_CALLS]


SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 1.0, -1.0, 1000.0, -1000.0] * 7, "float32")


@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (tirx.exp, np.exp),
        (tirx.log, np.log),
        (tirx.tanh, np.tanh),
        (tirx.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
        (power(0.6), lambda x: np.power(x, 0.6)),
        (power(-2.6), lambda x: np.power(x, -2.6)),
        (power(2.0), np.square),
    ],
    ids=["exp", "log", "tanh", "sigmoid", "pow 0.6", "pow -2.6", "square"],
)
def test_zero_infinity_nan_and_the_denormals(function: Callable[[Any], Any], reference: Callable[[Any], Any]) -> None:
    x = SPECIAL
    if function not in (tirx.exp, tirx.log, tirx.tanh, tirx.sigmoid):
        x = x[~np.isneginf(x)]  # C's pow gives +inf for a fractional power of -inf; here it is NaN
    with np.errstate(all="ignore"):
        exact = reference(x.astype("float64")).astype("float32")
    out, _ = run(function, x)
    np.testing.assert_allclose(out, exact, rtol=2e-6, atol=1e-38)


def test_a_variable_power_and_other_dtypes_keep_their_calls() -> None:
    out, func = run(lambda x: tirx.pow(x, x), np.array([0.5, 1.5, 2.5] * 20, "float32"))
    np.testing.assert_allclose(out[:3], [0.5**0.5, 1.5**1.5, 2.5**2.5], rtol=1e-6)
    assert [call for call in collect(func.body, tvm.ir.Call) if op_name(call) == "tirx.pow"]
