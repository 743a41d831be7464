"""An unscheduled PrimFunc back to tensor expressions: its blocks as data, its elementwise blocks as `te.compute`.

`read_blocks` accepts what `te.create_prim_func` writes: serial loops around blocks that each write one whole buffer,
every block variable one loop. Anything else is a `Reason`. `evaluate` computes an index or a condition on a grid of
values, so that a claim about it can be checked for every point rather than by the form in which it was written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, te, tirx
from tvm.ir import prim

Var = tvm.ir.Var
Load = tvm.ir.expr.TensorLoad


class NotUnderstood(Exception):
    """An expression or a statement outside what this module reads; the text becomes a Reason."""


@dataclass(frozen=True, eq=False)
class Block:
    """One block: `buffer[spatial, in this order] = value`, or with `reduction` variables `buffer = init`, then `value`.

    `index` is the index as written; `spatial` holds one variable for each axis of the buffer. `extents` has every
    variable's extent; a variable of extent 1 that the store does not use has been replaced by 0.
    """

    buffer: Any
    index: tuple[Any, ...]
    spatial: tuple[Any, ...]
    reduction: tuple[Any, ...]
    extents: dict[Any, int]
    init: Any | None
    value: Any
    annotations: dict[str, Any]


def integer(expr: Any) -> int:
    """The value of a constant; NotUnderstood where it is symbolic."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, prim.IntImm):
        return int(expr.value)
    raise NotUnderstood(f"needs constant sizes, found {expr}")


def shape_of(buffer: Any) -> tuple[int, ...]:
    """The constant shape of a buffer."""
    return tuple(integer(extent) for extent in buffer.shape)


def variables(expr: Any) -> list[Any]:
    """The scalar variables of an expression, each once, in order."""
    found: dict[Any, None] = {}

    def visit(var: Any) -> None:
        if not isinstance(var.ty, tirx.buffer.BufferType):
            found[var] = None

    tvm_ffi.structural_walk(expr, (Var, visit))
    return list(found)


def substitute(expr: Any, values: Mapping[Any, Any]) -> Any:
    """`expr` with variables replaced, all at once."""
    return tvm_ffi.structural_map(expr, (Var, lambda var: values.get(var, var)))


def loads(expr: Any) -> list[Any]:
    """Every element read in an expression."""
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, (Load, found.append))
    return found


# --- reading the function --------------------------------------------------------------------------------------------


def read_blocks(func: tirx.PrimFunc) -> list[Block]:
    """The blocks of an unscheduled function in order; NotUnderstood where it is anything else."""
    for param in func.params:
        if not isinstance(param.ty, tirx.buffer.BufferType):
            raise NotUnderstood(f"needs tensors as its parameters, found the scalar {param.name}")
        _check_layout(param)
    root = func.body
    if not isinstance(root, s_tir.SBlockRealize) or root.block.iter_vars or root.block.match_buffers:
        raise NotUnderstood("needs a function as te.create_prim_func writes it, with one root block")
    for buffer in root.block.alloc_buffers:
        _check_layout(buffer)
    body = root.block.body
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    blocks = [_read_block(statement) for statement in statements]
    written: list[Any] = []
    for block in blocks:
        if any(block.buffer.same_as(w) for w in written):
            raise NotUnderstood(f"needs every buffer written by one block, {block.buffer.name} is written by two")
        written.append(block.buffer)
    return blocks


def _check_layout(buffer: Any) -> None:
    shape_of(buffer)
    if len(buffer.strides) or integer(buffer.elem_offset):
        raise NotUnderstood(f"needs compact row-major tensors, {buffer.name} has strides or an offset")
    if buffer.scope() not in ("", "global"):
        raise NotUnderstood(f"needs an unscheduled function, {buffer.name} is in {buffer.scope()} memory")


def _read_block(statement: Any) -> Block:
    loops: dict[Any, int] = {}
    while isinstance(statement, tirx.For):
        if statement.kind != tirx.ForKind.SERIAL or statement.thread_binding is not None or len(statement.annotations):
            raise NotUnderstood("needs an unscheduled function, found a loop that is not plain")
        if integer(statement.min) != 0 or (statement.step is not None and integer(statement.step) != 1):
            raise NotUnderstood("needs loops that count from 0 by 1")
        loops[statement.loop_var] = integer(statement.extent)
        statement = statement.body
    if not isinstance(statement, s_tir.SBlockRealize):
        raise NotUnderstood(f"needs loops around one block, found {type(statement).__name__}")
    block = statement.block
    if not isinstance(statement.predicate, prim.IntImm) or not integer(statement.predicate):
        raise NotUnderstood("needs blocks without a predicate")
    if len(block.alloc_buffers) or len(block.match_buffers):
        raise NotUnderstood("needs blocks without buffers of their own")
    if not isinstance(block.body, tirx.BufferStore):
        raise NotUnderstood(f"needs blocks that store one element, found {type(block.body).__name__}")
    extents, kinds = _read_iters(block.iter_vars, statement.iter_values, loops)
    return _make_block(block, extents, kinds)


def _read_iters(iters: Any, values: Any, loops: dict[Any, int]) -> tuple[dict[Any, int], dict[Any, int]]:
    """The extent and the kind of every block variable, each bound to a loop of its own."""
    extents: dict[Any, int] = {}
    kinds: dict[Any, int] = {}
    free = dict(loops)
    for iter_var, value in zip(iters, values, strict=True):
        extent = integer(iter_var.dom.extent)
        if integer(iter_var.dom.min) != 0:
            raise NotUnderstood("needs block variables that count from 0")
        constant = isinstance(value, prim.IntImm) and integer(value) == 0 and extent == 1
        if not constant and (not isinstance(value, Var) or free.pop(value, None) != extent):
            raise NotUnderstood("needs every block variable bound to one loop of its own extent")
        extents[iter_var.var], kinds[iter_var.var] = extent, int(iter_var.iter_type)
    if any(extent != 1 for extent in free.values()):
        raise NotUnderstood("needs every loop bound to a block variable")
    return extents, kinds


def _make_block(block: Any, extents: dict[Any, int], kinds: dict[Any, int]) -> Block:
    store = block.body
    shape = shape_of(store.buffer)
    spatial = _stored_at(store.indices, shape, extents)
    if any(kinds.get(var, tirx.IterVar.DataPar) != tirx.IterVar.DataPar for var in spatial):
        raise NotUnderstood("needs spatial block variables in the stored index")
    reduction = tuple(v for v, kind in kinds.items() if kind == tirx.IterVar.CommReduce)
    rest = [v for v in extents if v not in spatial and v not in reduction]
    if any(extents[v] != 1 for v in rest):
        raise NotUnderstood("needs every spatial variable in the stored index")
    if (block.init is None) != (not reduction):
        raise NotUnderstood("needs an init exactly where there is a reduction")
    init = None
    if block.init is not None:
        same = isinstance(block.init, tirx.BufferStore) and block.init.buffer.same_as(store.buffer)
        if not same or not same_index(block.init.indices, store.indices):
            raise NotUnderstood("needs an init that stores the element that the block updates")
        init = block.init.value
    zeros = {v: prim.IntImm("int32", 0) for v in rest}
    value = substitute(store.value, zeros) if zeros else store.value
    return Block(store.buffer, tuple(store.indices), spatial, reduction, extents, init, value, dict(block.annotations))


def _stored_at(indices: Any, shape: tuple[int, ...], extents: dict[Any, int]) -> tuple[Any, ...]:
    """The block variables of a store, which must cover the buffer element by element."""
    spatial: list[Any] = []
    for index, size in zip(indices, shape, strict=True):
        if isinstance(index, prim.IntImm) and size == 1 and integer(index) == 0:
            index = Var("unit", "int32")
            extents[index] = 1
        elif not isinstance(index, Var) or extents.get(index) != size or any(index.same_as(v) for v in spatial):
            raise NotUnderstood("needs blocks that write their whole buffer, one variable an axis")
        spatial.append(index)
    return tuple(spatial)


def same_index(left: Any, right: Any) -> bool:
    """Whether two indices are the same, element by element."""
    return len(left) == len(right) and all(tvm_ffi.structural_equal(a, b) for a, b in zip(left, right, strict=True))


# --- raising ---------------------------------------------------------------------------------------------------------


def raise_value(value: Any, variables_to: Mapping[Any, Any], tensors: Mapping[Any, te.Tensor]) -> Any:
    """`value` over te tensors: variables substituted, each element read from the tensor that stands for its buffer."""

    def read(load: Any) -> Any:
        if load.source not in tensors:
            raise NotUnderstood(f"reads {load.source.name} before it is written, or updates it in place")
        return tensors[load.source](*load.indices)

    raised = tvm_ffi.structural_map(substitute(value, variables_to), (Load, read))
    found: list[Any] = []
    tvm_ffi.structural_walk(raised, (Var, found.append))
    if left := [var for var in found if isinstance(var.ty, tirx.buffer.BufferType)]:
        raise NotUnderstood(f"uses the buffer {left[0].name} otherwise than by reading its elements")
    return raised


def raise_block(block: Block, tensors: Mapping[Any, te.Tensor]) -> te.Tensor:
    """An elementwise block (any block without a reduction) as a te.compute of the same shape and name."""
    if block.reduction:
        raise NotUnderstood(f"needs one reduction in the function, {block.buffer.name} is another")

    def element(*index: Any) -> Any:
        return raise_value(block.value, dict(zip(block.spatial, index, strict=True)), tensors)

    return te.compute(shape_of(block.buffer), element, name=str(block.buffer.name), attrs=block.annotations)


# --- evaluating ------------------------------------------------------------------------------------------------------

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    prim.Add: operator.add,
    prim.Sub: operator.sub,
    prim.Mul: operator.mul,
    prim.FloorDiv: np.floor_divide,
    prim.FloorMod: np.mod,
    prim.Min: np.minimum,
    prim.Max: np.maximum,
    prim.LT: np.less,
    prim.LE: np.less_equal,
    prim.GT: np.greater,
    prim.GE: np.greater_equal,
    prim.EQ: np.equal,
    prim.NE: np.not_equal,
    prim.And: np.logical_and,
    prim.Or: np.logical_or,
}


def evaluate(expr: Any, values: Mapping[Any, Any]) -> Any:
    """The value of an integer or boolean expression where its variables have `values` (integers or arrays)."""
    kind = type(expr)
    if isinstance(expr, int):
        return np.int64(expr)
    if kind is prim.IntImm:
        return np.int64(expr.value)
    if isinstance(expr, Var):
        if expr not in values:
            raise NotUnderstood(f"needs indices made of the block's variables, found {expr.name}")
        return values[expr]
    if kind in _BINARY:
        return _BINARY[kind](evaluate(expr.a, values), evaluate(expr.b, values))
    if kind is prim.Not:
        return np.logical_not(evaluate(expr.a, values))
    if (choice := as_choice(expr)) is not None:
        return np.where(*(evaluate(part, values) for part in choice))
    raise NotUnderstood(f"needs indices and conditions in plain integer arithmetic, found {expr}")


def as_choice(expr: Any) -> tuple[Any, Any, Any] | None:
    """(condition, value, otherwise) of an if_then_else or a Select, None for any other expression."""
    if isinstance(expr, prim.Select):
        return expr.condition, expr.true_value, expr.false_value
    if isinstance(expr, tvm.ir.Call) and getattr(expr.op, "name", "") in ("prim.if_then_else", "tirx.if_then_else"):
        return expr.args[0], expr.args[1], expr.args[2]
    return None


def grid(variables_: Iterable[Any], extents: Mapping[Any, int], limit: int = 1 << 24) -> dict[Any, Any]:
    """Every combination of the variables' values, as broadcastable arrays; NotUnderstood beyond `limit` points."""
    names = list(variables_)
    points = 1
    for var in names:
        if var not in extents:
            raise NotUnderstood(f"needs indices made of the block's variables, found {var.name}")
        points *= extents[var]
    if points > limit:
        raise NotUnderstood(f"has a condition over {points} points, more than can be checked one by one")
    axes = np.ix_(*(np.arange(extents[var]) for var in names)) if names else ()
    return dict(zip(names, axes, strict=True))
