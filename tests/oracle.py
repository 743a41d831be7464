"""The reference that every numeric test compares with, and random problems to compare on.

`reference` is the definition in NumPy and float64: one matrix product a kernel position and group, no TVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lowering import ConvProblem, DenseProblem, Problem
from lowering.base import activation_shape, output_shape, weight_shape
from lowering.epilogue import EpilogueOp

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


def reference(problem: Problem, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The layer in float64: `(N, *out, M)` from `(N, *size, C)` and `(M, *kernel, C/g)`, or dense `(n, m)`."""
    data, weight = data.astype("float64"), weight.astype("float64")
    if isinstance(problem, DenseProblem):
        return data @ weight.T
    pads = zip(problem.pad_before, problem.pad_after, strict=True)
    padded = np.pad(data, [(0, 0), *pads, (0, 0)])
    out = np.zeros(output_shape(problem))
    for tap in np.ndindex(*problem.kernel):
        sides = zip(tap, problem.dilation, problem.out_size, problem.stride, strict=True)
        window = padded[(slice(None), *(slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in sides))]
        for g in range(problem.groups):
            c = slice(g * problem.c_group, (g + 1) * problem.c_group)
            m = slice(g * problem.m_group, (g + 1) * problem.m_group)
            out[..., m] += window[..., c] @ weight[(m, *tap)].T
    return out


def magnitude(problem: Problem, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`sum |a| |b|` of every output element: what a rounding error is measured against."""
    return reference(problem, np.abs(data), np.abs(weight))


_UNARY: dict[str, Any] = {
    "relu": lambda v: np.maximum(v, 0),
    "clip": lambda v, low, high: np.clip(v, low, high),
    "leaky_relu": lambda v, a: np.where(v > 0, v, a * v),
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "tanh": np.tanh,
    "silu": lambda v: v / (1 + np.exp(-v)),
    "hardsigmoid": lambda v, a, b: np.clip(a * v + b, 0, 1),
    "hardswish": lambda v, a=1 / 6, b=0.5: v * np.clip(a * v + b, 0, 1),
}


def apply_epilogue(value: np.ndarray, ops: Sequence[EpilogueOp], operands: Sequence[np.ndarray]) -> np.ndarray:
    """The epilogue in float64 on a channels-last array."""
    for op in ops:
        if op.operand is None:
            value = _UNARY[op.kind](value, *op.params)
            continue
        operand = operands[op.operand].astype("float64")
        value = value + operand if op.kind in ("bias", "add") else value * operand
    return value


def random_arrays(problem: Problem, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Data (channels last) and weight of a problem, standard normal, the same for the same seed."""
    rng = np.random.default_rng(seed)
    shapes = activation_shape(problem), weight_shape(problem)
    data, weight = (rng.standard_normal(shape).astype(problem.dtype) for shape in shapes)
    return data, weight


def channels_first(array: np.ndarray) -> np.ndarray:
    """`(N, *size, C)` to `(N, C, *size)`, contiguous."""
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


# Primes, powers of two and their neighbours: what a register tile divides and what it does not.
CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 19, 23, 31, 32, 33, 37])
KERNELS = st.sampled_from([1, 1, 2, 3, 3, 3, 4, 5, 5, 7])
DTYPES = st.sampled_from(["float32", "float32", "float32", "float64"])


@st.composite
def random_conv(draw: st.DrawFn, max_macs: int = 400_000) -> ConvProblem:
    """A convolution of 1 to 3 dimensions: odd sizes, strides, dilations, uneven pads, groups, depthwise, multiplier."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 2, 3]))
    groups, c, m = draw(_channels())
    most = {1: 40, 2: 15, 3: 6}[dims]
    square = draw(st.booleans())
    first = draw(_side(most))
    sides = [first if square else draw(_side(most)) for _ in range(dims)]
    size, kernel, stride, before, after, dilation = (tuple(v) for v in zip(*sides, strict=True))
    n = draw(st.integers(1, 3))
    problem = ConvProblem(n, c, m, size, kernel, stride, before, after, dilation, groups, draw(DTYPES))
    while problem.macs > max_macs and (n, c, m) != (1, groups, groups):
        n, c, m = 1, *(groups if v <= groups else groups * max(1, v // groups // 2) for v in (c, m))
        problem = ConvProblem(n, c, m, size, kernel, stride, before, after, dilation, groups, problem.dtype)
    return problem


@st.composite
def _channels(draw: st.DrawFn) -> tuple[int, int, int]:
    kind = draw(st.sampled_from(["plain", "plain", "plain", "grouped", "depthwise", "multiplier"]))
    if kind == "plain":
        return 1, draw(CHANNELS), draw(CHANNELS)
    groups = draw(st.sampled_from([2, 3, 4, 5]) if kind == "grouped" else st.sampled_from([2, 3, 7, 8, 16, 24, 32]))
    if kind == "depthwise":
        return groups, groups, groups
    if kind == "multiplier":
        return groups, groups, groups * draw(st.integers(2, 3))
    return groups, groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 9))


@st.composite
def _side(draw: st.DrawFn, most: int) -> tuple[int, int, int, int, int, int]:
    """(size, kernel, stride, pad before, pad after, dilation) of one dimension, large enough for one output."""
    kernel, dilation = draw(KERNELS), draw(st.sampled_from([1, 1, 1, 2, 3]))
    stride = draw(st.sampled_from([1, 1, 1, 2, 3]))
    reach = dilation * (kernel - 1) + 1
    size = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["none", "same", "any"]))
    if kind == "same":
        before = after = (reach - 1) // 2
    else:
        before, after = (0, 0) if kind == "none" else (draw(st.integers(0, reach)), draw(st.integers(0, 3)))
    return max(size, reach - before - after, 1), kernel, stride, before, after, dilation


@st.composite
def random_dense(draw: st.DrawFn) -> DenseProblem:
    """A fully connected layer of 1 to 40 rows."""
    rows = draw(st.sampled_from([1, 1, 1, 2, 3, 5, 13, 32, 37]))
    return DenseProblem(rows, draw(st.integers(1, 130)), draw(st.integers(1, 70)), draw(DTYPES))


@st.composite
def random_3x3(draw: st.DrawFn) -> ConvProblem:
    """What minimal filtering takes: 3x3 or 5x5, stride 1, one group, any pad."""
    k = draw(st.sampled_from([3, 3, 5]))
    size = (draw(st.integers(k, 14)), draw(st.integers(k, 14)))
    before, after = ((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(2))
    # Few channels: the transforms unroll into much code, which takes LLVM long.
    c, m = draw(CHANNELS), draw(st.sampled_from([1, 3, 8, 11, 16, 17]))
    return ConvProblem(draw(st.integers(1, 2)), c, m, size, (k, k), (1, 1), before, after, (1, 1), 1, draw(DTYPES))


def random_problem() -> st.SearchStrategy[Problem]:
    """Convolutions of every kind; one in 32 is a plain 3x3 or 5x5, one in eight a fully connected layer."""
    kinds = {0: random_3x3(), 1: random_dense(), 2: random_dense(), 3: random_dense(), 4: random_dense()}
    return st.integers(0, 31).flatmap(lambda i: kinds.get(i, random_conv()))


EXPONENTIALS = [EpilogueOp(kind) for kind in ("sigmoid", "tanh", "silu")]


@st.composite
def random_epilogue(draw: st.DrawFn) -> tuple[EpilogueOp, ...]:
    """Up to four steps, operands numbered in order."""
    unary = [EpilogueOp("relu"), EpilogueOp("clip", None, (0.0, 6.0)), EpilogueOp("leaky_relu", None, (0.1,))]
    unary += [EpilogueOp(kind) for kind in ("sigmoid", "tanh", "silu", "hardswish")]
    unary += [EpilogueOp("hardsigmoid", None, (0.2, 0.5)), EpilogueOp("hardswish", None, (1 / 6, 0.5))]
    with_operand = st.sampled_from(["bias", "bias", "scale", "add", "mul"])
    steps = draw(st.lists(st.one_of(with_operand, st.sampled_from(unary)), max_size=4))
    ops: list[EpilogueOp] = []
    for step in steps:
        # One exponential at most: chained, each expands the code of the one before several times over.
        if step in EXPONENTIALS and any(op in EXPONENTIALS for op in ops):
            continue
        number = sum(op.operand is not None for op in ops)
        ops.append(EpilogueOp(step, number) if isinstance(step, str) else step)
    return tuple(ops)
