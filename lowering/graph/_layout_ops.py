"""How each operator behaves when its operands are stored in another order: one handler a family of operators.

A handler gets the state, the source's variable and its call, and returns how the result is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op

from ._layout_state import LayoutState, Perm, Stored, channels_last, identity, permuted
from ._rewrite import Expr, array_of, int_list, is_const, is_tensor, make_const, op_name, shape_of
from .canonicalize import CONVS

Handler = Callable[[LayoutState, Expr, Expr], Stored]

LAYOUTS = {3: ("NCW", "NWC", "OWI"), 4: ("NCHW", "NHWC", "OHWI"), 5: ("NCDHW", "NDHWC", "ODHWI")}
"""Data layout of the source, of the result, and kernel layout of the result, by rank."""

POOLS = {f"nn.{k}_pool{d}d": getattr(op.nn, f"{k}_pool{d}d") for k in ("max", "avg") for d in (1, 2, 3)}
ADAPTIVE = {f"nn.adaptive_avg_pool{d}d": getattr(op.nn, f"adaptive_avg_pool{d}d") for d in (1, 2, 3)}
REDUCTIONS = {name: getattr(op, name) for name in ("sum", "mean", "max", "min", "prod", "variance", "std")}
SOFTMAX = {"nn.softmax": op.nn.softmax, "nn.log_softmax": op.nn.log_softmax}
ELEMENTWISE = (
    *("nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.leakyrelu", "nn.selu", "nn.softplus"),
    *("sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "negative", "abs", "erf", "floor", "ceil", "round", "sign"),
    *("square", "sin", "cos", "clip", "astype", "where", "add", "subtract", "multiply", "divide", "power", "maximum"),
    *("minimum", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "mod", "floor_divide"),
)


def unknown(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """An operator that reads and writes the source's order."""
    args = [state.plain_or_tuple(a) if is_tensor(a) or isinstance(a, relax.Tuple) else a for a in call.args]
    return Stored(state.emitter.emit(relax.Call(call.op, args, call.attrs, call.ty_args), var.name), identity(var))


def _joint_perm(state: LayoutState, operands: Sequence[Expr], rank: int) -> Perm:
    """The order to compute in: that of the first operand of full rank which is not stored in the source's order."""
    perms = [state.stored(o).perm for o in operands if is_tensor(o) and len(shape_of(o)) == rank]
    plain = tuple(range(rank))
    return next((p for p in perms if p != plain), plain)


def elementwise(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """Computed in the order in which an operand already lies; the others are brought to it, constants for free."""
    tensors = [a for a in call.args if is_tensor(a)]
    flats = {state.stored(a).flat for a in tensors if prod(shape_of(a)) > 1}
    if len(flats) == 1 and None not in flats:
        args = [state.stored(a).expr if is_tensor(a) else a for a in call.args]
        return Stored(state.emitter.emit(relax.Call(call.op, args, call.attrs), var.name), (0, 1), flats.pop())
    rank = len(shape_of(var))
    perm = _joint_perm(state, tensors, rank)
    args = [state.at_rank(a, rank, perm) if is_tensor(a) else a for a in call.args]
    return Stored(state.emitter.emit(relax.Call(call.op, args, call.attrs, call.ty_args), var.name), perm)


def conv(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """A convolution of channels-last data with its kernel as O, taps, I."""
    rank, attrs = len(shape_of(var)), call.attrs
    first, last, kernel = LAYOUTS[rank]
    if str(attrs.data_layout) != first or str(attrs.out_layout) not in ("", first):
        return unknown(state, var, call)
    order = tuple(str(attrs.kernel_layout).index(letter) for letter in kernel)
    result = CONVS[op_name(call)](
        state.channels_last(call.args[0]),
        state.convert(call.args[1], order),
        strides=int_list(attrs.strides),
        padding=int_list(attrs.padding),
        dilation=int_list(attrs.dilation),
        groups=int(attrs.groups),
        data_layout=last,
        kernel_layout=kernel,
        out_dtype=attrs.out_dtype,
    )
    return Stored(state.emitter.emit(result, var.name), channels_last(rank))


def conv_transpose(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """Kept channels-first, between two permutations of its own: TVM compiles no other form."""
    rank = len(shape_of(var))
    if str(call.attrs.data_layout) != LAYOUTS[rank][0]:
        return unknown(state, var, call)
    back = (0, rank - 1, *range(1, rank - 1))
    data = state.emitter.emit(op.permute_dims(state.channels_last(call.args[0]), back), f"{var.name}_channels_first")
    layer = state.emitter.emit(relax.Call(call.op, [data, state.plain(call.args[1])], call.attrs), var.name)
    result = state.emitter.emit(op.permute_dims(layer, channels_last(rank)), f"{var.name}_channels_last")
    # Later permutations must not look through this one: it belongs to the layer.
    state.emitter.defs.pop(result)
    return Stored(result, channels_last(rank))


def pool(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """Max and average pools, also adaptive ones, on channels-last data."""
    rank, attrs = len(shape_of(var)), call.attrs
    first, last, _ = LAYOUTS[rank]
    if str(attrs.layout) != first:
        return unknown(state, var, call)
    data, name = state.channels_last(call.args[0]), op_name(call)
    if name in ADAPTIVE:
        result = ADAPTIVE[name](data, tuple(int_list(attrs.output_size)), layout=last)
    else:
        result = POOLS[name](
            data,
            tuple(int_list(attrs.pool_size)),
            tuple(int_list(attrs.strides)),
            tuple(int_list(attrs.padding)),
            tuple(int_list(attrs.dilation)),
            bool(attrs.ceil_mode),
            bool(attrs.count_include_pad),
            layout=last,
        )
    return Stored(state.emitter.emit(result, var.name), channels_last(rank))


def resize(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """Two-dimensional resampling on channels-last data."""
    attrs = call.attrs
    if str(attrs.layout) != "NCHW":
        return unknown(state, var, call)
    result = op.image.resize2d(
        state.channels_last(call.args[0]),
        call.args[1],
        [float(v.value) for v in attrs.roi],
        "NHWC",
        str(attrs.method),
        str(attrs.coordinate_transformation_mode),
        str(attrs.rounding_method),
        float(attrs.cubic_alpha),
        int(attrs.cubic_exclude),
        float(attrs.extrapolation_value),
        attrs.out_dtype,
    )
    return Stored(state.emitter.emit(result, var.name), channels_last(4))


def _followed(state: LayoutState, operand: Expr) -> tuple[Expr, Perm]:
    """An operand in whatever order it lies, and that order."""
    stored = state.stored(operand)
    return (state.plain(operand), (0, 1)) if stored.flat else (stored.expr, stored.perm)


def reduction(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """Sums, means and extrema over axes, which are renamed to where they lie."""
    data, perm = _followed(state, call.args[0])
    rank, keep = len(perm), bool(call.attrs.keepdims)
    axes = list(range(rank)) if call.attrs.axis is None else [a % rank for a in int_list(call.attrs.axis)]
    result = REDUCTIONS[op_name(call)](data, axis=[perm.index(a) for a in axes], keepdims=keep)
    if not keep:
        kept = [a for a in range(rank) if a not in axes]
        perm = tuple(kept.index(p) for p in perm if p not in axes)
    return Stored(state.emitter.emit(result, var.name), perm)


def softmax(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """Softmax along an axis, renamed to where it lies."""
    data, perm = _followed(state, call.args[0])
    axis = perm.index(int(call.attrs.axis) % len(perm))
    return Stored(state.emitter.emit(SOFTMAX[op_name(call)](data, axis=axis), var.name), perm)


def prelu(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """The slope's axis renamed to where it lies."""
    data, perm = _followed(state, call.args[0])
    result = op.nn.prelu(data, state.plain(call.args[1]), perm.index(int(call.attrs.axis) % len(perm)))
    return Stored(state.emitter.emit(result, var.name), perm)


def concat(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """All parts in the order of the first that is not in the source's."""
    parts = state.graph.resolve(call.args[0])
    if not isinstance(parts, relax.Tuple):
        return unknown(state, var, call)
    rank = len(shape_of(var))
    perm = _joint_perm(state, parts.fields, rank)
    axis = perm.index(int(call.attrs.axis or 0) % rank)
    result = op.concat([state.convert(p, perm) for p in parts.fields], axis)
    return Stored(state.emitter.emit(result, var.name), perm)


def split(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """The axis renamed; every part lies as the whole did."""
    data, perm = _followed(state, call.args[0])
    where = call.attrs.indices_or_sections
    sections = int(where.value) if hasattr(where, "value") else where if isinstance(where, int) else int_list(where)
    result = op.split(data, sections, perm.index(int(call.attrs.axis) % len(perm)))
    return Stored(state.emitter.emit(result, var.name), perm)


def strided_slice(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """The axes renamed to where they lie."""
    data, perm = _followed(state, call.args[0])
    axes = [perm.index(a % len(perm)) for a in int_list(call.args[1])]
    bounds = [int_list(a) for a in call.args[2:]]
    result = op.strided_slice(data, axes, *bounds, assume_inbound=bool(call.attrs.assume_inbound))
    return Stored(state.emitter.emit(result, var.name), perm)


def pad(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """The widths in the order of the axes."""
    data, perm = _followed(state, call.args[0])
    widths = int_list(call.attrs.pad_width)
    ordered = [w for p in perm for w in widths[2 * p : 2 * p + 2]]
    result = op.nn.pad(data, ordered, str(call.attrs.pad_mode), float(call.attrs.pad_value))
    return Stored(state.emitter.emit(result, var.name), perm)


def permute(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """Nothing is emitted: the same data, its axes under new names."""
    rank = len(shape_of(var))
    axes = list(range(rank))[::-1] if call.attrs.axes is None else [a % rank for a in int_list(call.attrs.axes)]
    data, perm = _followed(state, call.args[0])
    return Stored(data, tuple(axes.index(p) for p in perm))


def reshape(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """Channels stay last through reshapes that keep, split or merge them; a flattened image keeps its stored order."""
    source, (old, new) = call.args[0], (shape_of(call.args[0]), shape_of(var))
    stored = state.stored(source)
    if stored.perm != identity(source) and len(new) >= 2 and old[0] == new[0]:
        if [p for p in stored.perm if old[p] != 1] == [p for p in identity(source) if old[p] != 1]:
            return Stored(state.emitter.reshape(stored.expr, new, var.name), identity(var))
        if len(new) > 2 and old[1] == new[1]:
            return _reshaped(state, var, state.channels_last(source), channels_last(len(new)))
        split_rank = len(new) - len(old) + 1
        if split_rank > 1 and prod(new[1 : 1 + split_rank]) == old[1] and new[1 + split_rank :] == old[2:]:
            perm = (0, *range(1 + split_rank, len(new)), *range(1, 1 + split_rank))
            return _reshaped(state, var, state.channels_last(source), perm)
        merged = len(old) - len(new) + 1
        if len(new) > 2 and merged > 1 and prod(old[1 : 1 + merged]) == new[1] and old[1 + merged :] == new[2:]:
            perm = (0, *range(1 + merged, len(old)), *range(1, 1 + merged))
            return _reshaped(state, var, state.convert(source, perm), channels_last(len(new)))
        if len(new) == 2 and len(old) > 2:
            data = state.emitter.reshape(state.channels_last(source), new, var.name)
            return Stored(data, (0, 1), (old[1], prod(old[2:])))
    return Stored(state.emitter.reshape(state.plain(source), new, var.name), identity(var))


def _reshaped(state: LayoutState, var: Expr, data: Expr, perm: Perm) -> Stored:
    return Stored(state.emitter.reshape(data, permuted(shape_of(var), perm), var.name), perm)


def matmul(state: LayoutState, var: Expr, call: Expr) -> Stored:
    """A constant transposed weight stays an explicit transpose; behind a flattened image its columns are reordered."""
    data, weight = state.stored(call.args[0]), state.stored(call.args[1])
    if not (is_const(weight.expr) and len(weight.perm) == 2):
        return unknown(state, var, call)
    transposed = weight.perm == (1, 0)
    values: Any = weight.expr
    left = data.expr
    if data.flat is not None:
        array = array_of(values)
        values = make_const(_columns(array, data.flat) if transposed else _columns(array.T, data.flat).T)
    else:
        left = state.plain(call.args[0])
    right = state.emitter.emit(op.permute_dims(values, (1, 0)), f"{var.name}_weight") if transposed else values
    return Stored(state.emitter.emit(relax.Call(call.op, [left, right], call.attrs), var.name), identity(var))


def _columns(weight: np.ndarray, flat: tuple[int, int]) -> np.ndarray:
    """`weight [M, C S]` with its columns in the order `S C`."""
    m = weight.shape[0]
    return weight.reshape(m, *flat).transpose(0, 2, 1).reshape(m, -1)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(CONVS, conv),
    **{f"nn.conv{d}d_transpose": conv_transpose for d in (1, 2, 3)},
    **dict.fromkeys((*POOLS, *ADAPTIVE), pool),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(SOFTMAX, softmax),
    "image.resize2d": resize,
    "nn.prelu": prelu,
    "concat": concat,
    "split": split,
    "strided_slice": strided_slice,
    "nn.pad": pad,
    "permute_dims": permute,
    "reshape": reshape,
    "matmul": matmul,
}
