"""Relax -> Relax: factors and offsets by channel move into the constant weights of the layer beside them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

from ._module import rewrite_main
from ._rewrite import (
    Emitter,
    Expr,
    Graph,
    array_of,
    channel_vector,
    dtype_of,
    int_list,
    is_const,
    make_const,
    op_name,
    shape_of,
)


@tvm.transform.module_pass(opt_level=0, name="FoldBatchNorm")
class FoldBatchNorm:
    """Fold multiplications and additions by channel into convolutions and fully connected layers with constant weights.

    Behind a layer: `s (W x + b) + t = (s W) x + (s b + t)`, through any chain in which each value is read once.
    Before a layer: `W (s x + t) = (W s) x + W t`, where everything that reads `s x + t` is such a layer; the offset
    only where the layer pads nothing, because padding is zero after the offset, not before (Jacob et al. 2018, arXiv
    1712.05877, section 3.2, has the first form). The arithmetic is float64, rounded once to the weight's type.

    Invariant: expects `Canonicalize`; behind it at most one addition by channel follows each layer with constant weight
    directly. Layers keep their names. What does not fold stays arithmetic.
    """

    def transform_module(self, mod: tvm.IRModule, ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """`mod` with `main` folded. Raises ValueError where `main` is missing or holds control flow."""
        del ctx
        return rewrite_main(mod, fold_batch_norm)


def fold_batch_norm(func: relax.Function) -> relax.Function:
    """`func` folded; see `FoldBatchNorm`."""
    func = _fold_behind(func)
    before = _fold_before(func)
    # Offsets that came from before a layer are additions behind it now, and meet the ones that were there.
    return func if before is None else _fold_behind(before)


@dataclass(frozen=True)
class Weight:
    """Where a layer's constant weight has its channels: `out_axis` of M (M/g for transposed convolutions) and
    `in_axis` of C/g (C for transposed ones); `channel_axis` is the channel axis of the layer's activations."""

    const: Expr
    out_axis: int
    in_axis: int
    channel_axis: int
    groups: int
    transposed: bool
    through: Expr = None
    """The variable of `permute_dims(W)`, where a fully connected layer reads its weight through one."""


def layer_weight(graph: Graph, call: Expr) -> Weight | None:
    """The constant weight of a convolution, transposed convolution or fully connected layer; None for anything else."""
    name = op_name(call)
    if name == "matmul":
        weight = call.args[1]
        inner = graph.value(weight)
        if is_const(weight) and len(shape_of(weight)) == 2:
            return Weight(weight, 1, 0, -1, 1, False)
        if op_name(inner) == "permute_dims" and is_const(inner.args[0]) and len(shape_of(weight)) == 2:
            return Weight(inner.args[0], 0, 1, -1, 1, False, weight)
        return None
    if not name.startswith("nn.conv") or not is_const(call.args[1]):
        return None
    attrs = call.attrs
    kernel, data = str(attrs.kernel_layout), str(attrs.data_layout)
    transposed = name.endswith("_transpose")
    return Weight(call.args[1], kernel.index("O"), kernel.index("I"), data.index("C"), int(attrs.groups), transposed)


def _scaled(weight: Weight, factors: np.ndarray, axis: int) -> Expr:
    values = array_of(weight.const)
    shape = [1] * values.ndim
    shape[axis] = -1
    return make_const(values.astype("float64") * factors.reshape(shape), dtype_of(weight.const))


def _scale_outputs(weight: Weight, factors: np.ndarray) -> Expr:
    """The weight whose layer's output channel `m` is `factors[m]` times as large."""
    if not (weight.transposed and weight.groups > 1):
        return _scaled(weight, factors, weight.out_axis)
    # A transposed convolution keeps C = g C/g on the input axis and only M/g on the output axis: each group of rows
    # has its own factors.
    values = np.moveaxis(array_of(weight.const).astype("float64"), (weight.in_axis, weight.out_axis), (0, 1))
    grouped = values.reshape(weight.groups, -1, *values.shape[1:])
    grouped = grouped * factors.reshape(weight.groups, 1, values.shape[1], *[1] * (values.ndim - 2))
    result = np.moveaxis(grouped.reshape(values.shape), (0, 1), (weight.in_axis, weight.out_axis))
    return make_const(result, dtype_of(weight.const))


def _by_group(weight: Weight, vector: np.ndarray) -> np.ndarray:
    """`vector[c]` of the input channels as `[M, C/g]`: the part that each output channel sees."""
    m = array_of(weight.const).shape[weight.out_axis]
    return np.repeat(vector.reshape(weight.groups, -1), m // weight.groups, axis=0)


def _scale_inputs(weight: Weight, factors: np.ndarray) -> Expr:
    """The weight of a layer that sees input channel `c` `factors[c]` times as large."""
    if weight.transposed or weight.groups == 1:
        return _scaled(weight, factors, weight.in_axis)
    values = np.moveaxis(array_of(weight.const).astype("float64"), (weight.out_axis, weight.in_axis), (0, 1))
    values = values * _by_group(weight, factors).reshape(*values.shape[:2], *[1] * (values.ndim - 2))
    return make_const(np.moveaxis(values, (0, 1), (weight.out_axis, weight.in_axis)), dtype_of(weight.const))


def _offset_outputs(weight: Weight, offset: np.ndarray) -> np.ndarray:
    """What an offset of the input channels adds to each output channel of a layer without padding."""
    values = np.moveaxis(array_of(weight.const).astype("float64"), (weight.out_axis, weight.in_axis), (0, 1))
    taps = values.reshape(*values.shape[:2], -1).sum(-1)
    return (taps * _by_group(weight, offset)).sum(1)


def with_weight(emitter: Emitter, call: Expr, weight: Weight, const: Expr, data: Expr) -> Expr:
    """`call` on `data` with `const` in the place of its weight; through a transpose where there was one."""
    if weight.through is not None:
        const = emitter.emit(op.permute_dims(const, [1, 0]), weight.through.name)
    return relax.Call(call.op, [data, const], call.attrs, call.ty_args)


def _affine_step(graph: Graph, var: Expr, source: Expr, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """`(s, t)` where `var = s source + t` by channel of `axis`, else None."""
    value = graph.value(var)
    name = op_name(value)
    if name not in ("multiply", "add") or not value.args[0].same_as(source) or shape_of(var) != shape_of(source):
        return None
    vector = channel_vector(value.args[1], shape_of(source), axis)
    if vector is None or dtype_of(var) not in ("float16", "float32", "float64"):
        return None
    zero, one = np.zeros_like(vector), np.ones_like(vector)
    return (vector, zero) if name == "multiply" else (one, vector)


def _chain(graph: Graph, var: Expr, axis: int) -> tuple[Expr, np.ndarray, np.ndarray, int]:
    """The end of the run of affine steps behind `var`, with their joint factor and offset, and their number."""
    channels = shape_of(var)[axis]
    scale, shift, steps = np.ones(channels), np.zeros(channels), 0
    while (user := graph.single_user(var)) is not None:
        step = _affine_step(graph, user, var, axis)
        if step is None:
            break
        scale, shift = scale * step[0], shift * step[0] + step[1]
        var, steps = user, steps + 1
    return var, scale, shift, steps


def _fold_behind(func: relax.Function) -> relax.Function:
    graph, emitter = Graph(func), Emitter()
    ends: dict[Expr, tuple[Expr, Weight, np.ndarray, np.ndarray]] = {}
    for var, value in graph.bindings:
        weight = layer_weight(graph, value)
        if weight is None:
            continue
        end, scale, shift, steps = _chain(graph, var, weight.channel_axis)
        if steps > 1 or (steps == 1 and not np.all(scale == 1)):
            ends[end] = (var, weight, scale, shift)
    for var, value in graph.bindings:
        if var not in ends:
            emitter.env[var] = emitter.default(var, value)
            continue
        anchor, weight, scale, shift = ends[var]
        call = emitter.normalized(graph.defs[anchor])
        const = weight.const if np.all(scale == 1) else _scale_outputs(weight, scale)
        layer = emitter.emit(with_weight(emitter, call, weight, const, call.args[0]), anchor.name)
        emitter.env[var] = _add_offset(emitter, layer, shift, weight.channel_axis, var.name)
    return emitter.finish(graph, [emitter.lookup(o) for o in graph.outputs])


def _add_offset(emitter: Emitter, layer: Expr, shift: np.ndarray, axis: int, name: str) -> Expr:
    if not np.any(shift):
        return layer
    rank = len(shape_of(layer))
    shape = (-1,) + (1,) * (rank - 1 - axis % rank)
    return emitter.emit(op.add(layer, make_const(shift.reshape(shape), dtype_of(layer))), name)


def _leading(graph: Graph, data: Expr, axis: int) -> tuple[Expr, np.ndarray, np.ndarray] | None:
    """`(x, s, t)` where `data = s x + t` by channel, through as many steps as there are that nobody else reads."""
    channels = shape_of(data)[axis]
    scale, shift, source = np.ones(channels), np.zeros(channels), data
    while (value := graph.value(source)) is not None and op_name(value) in ("multiply", "add"):
        step = _affine_step(graph, source, value.args[0], axis)
        if step is None or (source is not data and graph.single_user(source) is None):
            break
        shift, scale = shift + scale * step[1], scale * step[0]
        source = value.args[0]
    # A lone offset behind another layer is that layer's bias already, and costs nothing there.
    is_bias = layer_weight(graph, graph.value(source)) is not None and graph.single_user(source) is not None
    return None if source is data or is_bias else (source, scale, shift)


def _accepts(graph: Graph, user: Expr, data: Expr, shift: np.ndarray) -> bool:
    """Whether `user` is a layer that can take the factor and offset of its input `data` into its weight."""
    value = graph.defs[user]
    weight = layer_weight(graph, value)
    if weight is None or not value.args[0].same_as(data):
        return False
    padded = op_name(value) != "matmul" and any(int_list(value.attrs.padding))
    return not np.any(shift) or not (padded or weight.transposed)


def _fold_before(func: relax.Function) -> relax.Function | None:
    """`func` with factors and offsets before layers folded, or None where there are none."""
    graph, emitter, folded = Graph(func), Emitter(), False
    for var, value in graph.bindings:
        weight = layer_weight(graph, value)
        data = value.args[0] if weight is not None else None
        found = _leading(graph, data, weight.channel_axis) if weight is not None and data in graph.defs else None
        users = graph.users.get(data, []) if found is not None else []
        if weight is None or found is None or graph.is_output(data):
            emitter.env[var] = emitter.default(var, value)
            continue
        source, scale, shift = found
        if not all(_accepts(graph, user, data, shift) for user in users):
            emitter.env[var] = emitter.default(var, value)
            continue
        call = emitter.normalized(value)
        const = _scale_inputs(weight, scale)
        layer = emitter.emit(with_weight(emitter, call, weight, const, emitter.lookup(source)), var.name)
        offset = _offset_outputs(weight, shift) if np.any(shift) else np.zeros(1)
        emitter.env[var] = _add_offset(emitter, layer, offset, weight.channel_axis, f"{var.name}_offset")
        folded = True
    return emitter.finish(graph, [emitter.lookup(o) for o in graph.outputs]) if folded else None
