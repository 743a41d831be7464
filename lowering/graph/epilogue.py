"""What a layer's function computes, in the terms of the lowerings: `describe_layer`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from tvm import relax

from ..epilogue import EpilogueOp
from ..problem import DTYPES, ConvProblem, DenseProblem, Problem, TransposedConvProblem
from ._epilogue_steps import next_step
from ._rewrite import Expr, Graph, array_of, dtype_of, int_list, is_const, is_tensor, op_name, shape_of
from .gather_epilogues import LAYER_ATTR, inner_permutes, is_layer, is_transpose, way_out

CHANNELS_LAST = ("NWC", "NHWC", "NDHWC")


@dataclass(frozen=True, eq=False)
class LayerSite:
    """A layer and its epilogue, as `GatherEpilogues` leaves it in a function.

    `data` is the index of the function's parameter that holds the activation, `[N, spatial..., C]` or `[..., C]`.
    `weight` is the constant as O, taps, I (`[M, C]` for a fully connected layer), or the index of a parameter of that
    layout. Entries of `operands` are vectors of length M in the layer's type, or indices of parameters of the output's
    shape.
    """

    name: str
    problem: Problem
    data: int
    weight: np.ndarray | int
    epilogue: tuple[EpilogueOp, ...]
    operands: tuple[np.ndarray | int, ...]
    out_shape: tuple[int, ...]
    out_dtype: str


@dataclass(frozen=True, eq=False)
class _Layer:
    problem: Problem
    data: Expr
    weight: Expr
    order: tuple[int, ...]
    """The order that brings the axes of `weight` to O, taps, I."""

    def constant_weight(self) -> np.ndarray:
        """A constant weight as O, taps, I. That of a transposed convolution has only M/g on its axis O and all of C on
        I, one group after the other."""
        array = array_of(self.weight).transpose(self.order)
        if not isinstance(self.problem, TransposedConvProblem) or self.problem.groups == 1:
            return array
        p = self.problem
        grouped = array.reshape(p.m_group, *p.kernel, p.groups, p.c_group)
        return np.moveaxis(grouped, -2, 0).reshape(p.m, *p.kernel, p.c_group)


def describe_layer(func: relax.Function) -> LayerSite | None:
    """The layer that `func` consists of, or None where it holds anything that the problems of `lowering.problem` and
    the epilogues of `lowering.epilogue` do not express (another layout, type or operator): it then stays Relax."""
    attrs = func.attrs or {}
    if LAYER_ATTR not in attrs:
        return None
    graph = Graph(func)
    anchors = [var for var, value in graph.bindings if is_layer(graph, value)]
    if len(anchors) != 1 or graph.multiple:
        return None
    anchor = anchors[0]
    layer = _problem(graph, anchor)
    if layer is None or layer.problem.dtype != dtype_of(anchor):
        return None
    run = _run(graph, anchor)
    index = {param: i for i, param in enumerate(graph.params)}
    if run is None or layer.data not in index or not (is_const(layer.weight) or layer.weight in index):
        return None
    weight: np.ndarray | int
    if is_const(layer.weight):
        weight = layer.constant_weight()
    elif layer.order == tuple(range(len(layer.order))):
        weight = index[layer.weight]
    else:
        return None
    epilogue: list[EpilogueOp] = []
    operands: list[np.ndarray | int] = []
    for kind, operand, params in run:
        epilogue.append(EpilogueOp(kind, None if operand is None else len(operands), params))
        if isinstance(operand, np.ndarray):
            operands.append(operand.astype(layer.problem.dtype))
        elif operand is not None:
            if operand not in index:
                return None
            operands.append(index[operand])
    out = graph.outputs[0]
    return LayerSite(
        str(attrs[LAYER_ATTR]),
        layer.problem,
        index[layer.data],
        weight,
        tuple(epilogue),
        tuple(operands),
        shape_of(out),
        dtype_of(out),
    )


def _run(graph: Graph, anchor: Expr) -> list[tuple[str, Expr, tuple[float, ...]]] | None:
    """The epilogue up to the function's output; None where a binding belongs neither to it nor to the layer."""
    covered = {anchor, *inner_permutes(graph, anchor)}
    current, steps = anchor, []
    if (out := way_out(graph, anchor)) is not None:
        current = out
        covered.add(out)
    while (step := next_step(graph, current, -1)) is not None:
        steps.append((step.kind, step.operand, step.params))
        covered.update(step.values)
        current = step.values[-1]
    complete = graph.is_output(current) and all(var in covered for var, _ in graph.bindings)
    return steps if complete else None


def _problem(graph: Graph, anchor: Expr) -> _Layer | None:
    value = graph.defs[anchor]
    if not all(is_tensor(a) and dtype_of(a) in DTYPES for a in (*value.args, anchor)):
        return None
    if dtype_of(value.args[0]) != dtype_of(value.args[1]):
        return None
    if op_name(value) == "matmul":
        return _dense(graph, value)
    return _transposed(graph, anchor) if op_name(value).endswith("_transpose") else _conv(value)


def _dense(graph: Graph, value: Expr) -> _Layer | None:
    data, weight = value.args
    order: tuple[int, ...] = (1, 0)
    if is_transpose(graph.value(weight)):
        weight, order = graph.defs[weight].args[0], (0, 1)
    shape = shape_of(data)
    m = shape_of(weight)[order[0]]
    return _Layer(DenseProblem(prod(shape[:-1]), shape[-1], m, dtype_of(data)), data, weight, order)


def _conv(value: Expr) -> _Layer | None:
    data, weight = value.args
    attrs = value.attrs
    layout, kernel = str(attrs.data_layout), str(attrs.kernel_layout)
    if layout not in CHANNELS_LAST or str(attrs.out_layout) not in ("", layout):
        return None
    n, *size, c = shape_of(data)
    order = tuple(kernel.index(letter) for letter in ("O", *layout[1:-1], "I"))
    m, *taps, _ = (shape_of(weight)[i] for i in order)
    dims, padding = len(size), int_list(attrs.padding)
    strides, dilation = int_list(attrs.strides), int_list(attrs.dilation)
    problem = ConvProblem(
        *(n, c, m, tuple(size), tuple(taps), tuple(strides)),
        *(tuple(padding[:dims]), tuple(padding[dims:]), tuple(dilation), int(attrs.groups), dtype_of(data)),
    )
    return _Layer(problem, data, weight, order)


def _transposed(graph: Graph, anchor: Expr) -> _Layer | None:
    value = graph.defs[anchor]
    attrs, weight = value.attrs, value.args[1]
    inside = graph.value(value.args[0])
    if str(attrs.data_layout)[:2] != "NC" or op_name(inside) != "permute_dims" or way_out(graph, anchor) is None:
        return None
    data = inside.args[0]
    n, c, *size = shape_of(value.args[0])
    if shape_of(data) != (n, *size, c) or int_list(inside.attrs.axes) != [0, len(size) + 1, *range(1, len(size) + 1)]:
        return None
    kernel, padding = str(attrs.kernel_layout), int_list(attrs.padding)
    order = tuple(kernel.index(letter) for letter in ("O", *str(attrs.data_layout)[2:], "I"))
    if not is_const(weight) or min(padding) < 0:
        return None
    taps = tuple(shape_of(weight)[i] for i in order[1:-1])
    dims, (_, m, *out) = len(size), shape_of(anchor)
    strides, dilation, extra = (tuple(int_list(a)) for a in (attrs.strides, attrs.dilation, attrs.output_padding))
    problem = TransposedConvProblem(
        *(n, c, m, tuple(size), taps, strides, tuple(padding[:dims]), tuple(padding[dims:])),
        *(dilation, extra, int(attrs.groups), dtype_of(data)),
    )
    return _Layer(problem, data, weight, order) if problem.out_size == tuple(out) else None
