"""The gradients as plain mathematics: tensor expressions to read, to schedule differently, or to test against.

Nothing here is laid out for speed; the lowerings compute the same.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from ..base import zero
from ..gradient_problem import GradientProblem, InputGradientProblem, WeightGradientProblem
from ..window import read_padded, window_index
from .split import pixel


def definition(problem: GradientProblem) -> list[te.Tensor]:
    """The placeholders of a gradient's operands and the tensor that it is: the arguments of `te.create_prim_func`."""
    operands = [te.placeholder(shape, problem.dtype, name=name) for name, shape in problem.operand_shapes().items()]
    if isinstance(problem, InputGradientProblem):
        return [*operands, input_gradient(problem, *operands)]
    assert isinstance(problem, WeightGradientProblem)
    return [*operands, weight_gradient(problem, *operands)]


def input_gradient(problem: InputGradientProblem, gradient: te.Tensor, weight: te.Tensor) -> te.Tensor:
    """`dI[n, i, c] = sum_{k, m} dO[n, (i + p - k d) / s, m] W[m, k, c]` where `s` divides, and that output exists."""
    conv = problem.conv
    taps = [te.reduce_axis((0, extent), name=f"k{d}") for d, extent in enumerate(conv.kernel)]
    m = te.reduce_axis((0, conv.m_group), name="m")

    def element(n: Any, *index: Any) -> Any:
        where, c = index[:-1] or (0,), index[-1]
        out, exists = [], []
        for i, k, s, p, d, size in zip(
            where, taps, conv.stride, conv.pad_before, conv.dilation, conv.out_size, strict=True
        ):
            from_start = i + p - k * d
            out.append(from_start // s)
            exists += [from_start % s == 0, from_start // s >= 0, from_start // s < size]
        channel = c // conv.c_group * conv.m_group + m
        row = weight(channel, *taps_of(problem, taps), c % conv.c_group)
        value = gradient(*pixel(problem, n, out), channel) * row
        return te.sum(tirx.if_then_else(tirx.all(*exists), value, zero(conv.dtype)), axis=[*taps, m])

    return te.compute(problem.result_shape(), element, name="input_gradient")


def weight_gradient(problem: WeightGradientProblem, gradient: te.Tensor, given: te.Tensor) -> te.Tensor:
    """`dW[m, k, c] = sum_{n, o} dO[n, o, m] I[n, o s + k d - p, c]`, I being 0 outside."""
    conv = problem.conv
    n = te.reduce_axis((0, conv.n), name="n")
    out = [te.reduce_axis((0, extent), name=f"o{d}") for d, extent in enumerate(conv.out_size)]

    def element(m: Any, *index: Any) -> Any:
        taps, c = index[:-1] or (0,) * conv.dims, index[-1]

        def read(n: Any, *at: Any) -> Any:
            return given(*pixel(problem, n, at[:-1]), at[-1])

        where = window_index(conv, out, taps, padded=False)
        value = read_padded(conv, read, n, where, m // conv.m_group * conv.c_group + c)
        return te.sum(gradient(*pixel(problem, n, out), m) * value, axis=[n, *out])

    return te.compute(problem.result_shape(), element, name="weight_gradient")


def taps_of(problem: GradientProblem, taps: list[Any]) -> list[Any]:
    """The kernel's indices in the weight: none in a fully connected layer's."""
    return taps if problem.forward is problem.conv else []
