"""A block of a PrimFunc as an equation, and what is asked of its expressions.

    buffer[indices(axes)] = value(axes)                                    all axes spatial
    buffer[indices(axes)] = init, then for every point of the reduction axes: = value(axes, buffer[...])

Kernels are written from equations: the axes are replaced by expressions of the thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Call, TensorLoad
from tvm.tirx import BufferLoad, BufferStore, IntImm, Var

from ..cpu.blocks import BlockInfo, root_blocks
from ..cpu.tir_tools import substitute
from ..cpu.vector_math import op_name

Condition = tuple[Any, ...]
MOST_ELEMENTS = 2**31
"""Kernels that are written from equations index with 32 bits."""


class NotAnEquation(ValueError):
    """A block that stores more than one element, through axes of another kind, has symbolic sizes, or touches a tensor
    that takes more than 32 bits to index."""


@dataclass(frozen=True, eq=False)
class Equation:
    """One block. `reduction` says of every axis whether it is one; `init` is None where none is."""

    name: str
    axes: tuple[Var, ...]
    extents: tuple[int, ...]
    reduction: tuple[bool, ...]
    buffer: Any
    indices: tuple[Any, ...]
    value: Any
    init: Any | None
    annotations: dict[str, Any] = field(default_factory=dict)

    @property
    def spatial(self) -> tuple[tuple[Var, int], ...]:
        return tuple((a, e) for a, e, r in zip(self.axes, self.extents, self.reduction, strict=True) if not r)

    @property
    def reduced(self) -> tuple[tuple[Var, int], ...]:
        return tuple((a, e) for a, e, r in zip(self.axes, self.extents, self.reduction, strict=True) if r)

    @property
    def points(self) -> int:
        """Elements that are computed."""
        return prod(extent for _, extent in self.spatial)

    @property
    def depth(self) -> int:
        """Terms of each sum."""
        return prod(extent for _, extent in self.reduced)

    @property
    def sources(self) -> list[Any]:
        """The buffers that it reads, without its own."""
        found: list[Any] = []
        for load in loads(self.value):
            if not load.source.same_as(self.buffer) and not any(load.source.same_as(f) for f in found):
                found.append(load.source)
        return found

    def reads(self, buffer: Any) -> list[TensorLoad]:
        """Its loads of `buffer`."""
        return [load for load in loads(self.value) if load.source.same_as(buffer)]

    def renamed(self) -> Equation:
        """The same equation over axes of its own."""
        new = {axis: Var(axis.name, "int32") for axis in self.axes}
        return replace(
            self,
            axes=tuple(new.values()),
            indices=tuple(substitute(i, new) for i in self.indices),
            value=substitute(self.value, new),
            init=None if self.init is None else substitute(self.init, new),
        )


def equation_of(block: BlockInfo) -> Equation:
    """The equation of a block; NotAnEquation where it is none."""
    body = block.node.body
    if not isinstance(body, BufferStore) or min(block.extents, default=1) < 0:
        raise NotAnEquation(f"{block.name} is no single store over constant sizes")
    if not (block.spatial or block.is_reduction):
        raise NotAnEquation(f"{block.name} has axes that are neither spatial nor of a reduction")
    found = Equation(
        block.name,
        tuple(it.var for it in block.iters),
        tuple(block.extents),
        tuple(int(it.iter_type) == 2 for it in block.iters),
        body.buffer,
        tuple(body.indices),
        body.value,
        block.node.init.value if block.node.init is not None else None,
        {str(k): v for k, v in block.node.annotations.items()},
    )
    for buffer in (found.buffer, *found.sources):
        if (size := prod(int(extent) for extent in buffer.shape)) >= MOST_ELEMENTS:
            raise NotAnEquation(f"{block.name} touches {buffer.name} of {size} elements, 32 bits index fewer")
    return found if all(str(axis.ty.dtype) == "int32" for axis in found.axes) else _in_32_bits(found)


def _in_32_bits(eq: Equation) -> Equation:
    """The equation over axes of 32 bits; what computes with the old ones gets them widened."""
    new = {axis: Var(axis.name, "int32") for axis in eq.axes}
    wide = {axis: var.astype(str(axis.ty.dtype)) for axis, var in new.items()}

    def at(index: Any) -> Any:
        return new[index] if isinstance(index, Var) and index in new else substitute(index, wide)

    def load(found: TensorLoad) -> Any:
        return BufferLoad(found.source, [at(index) for index in found.indices])

    return replace(
        eq,
        axes=tuple(new.values()),
        indices=tuple(at(index) for index in eq.indices),
        value=substitute(map_loads(eq.value, load), wide),
        init=None if eq.init is None else substitute(eq.init, wide),
    )


def equations_of(func: tirx.PrimFunc) -> list[Equation]:
    """The equations of all blocks of a function, in program order; NotAnEquation where one is none."""
    sch = s_tir.Schedule(func, error_render_level="none")
    return [equation_of(block) for block in root_blocks(sch)]


def loads(expr: Any) -> list[TensorLoad]:
    """Every load of an expression, those within indices too."""
    return [load for load, _ in guarded_loads(expr)]


def guarded_loads(expr: Any, conditions: Condition = ()) -> Iterator[tuple[TensorLoad, Condition]]:
    """Every load with the conditions under which it is evaluated."""
    if isinstance(expr, TensorLoad):
        yield expr, conditions
        for index in expr.indices:
            yield from guarded_loads(index, conditions)
    elif isinstance(expr, tirx.Select) or (isinstance(expr, Call) and op_name(expr) == "tirx.if_then_else"):
        test, yes, no = branches(expr)
        yield from guarded_loads(test, conditions)
        yield from guarded_loads(yes, (*conditions, test))
        yield from guarded_loads(no, (*conditions, tirx.Not(test)))
    else:
        for child in children(expr):
            yield from guarded_loads(child, conditions)


def branches(expr: Any) -> tuple[Any, Any, Any]:
    """(condition, value where it holds, value elsewhere) of a Select or if_then_else."""
    if isinstance(expr, tirx.Select):
        return expr.condition, expr.true_value, expr.false_value
    test, yes, no = expr.args
    return test, yes, no


def children(expr: Any) -> list[Any]:
    """The operands of an arithmetic expression."""
    if isinstance(expr, Call):
        return list(expr.args)
    if isinstance(expr, tirx.Cast):
        return [expr.value]
    if isinstance(expr, tirx.Let):
        return [expr.value, expr.body]
    return [getattr(expr, name) for name in ("a", "b") if hasattr(expr, name)]


def map_loads(expr: Any, change: Callable[[TensorLoad], Any]) -> Any:
    """`expr` with every load replaced by what `change` makes of it."""
    return tvm_ffi.structural_map(expr, (TensorLoad, change), order="post")


def same(a: Any, b: Any) -> bool:
    """Whether two expressions are written alike."""
    return bool(tvm_ffi.structural_equal(a, b))


def bits_of(dtype: Any) -> int:
    """Bits of an element in memory, at least 8."""
    return max(8, int(tvm.DataType(str(dtype)).bits))


def number(value: int) -> IntImm:
    """An index constant."""
    return IntImm("int32", value)


def load_of(buffer: Any, *indices: Any) -> Any:
    """`buffer[indices]`."""
    return BufferLoad(buffer, [number(i) if isinstance(i, int) else i for i in indices])


def narrowed(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with index arithmetic in 32 bits, where it can be; its attributes as before."""
    given = func.attrs.get("global_symbol") if func.attrs else None
    try:
        mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        result = tirx.transform.ForceNarrowIndexToInt32()(mod)["main"]
    except (tvm.error.InternalError, ValueError, RuntimeError):
        return func
    return result.with_attr("global_symbol", str(given)) if given else result.without_attr("global_symbol")
