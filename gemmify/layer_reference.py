"""A layer by its definition, in NumPy and float64: what the lowerings are compared with.

One matrix product a kernel position and group, no TVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowering import DenseProblem, Problem, TransposedConvProblem
from lowering.base import activation_shape, output_shape, weight_shape
from lowering.epilogue import EpilogueOp

ALL = slice(None)


def reference(problem: Problem, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The layer in float64: `(N, *out, M)` from `(N, *size, C)` and `(M, *kernel, C/g)`, or dense `(n, m)`."""
    data, weight = data.astype("float64"), weight.astype("float64")
    if isinstance(problem, DenseProblem):
        return data @ weight.T
    if isinstance(problem, TransposedConvProblem):
        return _scattered(problem, data, weight)
    pads = zip(problem.pad_before, problem.pad_after, strict=True)
    padded = np.pad(data, [(0, 0), *pads, (0, 0)])
    out = np.zeros(output_shape(problem))
    for tap in np.ndindex(*problem.kernel):
        sides = zip(tap, problem.dilation, problem.out_size, problem.stride, strict=True)
        reads = (ALL, *(slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in sides))
        at = (ALL, *tap)
        window, taps = padded[reads], weight[at]
        for g in range(problem.groups):
            c = slice(g * problem.c_group, (g + 1) * problem.c_group)
            m = slice(g * problem.m_group, (g + 1) * problem.m_group)
            out[..., m] += window[..., c] @ taps[m].T
    return out


def _scattered(problem: TransposedConvProblem, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A transposed convolution: every product added where it belongs, then what the pads leave of that."""
    sides = zip(problem.full_size, problem.pad_before, problem.out_size, strict=True)
    room = [max(full, before + out) for full, before, out in sides]
    full = np.zeros((problem.n, *room, problem.m))
    for tap in np.ndindex(*problem.kernel):
        steps = zip(tap, problem.dilation, problem.size, problem.stride, strict=True)
        writes = (ALL, *(slice(t * d, t * d + (i - 1) * s + 1, s) for t, d, i, s in steps))
        at = (ALL, *tap)
        target, taps = full[writes], weight[at]
        for g in range(problem.groups):
            c = slice(g * problem.c_group, (g + 1) * problem.c_group)
            m = slice(g * problem.m_group, (g + 1) * problem.m_group)
            target[..., m] += data[..., c] @ taps[m].T
    kept = (ALL, *(slice(p, p + o) for p, o in zip(problem.pad_before, problem.out_size, strict=True)))
    return full[kept]


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
