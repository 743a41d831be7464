"""A layer by its definition, in numpy and float64: one matrix product a kernel position and group."""

from __future__ import annotations

from typing import Any

import numpy as np

ALL = slice(None)
Problem = dict[str, Any]
"""The fields of a lowering's problem, and `kind`: conv, dense or transposed."""


def layer(problem: Problem, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`(N, *out, M)` from `(N, *size, C)` and `(M, *kernel, C/g)`, or dense `(n, m)`; all float64."""
    if problem["kind"] == "dense":
        return np.asarray(data @ weight.T)
    if problem["kind"] == "transposed":
        return _scattered(problem, data, weight)
    pads = zip(problem["pad_before"], problem["pad_after"], strict=True)
    padded = np.pad(data, [(0, 0), *pads, (0, 0)])
    out = np.zeros((problem["n"], *problem["out_size"], problem["m"]))
    for tap in np.ndindex(*problem["kernel"]):
        reads, at = (ALL, *_places(problem, tap, problem["out_size"])), (ALL, *tap)
        window, taps = padded[reads], weight[at]
        for c, m in _groups(problem):
            out[..., m] += window[..., c] @ taps[m].T
    return out


def _scattered(problem: Problem, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    sizes = zip(problem["size"], problem["stride"], problem["kernel"], problem["dilation"], strict=True)
    full = [(i - 1) * s + (k - 1) * d + 1 for i, s, k, d in sizes]
    before, out = problem["pad_before"], problem["out_size"]
    room = [max(f, b + o) for f, b, o in zip(full, before, out, strict=True)]
    whole = np.zeros((problem["n"], *room, problem["m"]))
    for tap in np.ndindex(*problem["kernel"]):
        writes, at = (ALL, *_places(problem, tap, problem["size"])), (ALL, *tap)
        target, taps = whole[writes], weight[at]
        for c, m in _groups(problem):
            target[..., m] += data[..., c] @ taps[m].T
    kept = (ALL, *(slice(p, p + o) for p, o in zip(before, out, strict=True)))
    return whole[kept]


def _places(problem: Problem, tap: tuple[int, ...], extents: list[int]) -> list[slice]:
    """Where the kernel position `tap` meets the positions 0 .. extent of the other side."""
    sides = zip(tap, problem["dilation"], extents, problem["stride"], strict=True)
    return [slice(t * d, t * d + (e - 1) * s + 1, s) for t, d, e, s in sides]


def _groups(problem: Problem) -> list[tuple[slice, slice]]:
    """The input and output channels of each group."""
    groups = problem["groups"]
    c, m = problem["c"] // groups, problem["m"] // groups
    return [(slice(g * c, (g + 1) * c), slice(g * m, (g + 1) * m)) for g in range(groups)]


def epilogue(value: np.ndarray, ops: list[Any], operands: dict[str, np.ndarray]) -> np.ndarray:
    """The epilogue in float64: each op is [kind, the operand's name or None, parameters]."""
    for kind, operand, params in ops:
        if kind in ("bias", "add"):
            value = value + operands[operand]
        elif kind == "relu":
            value = np.maximum(value, 0)
        else:
            assert kind == "leaky_relu", f"the reference knows no epilogue {kind}"
            value = np.where(value > 0, value, params[0] * value)
    return value
