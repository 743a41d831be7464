"""The sliding window that every form of a convolution shares: its addresses, its padding, its patches."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import te, tirx

from .base import Stage, zero
from .problem import ConvProblem


def window_index(problem: ConvProblem, out: Sequence[Any], taps: Sequence[Any], padded: bool = True) -> list[Any]:
    """Input position `o s + k d` of output position `out` and tap `taps`, one entry a spatial dimension.

    `padded` counts from the padded input's corner, otherwise from the input's own (then a position may lie outside).
    """
    before = (0,) * problem.dims if padded else problem.pad_before
    return [
        o * s + tap * d - p for o, s, tap, d, p in zip(out, problem.stride, taps, problem.dilation, before, strict=True)
    ]


def read_padded(
    problem: ConvProblem, data: te.Tensor, n: Any, where: Sequence[Any], c: Any, layout: str = "NHWC"
) -> Any:
    """`I[n, where, c]`, zero where `where` (from the input's own corner) lies outside the input."""
    value = data(n, *where, c) if layout == "NHWC" else data(n, c, *where)
    inside = []
    sides = zip(where, problem.size, problem.pad_before, problem.pad_after, strict=True)
    for i, size, before, after in sides:
        inside += ([i >= 0] if before else []) + ([i < size] if after else [])
    return tirx.if_then_else(tirx.all(*inside), value, zero(problem.dtype)) if inside else value


def pad_stage(problem: ConvProblem) -> Stage:
    """Copy the input into a frame of zeros: `(N, *padded_size, C)`, workspace `e N C Hp Wp`."""

    def compute(data: te.Tensor) -> te.Tensor:
        def element(n: Any, *index: Any) -> Any:
            where = [i - before for i, before in zip(index[:-1], problem.pad_before, strict=True)]
            return read_padded(problem, data, n, where, index[-1])

        return te.compute((problem.n, *problem.padded_size, problem.c), element, name="pad")

    return Stage("pad", ("data",), compute, "workspace")


def pad_bytes(problem: ConvProblem) -> int:
    """Bytes of the padded copy: `e N C Hp Wp`, or 0 where there is no padding."""
    return problem.element * problem.n * problem.c * prod(problem.padded_size) if problem.padded else 0


def activation_bytes(problem: ConvProblem) -> int:
    """Bytes of the layer's input and output together."""
    return problem.element * problem.n * (problem.c * prod(problem.size) + problem.m * problem.pixels)
