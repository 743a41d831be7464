"""The sliding window that every form of a convolution shares: its addresses, its padding, its patches."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import te, tirx

from .base import Stage, activation_shape, dtype_of, zero
from .free_sizes import Size
from .problem import ConvProblem, Problem, SpatialProblem


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
    return tirx.if_then_else(tirx.all(*inside), value, zero(dtype_of(value))) if inside else value


PAD_CHOICES = ("copy", "predicate")


def pad_choices(problem: ConvProblem) -> dict[str, tuple[Size, ...]]:
    """The free size `pad` of a GEMM that takes its A from the input: "copy" the input into a frame of zeros, or read it
    under a "predicate" where it lies, without workspace (the default of a staged problem: the copy would be written to
    memory and read again). Only where a layer pads, and none that is widened, whose copy pays for more."""
    if not problem.padded or problem.widened:
        return {}
    return {"pad": PAD_CHOICES[::-1] if problem.staged else PAD_CHOICES}


def copies_input(problem: ConvProblem) -> bool:
    """Whether a GEMM that takes its A from the input itself takes it from a copy: where the layer pads, and where the
    input is stored in half precision, which is dear to widen element by element, again for every panel of weights."""
    return problem.padded or problem.widened


def pad_stage(problem: ConvProblem) -> Stage:
    """Copy the input into a frame of zeros: `(N, *padded_size, C)`, workspace `e N C Hp Wp`."""

    def compute(data: te.Tensor) -> te.Tensor:
        def element(n: Any, *index: Any) -> Any:
            where = [i - before for i, before in zip(index[:-1], problem.pad_before, strict=True)]
            return read_padded(problem, data, n, where, index[-1])

        return te.compute((problem.n, *problem.padded_size, problem.c), element, name="pad")

    return Stage("pad", ("data",), compute, "workspace", moves=True)


def pad_bytes(problem: ConvProblem) -> int:
    """Bytes of the padded copy: `e N C Hp Wp`, or 0 where the input is read as it is."""
    size = problem.moved_element * problem.n * problem.c * prod(problem.padded_size)
    return size if copies_input(problem) else 0


def wide_stage(problem: Problem) -> Stage:
    """The input in the dtype of the arithmetic, as `wide`: for a GEMM that reads its A from the input itself."""

    def compute(data: te.Tensor) -> te.Tensor:
        return te.compute(activation_shape(problem), lambda *index: data(*index), name="wide")

    return Stage("wide", ("data",), compute, "workspace")


def wide_bytes(problem: Problem) -> int:
    """Bytes of the widened input, or 0 where the input is stored in the dtype of the arithmetic."""
    return problem.scratch_element * prod(activation_shape(problem)) if problem.widened else 0


def activation_bytes(problem: SpatialProblem) -> int:
    """Bytes of the layer's input and output together."""
    return problem.element * problem.n * (problem.c * prod(problem.size) + problem.m * problem.pixels)
