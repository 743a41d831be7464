"""A GEMM in block-level TIR, read as a contraction: what is batch, m, n and k, and how each operand is addressed.

    acc[b..., m..., n...] = sum over k... of A(b, m, k) B(b, n, k)
    out[index(b, m, n)]   = value(acc, b, m, n)

The block that carries `gemmify.axes` gives the first line, the block that reads it the second. An axis belongs to the
operands whose elements depend on it: batch where both do, m where A alone does, n where B alone does. Axes of one
element disappear, and neighbouring axes through which every access moves as through one become one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlock
from tvm.tirx import BufferStore, PrimFunc, Var

from ..cpu.blocks import REDUCTION
from ..cpu.gemm_knobs import AXES_ANNOTATION
from ..cpu.tir_tools import collect, constant, flat_index, substitute, uses
from .affine import stride_in, terms
from .flat import FlatViews

HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of the contraction: the variable that stands for it in all expressions, and its extent."""

    var: Var
    extent: int


@dataclass(frozen=True, eq=False)
class Operand:
    """One element of an operand as an expression over the axes, of the `dtype` in which it is multiplied.

    `load` is the one load that the element is, a flat one, where it is that and no more, `inside` the conditions under
    which it is read, all of which must hold; the element is 0 elsewhere.
    """

    value: Any
    dtype: str
    load: TensorLoad | None = None
    inside: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Result:
    """What is stored for an element of the accumulator `acc`: `value` at flat `index` of the parameter `buffer`."""

    buffer: Var
    index: Any
    value: Any
    acc: Var


@dataclass(frozen=True, eq=False)
class Contraction:
    """The GEMM of a function. All loads are flat ones; `dtype` is that of the sums."""

    batch: tuple[Axis, ...]
    m: tuple[Axis, ...]
    n: tuple[Axis, ...]
    k: tuple[Axis, ...]
    a: Operand
    b: Operand
    result: Result
    dtype: str
    views: FlatViews

    def size(self, letter: str) -> int:
        """The product of the extents of `batch`, `m`, `n` or `k`."""
        return prod(axis.extent for axis in getattr(self, letter))

    @property
    def operand(self) -> str:
        """The dtype in which both operands are multiplied."""
        return self.a.dtype


def contraction_of(func: PrimFunc) -> Contraction | str:
    """The contraction that `func` is, or a clause that says why it is none.

    `func` holds the accumulating block and at most one block that reads it and writes the output.
    """
    blocks = [block for block in collect(func.body, SBlock) if block.iter_vars]
    found = [block for block in blocks if AXES_ANNOTATION in block.annotations]
    if len(found) != 1 or len(blocks) > 2:
        return f"it has {len(blocks)} blocks, {len(found)} of them a GEMM"
    gemm = found[0]
    consumer = next((block for block in blocks if block is not gemm), None)
    factors, renamed = _factors(gemm), _renaming(gemm, consumer)
    if isinstance(factors, str) or isinstance(renamed, str):
        return factors if isinstance(factors, str) else str(renamed)
    views = FlatViews()
    units = {it.var: _zero(it.var) for it in gemm.iter_vars if constant(it.dom.extent) == 1}
    units |= {axis.var: _zero(axis.var) for axes in renamed.parts.values() for axis in axes if axis.extent == 1}
    values = (substitute(substitute(value, renamed.of_gemm), units) for value in factors)
    a, b = (_operand(value, views) for value in values)
    if a is None or b is None:
        return "an index of an operand is not understood"
    result = _result(gemm, consumer, func, renamed, views)
    if isinstance(result, str):
        return result
    result = replace(result, index=substitute(result.index, units), value=substitute(result.value, units))
    common = a.dtype if a.dtype == b.dtype else str(gemm.body.value.ty.dtype)
    a, b = _widened(a, common), _widened(b, common)
    return _merged(_classified(gemm, renamed, a, b, result, views))


@dataclass(frozen=True, eq=False)
class _Renaming:
    """The axes of the GEMM and of the block that reads it as one: `of_consumer` gives the latter's in terms of the
    former's; an axis of the GEMM that the reader sees as several is replaced by those (`of_gemm`, `parts`)."""

    of_consumer: dict[Var, Any]
    of_gemm: dict[Var, Any]
    parts: dict[Var, tuple[Axis, ...]]


def _zero(var: Var) -> Any:
    return tirx.const(0, str(var.ty.dtype))


def _factors(gemm: SBlock) -> tuple[Any, Any] | str:
    """A and B of the block `acc = acc + A B`."""
    store = gemm.body
    if not isinstance(store, BufferStore) or gemm.init is None or not isinstance(store.value, tirx.Add):
        return "the block does not add up products"
    if any(constant(it.dom.extent) is None for it in gemm.iter_vars):
        return "an extent is not a constant"
    sides = (store.value.a, store.value.b)
    product = next((s for s in sides if not (isinstance(s, TensorLoad) and s.source.same_as(store.buffer))), None)
    if not isinstance(product, tirx.Mul) or sum(s is product for s in sides) != 1:
        return "the block does not add up products of two factors"
    return product.a, product.b


def _operand(value: Any, views: FlatViews) -> Operand | None:
    """An operand from its expression, which may widen what is stored in half precision."""
    flat = _flattened(value, views)
    if flat is None:
        return None
    narrow = _narrowed(flat)
    value = flat if narrow is None else narrow
    conditions, core = _conditions(value)
    return Operand(value, str(value.ty.dtype), core if isinstance(core, TensorLoad) else None, tuple(conditions))


def _flattened(value: Any, views: FlatViews) -> Any | None:
    """The expression with every load a load of one flat index; None where a buffer has strides or symbolic sizes."""
    failed: list[Any] = []

    def flatten(load: TensorLoad) -> Any:
        index = flat_index(load)
        if index is None:
            failed.append(load)
            return load
        return views.load(load.source, index)

    result = tvm_ffi.structural_map(value, (TensorLoad, flatten), order="post")
    return None if failed else result


def _narrowed(value: Any) -> Any | None:
    """The same element in half precision, where it is nothing but a half that was widened, or 0."""
    if isinstance(value, tirx.Cast):
        inner = value.value
        return inner if str(inner.ty.dtype) in HALVES else None
    condition = _condition_of(value)
    if condition is None:
        return None
    inside = _narrowed(value.args[1])
    if inside is None or constant_zero(value.args[2]) is None:
        return None
    return tirx.if_then_else(condition, inside, tirx.const(0, str(inside.ty.dtype)))


def constant_zero(value: Any) -> Any | None:
    """`value` where it is the constant 0, else None."""
    found = getattr(value, "value", None)
    return value if isinstance(value, tirx.FloatImm | tirx.IntImm) and found == 0 else None


def _condition_of(value: Any) -> Any | None:
    """The condition of an `if_then_else`, else None."""
    name = str(getattr(getattr(value, "op", None), "name", ""))
    return value.args[0] if name.endswith("if_then_else") else None


def _conditions(value: Any) -> tuple[list[Any], Any]:
    """The conditions under which `value` is not 0, and what it is then."""
    found: list[Any] = []
    while (condition := _condition_of(value)) is not None and constant_zero(value.args[2]) is not None:
        found += conjuncts(condition)
        value = value.args[1]
    return found, value


def conjuncts(condition: Any) -> list[Any]:
    """The parts of a condition all of which must hold."""
    if isinstance(condition, tirx.And):
        return [*conjuncts(condition.a), *conjuncts(condition.b)]
    return [condition]


def _widened(operand: Operand, dtype: str) -> Operand:
    """The operand multiplied in `dtype`: what is stored otherwise is converted, element by element."""
    if operand.dtype == dtype:
        return operand
    return Operand(operand.value.astype(dtype), dtype)


def _result(
    gemm: SBlock, consumer: SBlock | None, func: PrimFunc, renamed: _Renaming, views: FlatViews
) -> Result | str:
    """What becomes of an element of the accumulator, over the axes of the contraction."""
    made, dtype = gemm.body.buffer, str(gemm.body.value.ty.dtype)
    acc = Var("acc", dtype)
    if consumer is None:
        index = flat_index(gemm.body)
        return "the accumulator has no plain layout" if index is None else Result(made, index, acc, acc)
    store = consumer.body
    if not any(param.same_as(store.buffer) for param in func.params):
        return "what follows the GEMM stores no output"
    replaced = tvm_ffi.structural_map(
        store.value, (TensorLoad, lambda load: acc if load.source.same_as(made) else load), order="post"
    )
    value, index = _flattened(replaced, views), flat_index(store)
    if value is None or index is None:
        return "an index of the output is not understood"
    return Result(store.buffer, substitute(index, renamed.of_consumer), substitute(value, renamed.of_consumer), acc)


def _renaming(gemm: SBlock, consumer: SBlock | None) -> _Renaming | str:
    """The axes of both blocks as one; every element of the GEMM must be read exactly once."""
    renamed = _Renaming({}, {}, {})
    if consumer is None:
        return renamed
    store, made = consumer.body, gemm.body.buffer
    if not isinstance(store, BufferStore):
        return "what follows the GEMM does not store one element"
    loads = [load for load in collect(store.value, TensorLoad) if load.source.same_as(made)]
    if not loads or any(not tvm_ffi.structural_equal(load, loads[0]) for load in loads):
        return "what follows the GEMM does not read one element of it"
    extents = {it.var: constant(it.dom.extent) for it in consumer.iter_vars}
    own = {it.var: constant(it.dom.extent) for it in gemm.iter_vars}
    for written, read in zip(gemm.body.indices, loads[0].indices, strict=True):
        if constant(read) == 0 and own.get(written) == 1:
            continue
        axes = _mixed_radix(read, extents)
        size = prod(axis.extent for axis in axes)
        if written not in own or not axes or size != own[written] or any(a.var in renamed.of_consumer for a in axes):
            return "what follows the GEMM does not read it element by element"
        if len(axes) == 1:
            renamed.of_consumer[axes[0].var] = written
            continue
        renamed.of_consumer.update({axis.var: axis.var for axis in axes})
        renamed.of_gemm[written], renamed.parts[written] = read, axes
    for var, extent in extents.items():
        if var not in renamed.of_consumer:
            if extent != 1:
                return "what follows the GEMM reads an element of it more than once"
            renamed.of_consumer[var] = _zero(var)
    return renamed


def _mixed_radix(read: Any, extents: dict[Var, int | None]) -> tuple[Axis, ...]:
    """The axes, slowest first, of which `read` is the flat position; () where it is none of the kind."""
    parts = sorted(terms(read), key=lambda part: -part[0])
    axes: list[Axis] = []
    step = 1
    for factor, var in reversed(parts):
        extent = extents.get(var) if isinstance(var, Var) else None
        if extent is None or factor != step:
            return ()
        axes.append(Axis(var, extent))
        step *= extent
    return tuple(reversed(axes))


def _classified(
    gemm: SBlock, renamed: _Renaming, a: Operand, b: Operand, result: Result, views: FlatViews
) -> Contraction:
    groups: dict[str, list[Axis]] = {"batch": [], "m": [], "n": [], "k": []}
    for it in gemm.iter_vars:
        extent = constant(it.dom.extent)
        assert extent is not None, "checked by _factors"
        for axis in renamed.parts.get(it.var, (Axis(it.var, extent),)):
            if axis.extent > 1:
                in_a, in_b = uses(a.value, [axis.var]), uses(b.value, [axis.var])
                spatial = "batch" if in_a and in_b else "n" if in_b else "m"
                groups["k" if int(it.iter_type) == REDUCTION else spatial].append(axis)
    dtype = str(gemm.body.value.ty.dtype)
    named = {key: tuple(axes) for key, axes in groups.items()}
    return Contraction(**named, a=a, b=b, result=result, dtype=dtype, views=views)


def _expressions(found: Contraction) -> list[Any]:
    return [found.a.value, found.b.value, *found.a.inside, found.result.index, found.result.value]


def _merged(found: Contraction) -> Contraction:
    """Neighbouring axes of one kind made one, where every flat index moves through both as through one."""
    analyzer = sym.Analyzer()
    for letter in ("batch", "m", "n", "k"):
        axes = list(getattr(found, letter))
        place = len(axes) - 2
        while place >= 0:
            outer, inner = axes[place], axes[place + 1]
            if _as_one(_expressions(found), outer, inner, analyzer):
                axes[place : place + 2] = [Axis(inner.var, outer.extent * inner.extent)]
                found = _without(found, outer.var)
            place -= 1
        found = _with_axes(found, letter, tuple(axes))
    return found


def _with_axes(found: Contraction, letter: str, axes: tuple[Axis, ...]) -> Contraction:
    changed: dict[str, Any] = {letter: axes}
    return replace(found, **changed)


def _without(found: Contraction, var: Var) -> Contraction:
    """The contraction with an axis at 0; the one beside it counts for both."""
    zero = {var: _zero(var)}

    def cut(operand: Operand) -> Operand:
        load = None if operand.load is None else substitute(operand.load, zero)
        return Operand(substitute(operand.value, zero), operand.dtype, load, operand.inside)

    result = found.result
    result = replace(result, index=substitute(result.index, zero), value=substitute(result.value, zero))
    return replace(found, a=cut(found.a), b=cut(found.b), result=result)


def _as_one(expressions: Iterable[Any], outer: Axis, inner: Axis, analyzer: sym.Analyzer) -> bool:
    """Whether the two axes occur in flat indices alone, and there as `outer * extent(inner) + inner`."""
    both = [outer.var, inner.var]
    for expression in expressions:
        for index in _indices(expression, both):
            if index is None:
                return False
            far, near = stride_in(index, outer.var, analyzer), stride_in(index, inner.var, analyzer)
            if far is None or near is None or far != near * inner.extent:
                return False
    return True


def _indices(expression: Any, variables: list[Var]) -> list[Any | None]:
    """The flat indices of an expression in which the variables occur; None among them where one occurs elsewhere."""
    if not uses(expression, variables):
        return []
    if str(expression.ty.dtype).startswith("int") and not isinstance(expression, TensorLoad):
        return [expression]
    loads = [load for load in collect(expression, TensorLoad) if uses(load, variables)]
    found: list[Any | None] = [load.indices[0] for load in loads]
    holes = {load: tirx.const(0, str(load.ty.dtype)) for load in loads}
    rest = tvm_ffi.structural_map(expression, (TensorLoad, lambda load: _hole(load, holes)), order="pre")
    return [*found, None] if uses(rest, variables) else found


def _hole(load: TensorLoad, holes: dict[TensorLoad, Any]) -> Any:
    return next((value for known, value in holes.items() if known.same_as(load)), load)
