"""Relax -> Relax: each layer and the arithmetic behind it become one private function."""

from __future__ import annotations

import re
from collections.abc import Sequence

import tvm
from tvm import relax

from ._epilogue_steps import next_step
from ._module import extend_main
from ._rewrite import (
    Emitter,
    Expr,
    Graph,
    build_function,
    int_list,
    is_const,
    is_tensor,
    op_name,
    reads,
    shape_of,
    substitute,
)

LAYER_ATTR = "gemmify.layer"
"""The attribute of a layer's function that holds the layer's name."""


@tvm.transform.module_pass(opt_level=0, name="GatherEpilogues")
class GatherEpilogues:
    """Move each convolution, transposed convolution and fully connected layer into a private function of its own,
    together with the run of operators behind it that each output element can go through in a register.

    The run: bias and factor by channel, addition and multiplication of a tensor of the output's shape that is computed
    elsewhere, relu, clip, leaky relu, sigmoid, tanh, silu, and hard-swish in the forms that exporters expand it to. It
    ends where a value is read twice or returned. Where two layers meet in one addition, the later layer takes it.
    Constants (weights, biases) live inside the function, activations are its parameters, and the attribute
    `gemmify.layer` holds the layer's name: that of the variable that its operator was bound to, made unique.

    Invariant: `main` holds no convolution and no product with a constant matrix outside these functions, and stays a
    DAG. Compare the fusion of epilogues in cuDNN (Chetlur et al. 2014, arXiv 1410.0759) and TVM's `FuseOps`, which
    this precedes.
    """

    def transform_module(self, mod: tvm.IRModule, ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """`mod` with the layers gathered. Raises ValueError where `main` is missing or holds control flow."""
        del ctx
        return extend_main(mod, gather_epilogues)


def gather_epilogues(func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
    """`func` with its layers moved to functions that are added to `builder`'s module; see `GatherEpilogues`."""
    graph, emitter = Graph(func), Emitter()
    regions = _regions(graph)
    ends = {region[-1]: (anchor, region) for anchor, region in regions.items()}
    inside = {var for region in regions.values() for var in region}
    names: set[str] = set()
    for var, value in graph.bindings:
        if var in ends:
            anchor, region = ends[var]
            name = _unique(anchor.name, names)
            layer, arguments = _layer_function(graph, anchor, region, name)
            callee = builder.add_func(layer, "layer_" + re.sub(r"\W", "_", name))
            call = relax.Call(callee, [emitter.lookup(a) for a in arguments])
            emitter.env[var] = emitter.emit(call, name)
        elif var not in inside:
            emitter.env[var] = emitter.default(var, value)
    return emitter.finish(graph, [emitter.lookup(o) for o in graph.outputs])


def is_layer(graph: Graph, value: Expr) -> bool:
    """Whether `value` is an operator that becomes a layer: a convolution, or a product with one constant matrix or the
    transpose of a matrix."""
    name = op_name(value)
    if name == "matmul":
        weight = value.args[1]
        return len(shape_of(weight)) == 2 and (is_const(weight) or is_transpose(graph.value(weight)))
    return name.startswith("nn.conv") and is_tensor(value.args[0])


def is_transpose(value: Expr) -> bool:
    """Whether `value` transposes a matrix."""
    return op_name(value) == "permute_dims" and (value.attrs.axes is None or int_list(value.attrs.axes) == [1, 0])


def inner_permutes(graph: Graph, anchor: Expr) -> list[Expr]:
    """The permutations in front of a layer that belong to it: a matrix's transpose, and the way into channels-first
    layout of a transposed convolution."""
    value = graph.defs[anchor]
    argument = value.args[1] if op_name(value) == "matmul" else value.args[0]
    wanted = op_name(value) == "matmul" or op_name(value).endswith("_transpose")
    return [argument] if wanted and op_name(graph.value(argument)) == "permute_dims" else []


def way_out(graph: Graph, anchor: Expr) -> Expr | None:
    """The permutation behind a transposed convolution that brings its result back to channels-last layout."""
    value = graph.defs[anchor]
    user = graph.single_user(anchor)
    if not op_name(value).endswith("_transpose") or op_name(graph.value(user)) != "permute_dims":
        return None
    rank = len(shape_of(anchor))
    return user if int_list(graph.defs[user].attrs.axes) == [0, *range(2, rank), 1] else None


def channel_axis(value: Expr) -> int:
    """The axis of a layer's output that its channels lie on, counted from the front; -1 for fully connected layers."""
    return -1 if op_name(value) == "matmul" else str(value.attrs.data_layout).index("C")


# Written out for every vector of a register tile, a second exponential of the first costs a minute of compilation.
EXPONENTIAL = ("sigmoid", "tanh", "silu")


def _regions(graph: Graph) -> dict[Expr, list[Expr]]:
    """For each layer the variables that its function takes: the layer itself and the run behind it, in order."""
    claimed: set[Expr] = set()
    regions: dict[Expr, list[Expr]] = {}
    for anchor, value in reversed(graph.bindings):
        if not is_layer(graph, value):
            continue
        region, axis = [anchor], channel_axis(value)
        if (out := way_out(graph, anchor)) is not None:
            region.append(out)
            axis = -1
        exponentials = 0
        while (step := next_step(graph, region[-1], axis)) is not None and claimed.isdisjoint(step.values):
            exponentials += step.kind in EXPONENTIAL
            if exponentials > 1:
                break
            region.extend(step.values)
        claimed.update(region)
        regions[anchor] = region
    return regions


def _layer_function(graph: Graph, anchor: Expr, region: Sequence[Expr], name: str) -> tuple[relax.Function, list[Expr]]:
    """The function of a region and the variables of `main` that it is called with: the layer's data first."""
    members = [*inner_permutes(graph, anchor), *region]
    order = {var: i for i, (var, _) in enumerate(graph.bindings)}
    members.sort(key=lambda v: order[v])
    # The layer's own operands come first, whatever else the run behind it reads.
    reading = [*inner_permutes(graph, anchor), *region]
    reading.sort(key=lambda v: (v not in inner_permutes(graph, anchor), order[v]))
    arguments: list[Expr] = []
    for var in reading:
        arguments.extend(r for r in reads(graph.defs[var]) if r not in members and r not in arguments)
    inner = {a: relax.Var(f"p{i}", a.ty) for i, a in enumerate(arguments)}
    bindings: list[tuple[Expr, Expr]] = []
    for var in members:
        fresh = relax.DataflowVar(var.name, var.ty)
        bindings.append((fresh, substitute(graph.defs[var], lambda v: inner.get(v, v))))
        inner[var] = fresh
    parameters = [inner[a] for a in arguments]
    attrs = {LAYER_ATTR: name}
    layer = build_function(parameters, bindings, [inner[region[-1]]], False, attrs, "layer", private=True)
    return layer, arguments


def _unique(name: str, taken: set[str]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    taken.add(candidate)
    return candidate
