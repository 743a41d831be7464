"""Everything on a GPU that is no GEMM, in numbers: one function after another against numpy or the same function on the
CPU. Sizes are odd where a vector or a block must not fit; every case runs with elements narrow and wide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi

from schedules import schedule_func
from schedules.cuda.device import Gpu
from schedules.target import host_target

Build = Callable[[str], list[te.Tensor]]


def padded(dtype: str) -> list[te.Tensor]:
    """A sum of two tensors with a border of zeros: channels fill vectors."""
    a, b = (te.placeholder((2, 5, 7, 16), dtype, name=name) for name in "ab")
    total = te.compute(a.shape, lambda *i: a(*i) + b(*i), name="total")
    return [a, b, topi.nn.pad(total, (0, 1, 2, 0), (0, 1, 1, 0), name="border")]


def odd_map(dtype: str) -> list[te.Tensor]:
    """No run of neighbours fits a vector."""
    a = te.placeholder((3, 5, 7), dtype, name="a")
    return [a, te.compute(a.shape, lambda *i: tirx.exp(a(*i)) * tirx.const(2, dtype), name="grown")]


def joined(dtype: str) -> list[te.Tensor]:
    """Two tensors side by side along the channels, the border between them inside a vector."""
    a, b = te.placeholder((3, 4, 12), dtype, name="a"), te.placeholder((3, 4, 20), dtype, name="b")
    return [a, b, topi.concatenate((a, b), axis=2)]


def turned(dtype: str) -> list[te.Tensor]:
    """Channels first to channels last; neither axis fills its last tile."""
    a = te.placeholder((2, 37, 3, 15), dtype, name="a")
    return [a, topi.transpose(a, (0, 2, 3, 1))]


def turned_map(dtype: str) -> list[te.Tensor]:
    """A transposition under a condition, and a tensor that is not transposed."""
    a, b = te.placeholder((40, 33), dtype, name="a"), te.placeholder((35, 40), dtype, name="b")
    inside = lambda i, j: tirx.if_then_else(i < 33, a(j, tirx.min(i, 32)), tirx.const(0, dtype))  # noqa: E731
    return [a, b, te.compute((35, 40), lambda i, j: inside(i, j) + b(i, j), name="both")]


def pooled(dtype: str) -> list[te.Tensor]:
    """Overlapping windows over a padded image, channels last."""
    a = te.placeholder((1, 11, 9, 24), dtype, name="a")
    return [a, topi.nn.pool2d(a, [3, 3], [2, 2], [1, 1], [1, 1, 1, 1], "max", layout="NHWC")]


def averaged(dtype: str) -> list[te.Tensor]:
    """The same with sums, and channels that fill no vector."""
    a = te.placeholder((2, 8, 8, 5), dtype, name="a")
    return [a, topi.nn.pool2d(a, [3, 3], [1, 1], [1, 1], [0, 0, 0, 0], "avg", layout="NHWC")]


def mean_of_pixels(dtype: str) -> list[te.Tensor]:
    """Few results, many terms, neighbours side by side: several threads a result."""
    a = te.placeholder((1, 13, 7, 20), dtype, name="a")
    wide = te.compute(a.shape, lambda *i: a(*i).astype("float32"), name="wide")
    total = topi.sum(wide, axis=(1, 2))
    return [a, te.compute((1, 20), lambda n, c: (total(n, c) / 91.0).astype(dtype), name="mean")]


def sum_of_rows(dtype: str) -> list[te.Tensor]:
    """The terms of one result are neighbours."""
    a = te.placeholder((7, 201), dtype, name="a")
    return [a, topi.max(a, axis=1)]


def softmax(dtype: str) -> list[te.Tensor]:
    """Rows that fill no block."""
    a = te.placeholder((5, 301), dtype, name="a")
    return [a, topi.nn.softmax(a)]


def softmax_of_channels(dtype: str) -> list[te.Tensor]:
    """Rows across memory."""
    a = te.placeholder((2, 6, 5, 3), dtype, name="a")
    return [a, topi.nn.softmax(a, axis=1)]


def normalised(dtype: str) -> list[te.Tensor]:
    """Mean and variance of a row, then a map."""
    a = te.placeholder((9, 70), "float32", name="a")
    mean = topi.sum(a, axis=1)
    squares = te.compute(a.shape, lambda i, j: tirx.exp(a(i, j) - mean(i) / 70.0), name="spread")
    variance = topi.sum(squares, axis=1)
    result = te.compute(a.shape, lambda i, j: ((a(i, j) - mean(i)) / variance(i)).astype(dtype), name="normal")
    return [a, result]


def local_response(dtype: str) -> list[te.Tensor]:
    """A window along the channels, which are neighbours."""
    a = te.placeholder((1, 3, 5, 16), dtype, name="a")
    squared = te.compute(
        (1, 3, 5, 20),
        lambda n, y, x, c: tirx.if_then_else(
            tirx.all(c >= 2, c < 18),
            a(n, y, x, c - 2).astype("float32") * a(n, y, x, c - 2).astype("float32"),
            0.0,
        ),
        name="squared",
    )
    r = te.reduce_axis((0, 5), name="r")
    total = te.compute(a.shape, lambda n, y, x, c: te.sum(squared(n, y, x, c + r), axis=r), name="total")
    value = lambda *i: a(*i).astype("float32") / tirx.sqrt(1.0 + 0.1 * total(*i))  # noqa: E731
    return [a, te.compute(a.shape, lambda *i: value(*i).astype(dtype), name="lrn")]


def depthwise(dtype: str) -> list[te.Tensor]:
    """Weights [channel][tap] side by side for the taps; windows of neighbouring pixels overlap."""
    a = te.placeholder((1, 6, 8, 16), dtype, name="a")
    w, bias = te.placeholder((16, 3, 3), dtype, name="w"), te.placeholder((16,), dtype, name="bias")
    ky, kx = te.reduce_axis((0, 3), name="ky"), te.reduce_axis((0, 3), name="kx")

    def term(n: Any, y: Any, x: Any, c: Any) -> Any:
        inside = tirx.all(y + ky >= 1, y + ky < 7, x + kx >= 1, x + kx < 9)
        value = tirx.if_then_else(inside, a(n, y + ky - 1, x + kx - 1, c).astype("float32"), tirx.const(0, "float32"))
        return te.sum(value * w(c, ky, kx).astype("float32"), axis=[ky, kx])

    total = te.compute(a.shape, term, name="total")
    finish = lambda n, y, x, c: tirx.max(total(n, y, x, c) + bias(c).astype("float32"), 0.0)  # noqa: E731
    return [a, w, bias, te.compute(a.shape, lambda *i: finish(*i).astype(dtype), name="relu")]


def two_sums(dtype: str) -> list[te.Tensor]:
    """A sum that two others read element by element and by windows: it is kept between kernels."""
    a = te.placeholder((4, 30, 6), dtype, name="a")
    k = te.reduce_axis((0, 30), name="k")
    total = te.compute((4, 6), lambda i, j: te.sum(a(i, k, j), axis=k), name="total")
    r = te.reduce_axis((0, 3), name="r")
    window = te.compute((4, 4), lambda i, j: te.sum(total(i, j + r), axis=r), name="window")
    return [a, te.compute((4, 4), lambda i, j: window(i, j) * total(i, j), name="both")]


CASES: tuple[Build, ...] = (
    padded, odd_map, joined, turned, turned_map, pooled, averaged, mean_of_pixels, sum_of_rows, softmax,
    softmax_of_channels, normalised, local_response, depthwise, two_sums,
)  # fmt: skip
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}


def on_host(tensors: list[te.Tensor], arrays: list[np.ndarray]) -> np.ndarray:
    """The function on the CPU, unscheduled."""
    func = te.create_prim_func(tensors).with_attr("global_symbol", "main")
    entry = tvm.compile(tvm.IRModule({"main": func}), target=host_target(), tir_pipeline="s_tir")["main"]
    shape = tuple(int(extent) for extent in tensors[-1].shape)
    out = tvm.runtime.empty(shape, str(tensors[-1].dtype))
    entry(*[tvm.runtime.tensor(array) for array in arrays], out)
    return out.numpy()


def inputs_of(tensors: list[te.Tensor]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = [tuple(int(extent) for extent in tensor.shape) for tensor in tensors[:-1]]
    dtypes = [np.dtype(getattr(ml_dtypes, str(t.dtype), str(t.dtype))) for t in tensors[:-1]]
    return [rng.standard_normal(s).astype(dtype) for s, dtype in zip(shapes, dtypes, strict=True)]


HALVES = (padded, turned_map, pooled, averaged, mean_of_pixels, softmax, local_response, depthwise)
"""What is computed in halves, or moved as halves, in a way of its own: the others in float16 are slow tests."""
DIVIDED = (mean_of_pixels, sum_of_rows, two_sums)
BFLOAT16 = (padded, turned, depthwise)
slow = pytest.mark.slow


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_right_in_float32(build: Build, gpu: Gpu, run_kernel: Callable[..., Any]) -> None:
    check(build, "float32", replace(gpu, multiprocessors=1), run_kernel)


@pytest.mark.parametrize(
    "build",
    [build if build in HALVES else pytest.param(build, marks=slow) for build in CASES],
    ids=lambda build: build.__name__,
)
def test_right_in_float16(build: Build, gpu: Gpu, run_kernel: Callable[..., Any]) -> None:
    check(build, "float16", replace(gpu, multiprocessors=1), run_kernel)


@pytest.mark.parametrize(
    "build",
    [build if build in DIVIDED else pytest.param(build, marks=slow) for build in CASES],
    ids=lambda build: build.__name__,
)
def test_right_on_many_multiprocessors(build: Build, gpu: Gpu, run_kernel: Callable[..., Any]) -> None:
    check(build, "float16", gpu, run_kernel)


@pytest.mark.parametrize(
    "build",
    [build if build in BFLOAT16 else pytest.param(build, marks=slow) for build in CASES],
    ids=lambda build: build.__name__,
)
def test_right_in_bfloat16(build: Build, gpu: Gpu, run_kernel: Callable[..., Any]) -> None:
    check(build, "bfloat16", replace(gpu, multiprocessors=1), run_kernel)


def check(build: Build, dtype: str, board: Gpu, run_kernel: Callable[..., Any]) -> None:
    """On a GPU of one multiprocessor threads take whole vectors and several pixels; on one of many they take little,
    and sums are divided among them."""
    tensors = build(dtype)
    arrays = inputs_of(tensors)
    func = schedule_func(te.create_prim_func(tensors), board)
    outputs = run_kernel(func, *arrays, *[None] * (len(func.params) - len(arrays)))
    wanted = on_host(tensors, arrays).astype("float64")
    got = outputs[-1].astype("float64")
    limit = TOLERANCE[dtype] * max(1.0, float(np.abs(wanted).max()))
    assert np.abs(got - wanted).max() <= limit
