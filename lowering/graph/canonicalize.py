"""Relax -> Relax: one spelling for each thing that a network says, so that later passes have few patterns to know."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

from ._constants import RESHAPES, fold
from ._module import drop_uncalled, rewrite_main
from ._primfuncs import as_operator
from ._rewrite import (
    Emitter,
    Expr,
    Graph,
    array_of,
    dtype_of,
    int_list,
    is_const,
    is_tensor,
    make_const,
    op_name,
    scalar_of,
    shape_of,
)

CONVS = {"nn.conv1d": op.nn.conv1d, "nn.conv2d": op.nn.conv2d, "nn.conv3d": op.nn.conv3d}
FLOATS = ("float16", "float32", "float64")


@tvm.transform.module_pass(opt_level=0, name="Canonicalize")
class Canonicalize:
    """Simplify `main` without changing what it computes beyond rounding.

    Dead bindings go; dropout, no-op reshapes, permutations, casts, pads, slices and neutral constants disappear;
    constant subexpressions are evaluated; `batch_norm` becomes a multiplication and an addition by channel (Ioffe &
    Szegedy 2015, arXiv 1502.03167, algorithm 2: `y = g/sqrt(v + eps) x + (b - g m/sqrt(v + eps))`); zero pads join
    the convolution behind them; bounds (`maximum`, `minimum`, `relu6`, `clip`) become one `relu` or one `clip`;
    `x sigmoid(x)` becomes `silu`; subtraction and division by constants become addition and multiplication; global
    pools become `mean`; the PrimFuncs that TVM's importer writes for bounds and pads become the operators.

    Invariant: no `batch_norm` with constant statistics is left, every constant operand of `add` and `multiply` stands
    second, and `matmul(x, permute_dims(W))` with a constant `W` of shape [M, C] keeps that form. Layers keep their
    names.
    """

    def transform_module(self, mod: tvm.IRModule, ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """`mod` with `main` simplified. Raises ValueError where `main` is missing or holds control flow."""
        del ctx
        return drop_uncalled(rewrite_main(mod, lambda func: canonicalize(func, mod)))


def canonicalize(func: relax.Function, mod: tvm.IRModule) -> relax.Function:
    """`func` simplified, where `mod` holds the functions that it calls; see `Canonicalize`."""
    graph = Graph(func)
    emitter = Emitter()
    for var, value in graph.bindings:
        call = value if isinstance(value, relax.Call) else None
        emitter.env[var] = emitter.default(var, value) if call is None else _visit(graph, emitter, var, call, mod)
    return emitter.finish(graph, [emitter.lookup(o) for o in graph.outputs])


def _visit(graph: Graph, emitter: Emitter, var: Expr, value: Expr, mod: tvm.IRModule) -> Expr:
    call = emitter.normalized(value)
    operator = as_operator(mod, call)
    call = call if operator is None else emitter.normalized(operator)
    name = op_name(call)
    if not _keeps_dense_weight(graph, var, call) and (folded := fold(call)) is not None:
        return folded
    if name in RULES:
        simpler = RULES[name](emitter, call, var.name)
        if simpler is not None:
            return simpler if isinstance(simpler, relax.Tuple) else emitter.emit(simpler, var.name)
    return emitter.emit(call, var.name)


def _keeps_dense_weight(graph: Graph, var: Expr, call: Expr) -> bool:
    """The transpose of a fully connected layer's weight is left to the layer: transposing 400 MB here helps nobody."""
    if op_name(call) != "permute_dims" or not is_const(call.args[0]) or len(shape_of(call)) != 2:
        return False
    users = [graph.defs[u] for u in graph.users.get(var, [])]
    return bool(users) and all(op_name(u) == "matmul" and not u.args[0].same_as(var) for u in users)


def _same_type(call: Expr, x: Expr) -> bool:
    return shape_of(call) == shape_of(x) and dtype_of(call) == dtype_of(x)


def _no_op(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    """Operators that return their argument wherever shape and type are unchanged."""
    del emitter, name
    x = call.args[0]
    return x if is_tensor(x) and is_tensor(call) and _same_type(call, x) else None


def _strided_slice(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    steps = int_list(call.args[4]) if len(call.args) > 4 else [1]
    return _no_op(emitter, call, name) if all(s == 1 for s in steps) else None


def _reshape(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    return emitter.reshape(call.args[0], shape_of(call), name) if is_tensor(call) else None


def _permute(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    rank = len(shape_of(call))
    axes = list(range(rank))[::-1] if call.attrs.axes is None else [a % rank for a in int_list(call.attrs.axes)]
    # Constants that reach this point are the weights of fully connected layers, which stay as they are.
    return None if is_const(call.args[0]) else emitter.permute(call.args[0], axes, name)


def _commuted(call: Expr) -> tuple[Expr, Expr]:
    a, b = call.args
    return (b, a) if is_const(a) and not is_const(b) else (a, b)


def _add(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    del emitter, name
    x, y = _commuted(call)
    if scalar_of(y) == 0 and _same_type(call, x):
        return x
    return op.add(x, y) if x is not call.args[0] else None


def _subtract(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    x, y = call.args
    if not is_const(y) or dtype_of(y) not in FLOATS:
        return None
    negated = op.add(x, make_const(-array_of(y)))
    simpler = _add(emitter, emitter.normalized(negated), name)
    return negated if simpler is None else simpler


def _multiply(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    del name
    x, y = _commuted(call)
    if scalar_of(y) == 1 and _same_type(call, x):
        return x
    for value, gate in ((x, y), (y, x)):
        definition: Expr = emitter.defs.get(gate) if not is_const(gate) else None
        if op_name(definition) == "sigmoid" and definition.args[0].same_as(value):
            return op.nn.silu(value)
    return op.multiply(x, y) if x is not call.args[0] else None


def _divide(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    x, y = call.args
    if not is_const(y) or dtype_of(y) not in FLOATS or is_const(x) or not np.all(array_of(y)):
        return None
    product = op.multiply(x, make_const(1.0 / array_of(y).astype("float64"), dtype_of(y)))
    simpler = _multiply(emitter, emitter.normalized(product), name)
    return product if simpler is None else simpler


def _bounds(call: Expr) -> tuple[Expr, float, float] | None:
    """`(x, low, high)` where `call` is `min(max(x, low), high)` in any of its spellings."""
    name = op_name(call)
    if name in ("nn.relu", "nn.relu6"):
        return call.args[0], 0.0, 6.0 if name == "nn.relu6" else inf
    if name == "clip":
        return call.args[0], float(call.args[1].value), float(call.args[2].value)
    if name in ("maximum", "minimum"):
        x, y = _commuted(call)
        bound = scalar_of(y)
        if bound is not None and not np.isnan(bound) and _same_type(call, x):
            return (x, bound, inf) if name == "maximum" else (x, -inf, bound)
    return None


def _clamp(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    del name
    found = _bounds(call)
    if found is None or dtype_of(call) not in FLOATS:
        return None
    x, low, high = found
    inner = _bounds(emitter.defs.get(x))
    if inner is not None:
        bounds = (min(max(inner[1], low), high), min(max(inner[2], low), high))
        if bounds == inner[1:]:
            return x
        x, (low, high) = inner[0], bounds
    if high == inf:
        return x if low == -inf else op.nn.relu(x) if low == 0 else op.maximum(x, relax.const(low, dtype_of(x)))
    return op.minimum(x, relax.const(high, dtype_of(x))) if low == -inf else op.clip(x, low, high)


def _batch_norm(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    x, *parameters = call.args
    if call.attrs.training or not all(is_const(p) for p in parameters):
        return None
    gamma, beta, mean, var = (array_of(p).astype("float64") for p in parameters)
    scale = 1.0 / np.sqrt(var + float(call.attrs.epsilon))
    scale = scale * gamma if call.attrs.scale else scale
    shift = -mean * scale + (beta if call.attrs.center else 0.0)
    rank, axis = len(shape_of(x)), int(call.attrs.axis) % len(shape_of(x))
    shape = (-1,) + (1,) * (rank - 1 - axis)
    scaled = emitter.emit(op.multiply(x, make_const(scale.reshape(shape), dtype_of(x))), f"{name}_scale")
    shifted = emitter.emit(op.add(scaled, make_const(shift.reshape(shape), dtype_of(x))), f"{name}_shift")
    return relax.Tuple([shifted, *parameters[2:]])


def _dropout(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    x = call.args[0]
    return relax.Tuple([x, emitter.emit(op.ones_like(x), f"{name}_mask")])


def _conv(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    """A constant zero pad in front of a channels-first convolution joins the convolution's own padding."""
    del name
    attrs = call.attrs
    pad: Expr = emitter.defs.get(call.args[0])
    if op_name(pad) != "nn.pad" or str(attrs.data_layout)[:2] != "NC":
        return None
    widths = int_list(pad.attrs.pad_width)
    if str(pad.attrs.pad_mode) != "constant" or float(pad.attrs.pad_value) != 0 or any(widths[:4]) or min(widths) < 0:
        return None
    own, dims = int_list(attrs.padding), len(widths) // 2 - 2
    added = widths[4::2] + widths[5::2]
    assert len(own) == 2 * dims, "TVM normalises the padding to before and after for each axis"
    return CONVS[op_name(call)](
        pad.args[0],
        call.args[1],
        strides=int_list(attrs.strides),
        padding=[a + b for a, b in zip(own, added, strict=True)],
        dilation=int_list(attrs.dilation),
        groups=int(attrs.groups),
        data_layout=str(attrs.data_layout),
        kernel_layout=str(attrs.kernel_layout),
        out_dtype=attrs.out_dtype,
    )


def _global_pool(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    """A pool over the whole image is a mean; the adaptive pool to size 1 is one by definition."""
    del emitter, name
    x, attrs = call.args[0], call.attrs
    shape, rank = shape_of(x), len(shape_of(x))
    if str(attrs.layout)[:2] != "NC":
        return None
    if op_name(call).startswith("nn.adaptive"):
        whole = all(d == 1 for d in shape_of(call)[2:])
    else:
        whole = tuple(int_list(attrs.pool_size)) == shape[2:] and not any(int_list(attrs.padding))
    return op.mean(x, axis=list(range(2, rank)), keepdims=True) if whole else None


def _mean(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    """A mean over the spatial axes keeps them as axes of size 1, and a reshape drops them."""
    x, attrs = call.args[0], call.attrs
    rank = len(shape_of(x))
    if attrs.keepdims or attrs.axis is None or rank < 3 or sorted(a % rank for a in int_list(attrs.axis))[0] < 2:
        return None
    kept = emitter.emit(op.mean(x, axis=int_list(attrs.axis), keepdims=True), f"{name}_keep")
    return emitter.reshape(kept, shape_of(call), name)


def _concat(emitter: Emitter, call: Expr, name: str) -> Expr | None:
    del emitter, name
    parts = call.args[0]
    return parts.fields[0] if isinstance(parts, relax.Tuple) and len(parts.fields) == 1 else None


Rule = Callable[[Emitter, Expr, str], "Expr | None"]
RULES: dict[str, Rule] = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(("astype", "nn.pad", "broadcast_to"), _no_op),
    **dict.fromkeys(("nn.relu", "nn.relu6", "clip", "maximum", "minimum"), _clamp),
    **dict.fromkeys(CONVS, _conv),
    **{f"nn.{kind}_pool{d}d": _global_pool for kind in ("avg", "adaptive_avg") for d in (1, 2, 3)},
    "strided_slice": _strided_slice,
    "permute_dims": _permute,
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "divide": _divide,
    "nn.batch_norm": _batch_norm,
    "nn.dropout": _dropout,
    "mean": _mean,
    "concat": _concat,
}
