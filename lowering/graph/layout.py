"""Relax -> Relax: channels-first to channels-last, decided once and carried through the network."""

from __future__ import annotations

import tvm
from tvm import relax

from ._layout_ops import HANDLERS
from ._layout_state import LayoutState, Stored, identity
from ._module import extend_main
from ._rewrite import Emitter, Expr, Graph, is_tensor, substitute
from .lrn import lrn_primfunc, match_lrn


@tvm.transform.module_pass(opt_level=0, name="ConvertLayout")
class ConvertLayout:
    """Rewrite `main` from NCHW to NHWC (NCW to NWC, NCDHW to NDHWC); its inputs and outputs keep their layouts.

    Every value is stored as some permutation of the axes that the source means. Convolutions, pools and resizes ask for
    channels last; elementwise operators, reductions, concatenations, splits, slices, pads and softmax follow the layout
    of what they read; a `permute_dims` of the source only changes the bookkeeping; reshapes that keep, split or merge
    channels keep them last. A value is really permuted where something needs another order than the stored one, once,
    and not at all where only axes of size 1 move. Constants are transposed here. A flattened image in front of a fully
    connected layer stays in NHWC order, and the layer's constant weight gets its columns in that order instead.

    Transposed convolutions have no channels-last form in Relax that TVM can compile: they stand between two
    `permute_dims` that `GatherEpilogues` takes into the layer. Local response normalisation becomes one PrimFunc
    (`lowering.graph.lrn`).

    Invariant: expects `Canonicalize`; behind it every `nn.conv*d` has data layout N..C and kernel layout O..I.
    """

    def transform_module(self, mod: tvm.IRModule, ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """`mod` with `main` in channels-last layout. Raises ValueError where `main` is missing or no straight line."""
        del ctx
        return extend_main(mod, convert_layout)


def convert_layout(func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
    """`func` in channels-last layout; PrimFuncs that it calls are added to `builder`'s module. See `ConvertLayout`."""
    graph = Graph(func)
    state = LayoutState(graph, Emitter())
    for param in graph.params:
        state.store(param, Stored(param, identity(param)))
    for var, value in graph.bindings:
        state.store(var, _visit(state, builder, var, value))
    return state.emitter.finish(graph, [_output(state, o) for o in graph.outputs])


def _visit(state: LayoutState, builder: relax.BlockBuilder, var: Expr, value: Expr) -> Stored:
    if isinstance(value, relax.Tuple):
        return Stored(value, ())  # read through `graph.resolve`, never emitted
    if isinstance(value, relax.Var):
        return state.stored(value)
    if isinstance(value, relax.TupleGetItem):
        return _tuple_item(state, var, value)
    lrn = match_lrn(state.graph, value)
    if lrn is not None:
        callee = builder.add_func(lrn_primfunc(lrn), "lrn")
        data = state.channels_last(lrn.data)
        return Stored(state.emitter.emit(relax.call_tir(callee, [data], data.ty), var.name), state.cl_perm(lrn.data))
    handler = HANDLERS.get(str(value.op.name).removeprefix("relax.")) if isinstance(value.op, tvm.ir.Op) else None
    if handler is not None and is_tensor(value.args[0]) | isinstance(state.graph.resolve(value.args[0]), relax.Tuple):
        return handler(state, var, value)
    return Stored(state.emitter.emit(substitute(value, state.plain_or_tuple), var.name), identity(var))


def _tuple_item(state: LayoutState, var: Expr, value: Expr) -> Stored:
    source = state.graph.resolve(value.tuple_value)
    if isinstance(source, relax.Tuple):
        return state.stored(source.fields[value.index])
    stored = state.stored(source)
    item = state.emitter.emit(relax.TupleGetItem(stored.expr, value.index), var.name)
    return Stored(item, stored.perm or identity(var))


def _output(state: LayoutState, expr: Expr) -> Expr:
    return state.plain(expr) if is_tensor(expr) else state.stored(expr).expr
