"""A lowering as a plain TVM pass: unscheduled PrimFuncs that compute a layer -> the stages of that lowering.

    tvm.transform.Sequential([lowering.Im2col()])(mod)

Each function that `recognize` understands and the lowering applies to becomes, with the same parameters, name and
attributes:

    elementwise blocks before -> data in the lowering's layout -> weight as (M, *kernel, C/g) -> the lowering's stages
    -> output in the function's own layout -> elementwise blocks after

A layout change that changes nothing is left out; the weight is packed in the function, which knows no other time to do
it. Every other function is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import TYPE_CHECKING, Any

import tvm
from tvm import te, tirx

from .base import Reason, Tile, activation_shape, output_shape, weight_shape
from .match import BATCH, CHANNEL, Recognized, Role
from .problem import ConvProblem, Problem
from .raise_te import NotUnderstood, integer, raise_block, raise_value, shape_of, substitute
from .recognize import recognize

if TYPE_CHECKING:
    from .base import Lowering

SCHEDULED = "tirx.is_scheduled"
DEFAULT_TILE = Tile(4, 16)
"""The tile of a pass that was given none: it knows no target. 4 x 16 float32 fit 16 registers of 256 bits."""


def lower_module(lowering: Lowering, mod: tvm.IRModule) -> tvm.IRModule:
    """The module with every recognised, unscheduled PrimFunc rewritten; the rest is the same."""
    changed = {}
    for gv, func in mod.functions.items():
        if isinstance(func, tirx.PrimFunc) and not _is_scheduled(func):
            lowered = lower_func(lowering, func)
            if not isinstance(lowered, Reason):
                changed[gv] = lowered
    if not changed:
        return mod
    mod = mod.clone()
    for gv, func in changed.items():
        mod[gv] = func
    return mod


def _is_scheduled(func: tirx.PrimFunc) -> bool:
    return func.attrs is not None and bool(func.attrs.get(SCHEDULED, False))


def lower_func(lowering: Lowering, func: tirx.PrimFunc) -> tirx.PrimFunc | Reason:
    """`func` in the stages of `lowering`, or why not: it is not recognised, or the lowering, or a size fixed in
    it, does not apply."""
    found = recognize(func)
    if isinstance(found, Reason):
        return found
    if (reason := lowering.applicable(found.problem)) is not None:
        return reason
    if (reason := lowering.refuses(found.problem)) is not None:
        return reason
    try:
        lowered = _compose(lowering, func, found)
    except NotUnderstood as error:
        return Reason(str(error))
    return lowered if func.attrs is None else lowered.with_attrs(dict(func.attrs))


def pass_tile(lowering: Lowering, problem: Problem) -> Tile:
    """The tile of the pass for one problem: the lowering's own or the default, no larger than the GEMM itself."""
    axes = lowering.axes(problem)
    tile = lowering.tile or Tile(min(DEFAULT_TILE.mr, axes.inner), min(DEFAULT_TILE.nr, axes.n))
    mr = gcd(tile.mr, axes.inner) if axes.mr_divides else tile.mr
    return Tile(mr, gcd(tile.nr, axes.n) if axes.nr_divides else tile.nr)


def _compose(lowering: Lowering, func: tirx.PrimFunc, found: Recognized) -> tirx.PrimFunc:
    written = {block.buffer for block in found.blocks}
    tensors: dict[Any, te.Tensor] = {}
    for param in func.params:
        if param not in written:
            tensors[param] = te.placeholder(shape_of(param), str(param.dtype), name=str(param.name))
    for at, block in enumerate(found.blocks):
        tensor = _layer(lowering, found, tensors) if at == found.at else raise_block(block, tensors)
        tensors[block.buffer] = tensor
    lowered = te.create_prim_func([tensors[param] for param in func.params])
    # The parameters are the function's own buffers again, names included.
    own = dict(zip(lowered.params, func.params, strict=True))
    return tirx.PrimFunc(func.params, substitute(lowered.body, own), func.ret_type)


def _layer(lowering: Lowering, found: Recognized, tensors: dict[Any, te.Tensor]) -> te.Tensor:
    """The reduction in the lowering's stages, its output in the function's own shape."""
    problem = found.problem
    made = {"data": _data(lowering, found, tensors), "weight": _weight(found, tensors)}
    for stage in lowering.stages(problem, pass_tile(lowering, problem)):
        tensor = stage.compute(*(made[name] for name in stage.reads))
        made[stage.name] = tensor
    result = reshaped(tensor, output_shape(problem, lowering.layout))
    return _output(lowering, found, result)


def layout_roles(problem: Problem, layout: str) -> tuple[Role, ...]:
    """The roles of an activation's axes in a layout."""
    if not isinstance(problem, ConvProblem):
        return BATCH, CHANNEL
    dims = range(problem.dims)
    return (BATCH, CHANNEL, *dims) if layout == "NCHW" else (BATCH, *dims, CHANNEL)


def _data(lowering: Lowering, found: Recognized, tensors: dict[Any, te.Tensor]) -> te.Tensor:
    roles = layout_roles(found.problem, lowering.layout)
    if found.data not in tensors:
        raise NotUnderstood(f"reads {found.data.name} before it is written")
    data = tensors[found.data]
    if roles == found.data_roles:
        return data

    def element(*index: Any) -> Any:
        at = dict(zip(roles, index, strict=True))
        return data(*(at[role] for role in found.data_roles))

    return te.compute(activation_shape(found.problem, lowering.layout), element, name="data_layout")


def _weight(found: Recognized, tensors: dict[Any, te.Tensor]) -> te.Tensor:
    def element(*index: Any) -> Any:
        to = {var: i for var, i in zip(found.weight_vars, index, strict=True) if var is not None}
        return raise_value(found.weight, to, tensors)

    return te.compute(weight_shape(found.problem), element, name="weight_layout")


def _output(lowering: Lowering, found: Recognized, result: te.Tensor) -> te.Tensor:
    roles = layout_roles(found.problem, lowering.layout)
    buffer = found.blocks[found.at].buffer
    if roles == found.out_roles:
        return result

    def element(*index: Any) -> Any:
        at = {role: i for role, i in zip(found.out_roles, index, strict=True) if role is not None}
        return result(*(at.get(role, 0) for role in roles))

    return te.compute(shape_of(buffer), element, name=str(buffer.name))


def reshaped(tensor: te.Tensor, shape: Sequence[int]) -> te.Tensor:
    """The same elements in row-major order with another shape; index arithmetic only within axes that really change."""
    old = tuple(integer(extent) for extent in tensor.shape)
    if old == tuple(shape):
        return tensor
    assert prod(old) == prod(shape), f"a lowering wrote {old}, its problem says {tuple(shape)}"
    runs = _runs(old, tuple(shape))

    def element(*index: Any) -> Any:
        at: list[Any] = []
        rest = list(index)
        for old_run, new_run in runs:
            here, rest = rest[: len(new_run)], rest[len(new_run) :]
            at += _renumber(here, new_run, old_run)
        return tensor(*at)

    return te.compute(tuple(shape), element, name=f"{tensor.op.name}_shape")


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The two shapes cut into the shortest runs of axes of equal products."""
    runs = []
    while old or new:
        i, j = min(1, len(old)), min(1, len(new))
        while prod(old[:i]) != prod(new[:j]):
            if prod(old[:i]) < prod(new[:j]):
                i += 1
            else:
                j += 1
        runs.append((old[:i], new[:j]))
        old, new = old[i:], new[j:]
    return runs


def _renumber(index: Sequence[Any], shape: tuple[int, ...], to: tuple[int, ...]) -> list[Any]:
    """The index in a run of shape `to` of the element at `index` in a run of shape `shape`."""
    if len(shape) == len(to) == 1:
        return list(index)
    flat: Any = 0
    for i, extent in zip(index, shape, strict=True):
        flat = flat * extent + i
    out = []
    for axis in range(len(to)):
        below = prod(to[axis + 1 :])
        value = flat // below if below != 1 else flat
        out.append(value % to[axis] if axis else value)
    return out


__all__ = ["DEFAULT_TILE", "lower_func", "lower_module", "pass_tile", "reshaped"]
