"""Layers as somebody else would write them with `te.compute` and `topi`: any order of axes, any way to pad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from oracle import random_conv
from tvm import te, tirx, topi

from lowering import ConvProblem

PADDINGS = ("block", "topi", "if_then_else", "select", "product", "inverted")


@dataclass(frozen=True)
class Written:
    """How a convolution is written: the order of the axes of data `(n, c, *dims)`, weight `(m, c, *dims)` and output
    `(n, m, *dims)` as permutations, how it pads, whether the weight is the left factor, and whether a bias follows."""

    problem: ConvProblem
    data_order: tuple[int, ...]
    weight_order: tuple[int, ...]
    out_order: tuple[int, ...]
    padding: str
    weight_first: bool
    bias: bool


@st.composite
def written(draw: st.DrawFn) -> Written:
    """A random convolution, written in a random way."""
    problem = draw(random_conv(max_macs=60_000))
    assume(all(reads_input(problem, d) for d in range(problem.dims)))
    axes = range(problem.dims + 2)
    orders = [tuple(draw(st.permutations(axes))) for _ in range(3)]
    return Written(problem, *orders, draw(st.sampled_from(PADDINGS)), draw(st.booleans()), draw(st.booleans()))


def reads_input(p: ConvProblem, d: int) -> bool:
    """Whether any window reaches the input in dimension `d`; where none does, TVM simplifies the layer to zeros."""
    at = [o * p.stride[d] + t * p.dilation[d] for o in range(p.out_size[d]) for t in range(p.kernel[d])]
    return any(p.pad_before[d] <= i < p.pad_before[d] + p.size[d] for i in at)


def permuted(index: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """The entries of an index (or a shape) in another order of axes."""
    return [index[axis] for axis in order]


def conv_tensors(how: Written) -> list[te.Tensor]:
    """`[data, weight, (bias,) out]` of the convolution."""
    p = how.problem
    shape = (p.n, p.c, *p.size)
    data = te.placeholder(permuted(shape, how.data_order), p.dtype, name="a")
    weight_shape = (p.m, p.c_group, *p.kernel)
    weight = te.placeholder(permuted(weight_shape, how.weight_order), p.dtype, name="b")
    zero = tirx.const(0, p.dtype)
    source, corner = _padded(how, data)
    c = te.reduce_axis((0, p.c_group), name="r0")
    taps = [te.reduce_axis((0, extent), name=f"r{d + 1}") for d, extent in enumerate(p.kernel)]

    def element(*index: Any) -> Any:
        at = [index[how.out_order.index(axis)] for axis in range(p.dims + 2)]
        n, m, out = at[0], at[1], at[2:]
        sides = zip(out, p.stride, taps, p.dilation, corner, strict=True)
        where = [o * s + t * d - before for o, s, t, d, before in sides]
        channel = m // p.m_group * p.c_group + c if p.groups > 1 else c
        left = source(*permuted((n, channel, *where), how.data_order))
        right = weight(*permuted((m, c, *taps), how.weight_order))
        term = _with_condition(how, where, left, right, zero) if any(corner) or source is data else left * right
        return te.sum(term, axis=[c, *taps])

    out = te.compute(permuted((p.n, p.m, *p.out_size), how.out_order), element, name="o")
    if not how.bias:
        return [data, weight, out]
    bias = te.placeholder((p.m,), p.dtype, name="d")
    channel_axis = how.out_order.index(1)
    result = te.compute(out.shape, lambda *i: tirx.max(out(*i) + bias(i[channel_axis]), zero), name="e")
    return [data, weight, bias, result]


def _with_condition(how: Written, where: Sequence[Any], left: Any, right: Any, zero: Any) -> Any:
    p = how.problem
    inside = []
    for i, size, before, after in zip(where, p.size, p.pad_before, p.pad_after, strict=True):
        inside += [i >= 0] if before else []
        inside += [i < size] if after else []
    product = right * left if how.weight_first else left * right
    if not inside:
        return product
    if how.padding == "product":
        return tirx.if_then_else(tirx.all(*inside), product, zero)
    if how.padding == "select":
        left = tirx.Select(tirx.all(*inside), left, zero)
    elif how.padding == "inverted":
        left = tirx.if_then_else(tirx.any(*(tirx.Not(test) for test in inside)), zero, left)
    else:
        left = tirx.if_then_else(tirx.all(*inside), left, zero)
    return right * left if how.weight_first else left * right


def _padded(how: Written, data: te.Tensor) -> tuple[te.Tensor, tuple[int, ...]]:
    """The tensor that the reduction reads, and the position of its corner in the padded input."""
    p = how.problem
    if how.padding not in ("block", "topi"):
        return data, p.pad_before
    before, after = permuted((0, 0, *p.pad_before), how.data_order), permuted((0, 0, *p.pad_after), how.data_order)
    nothing = (0,) * p.dims
    if how.padding == "topi":
        return topi.nn.pad(data, before, after), nothing
    shape = permuted((p.n, p.c, *p.padded_size), how.data_order)

    def element(*index: Any) -> Any:
        where = [i - b for i, b in zip(index, before, strict=True)]
        tests = [t for i, extent in zip(where, data.shape, strict=True) for t in (i >= 0, i < extent)]
        return tirx.if_then_else(tirx.all(*tests), data(*where), tirx.const(0, p.dtype))

    return te.compute(shape, element, name="frame"), nothing


def to_canonical(array: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """`(n, c, *dims)` in some order of axes -> `(n, *dims, c)`."""
    return np.moveaxis(np.transpose(array, np.argsort(order)), 1, -1)


def from_canonical(array: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """`(n, *dims, c)` -> `(n, c, *dims)` in some order of axes, contiguous."""
    return np.ascontiguousarray(np.transpose(np.moveaxis(array, -1, 1), order))


def tensor(*shape: int, name: str, dtype: str = "float32") -> te.Tensor:
    """A placeholder."""
    return te.placeholder(shape, dtype, name=name)


def prim_func(*tensors: te.Tensor) -> tirx.PrimFunc:
    """The function of the tensors, inputs first."""
    return te.create_prim_func(list(tensors)).with_attr("global_symbol", "main")
