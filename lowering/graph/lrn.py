"""Local response normalisation across channels: recognised in Relax, written as one tensor expression for NHWC data.

    y[n, p, c] = x[n, p, c] / (k + a sum_{r < size} x[n, p, c - before + r]^2)^b

Krizhevsky, Sutskever & Hinton 2012, section 3.3 (there the sum is multiplied by alpha; ONNX uses alpha / size, and so
does `a` here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from ._rewrite import Expr, Graph, dtype_of, int_list, op_name, scalar_of, shape_of


@dataclass(frozen=True)
class Lrn:
    """What was recognised: the normalised variable, the window over channels and the three constants."""

    data: Expr
    size: int
    before: int
    a: float
    b: float
    k: float


def _peel(graph: Graph, expr: Expr, name: str, neutral: float) -> tuple[Expr, float]:
    """`(x, c)` where `expr` is `name(x, c)` with a constant number `c`; `(expr, neutral)` where it is not."""
    value = graph.value(expr)
    number = scalar_of(value.args[1]) if op_name(value) == name else None
    return (expr, neutral) if number is None else (value.args[0], number)


def match_lrn(graph: Graph, value: Expr) -> Lrn | None:
    """The normalisation that `value`, a canonical division, computes on channels-first data; None where it is none.

    The pattern is what the ONNX importer of TVM writes: squares, an average pool over the channels as the outermost
    spatial axis (which counts the padding), a factor, an offset, a power.
    """
    if op_name(value) != "divide":
        return None
    data, power = value.args
    base, b = _peel(graph, power, "power", 1.0)
    base, k = _peel(graph, base, "add", 0.0)
    base, a = _peel(graph, base, "multiply", 1.0)
    pool = graph.value(_unshaped(graph, base))
    if op_name(pool) not in ("nn.avg_pool2d", "nn.avg_pool3d"):
        return None
    square = graph.value(_unshaped(graph, pool.args[0]))
    if op_name(square) != "multiply" or not all(arg.same_as(data) for arg in square.args):
        return None
    shape, attrs = shape_of(data), pool.attrs
    size, *others = int_list(attrs.pool_size)
    padding, dims = int_list(attrs.padding), len(shape) - 1
    plain = (
        str(attrs.layout) in ("NCHW", "NCDHW")
        and shape_of(pool.args[0]) == (shape[0], 1, *shape[1:]) == shape_of(pool)
        and all(v == 1 for v in (*others, *int_list(attrs.strides), *int_list(attrs.dilation)))
        and not any(padding[1:dims])
        and bool(attrs.count_include_pad)
    )
    return Lrn(data, size, padding[0], a / size, b, k) if plain else None


def _unshaped(graph: Graph, expr: Expr) -> Expr:
    value = graph.value(expr)
    return value.args[0] if op_name(value) == "reshape" else expr


def lrn_primfunc(lrn: Lrn) -> tirx.PrimFunc:
    """The normalisation of `[N, spatial..., C]` data as one PrimFunc of three blocks: `lrn_square` (the squares, zero
    outside the channels), `lrn_sum` (the window's reduction) and `lrn` (the division)."""
    logical = shape_of(lrn.data)
    shape = (logical[0], *logical[2:], logical[1])
    dtype, channels = dtype_of(lrn.data), logical[1]
    x = te.placeholder(shape, dtype, name="data")

    def square(*index: Any) -> Any:
        c = index[-1] - lrn.before
        value = x(*index[:-1], c)
        return tirx.if_then_else(tirx.all(c >= 0, c < channels), value * value, tirx.const(0, dtype))

    squares = te.compute((*shape[:-1], channels + lrn.size - 1), square, name="lrn_square")
    window = te.reduce_axis((0, lrn.size), name="r")
    total = te.compute(shape, lambda *i: te.sum(squares(*i[:-1], i[-1] + window), axis=window), name="lrn_sum")

    def normalise(*index: Any) -> Any:
        base = tirx.const(lrn.k, dtype) + tirx.const(lrn.a, dtype) * total(*index)
        return x(*index) / _power(base, lrn.b, dtype)

    return te.create_prim_func([x, te.compute(shape, normalise, name="lrn")]).without_attr("global_symbol")


def _power(base: Any, exponent: float, dtype: str) -> Any:
    """`base ** exponent`; square roots for the usual 3/4, because they are vector instructions and `pow` is a call."""
    if exponent == 1.0:
        return base
    if exponent == 0.5:
        return tirx.sqrt(base)
    if exponent == 0.75:
        root = tirx.sqrt(base)
        return root * tirx.sqrt(root)
    return tirx.power(base, tirx.const(exponent, dtype))
