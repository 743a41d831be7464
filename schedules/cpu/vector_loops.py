"""One innermost loop -> vectors: which loops are safe, and the code for a map and for a reduction."""

from __future__ import annotations

from typing import Any

from tvm import sym, tirx
from tvm.ir import Call, TensorLoad
from tvm.tirx import AllocBuffer, BufferLoad, BufferStore, ForKind, IfThenElse, IntImm, SeqStmt, Stmt, Var

from ..machine import Machine
from .conditions import branch_conditions, identity, reduction_operand, same_element
from .tir_tools import buffer_of, collect, flat_index, fresh, loop, renamed, sequence, stride_of, substitute, uses
from .vector_math import HEAVY_CALLS, op_name

# Vectors of a short loop that are written out side by side, so that accumulators can live in registers.
_UNROLL = 16
# Partial results of a reduction: enough to hide a latency of four cycles on two ports.
_PARTIALS = 8
_PURE_CALLS = HEAVY_CALLS | {
    f"tirx.{name}"
    for name in (
        *("if_then_else", "likely", "sqrt", "rsqrt", "floor", "ceil", "round", "trunc", "nearbyint", "fabs", "abs"),
        *("reinterpret", "isnan", "isinf", "isfinite", "shift_left", "shift_right", "bitwise_and", "bitwise_or"),
    )
}


def vector_loop(var: Var, extent: int, body: Stmt, machine: Machine, analyzer: sym.Analyzer) -> Stmt | None:
    """`for var in range(extent): body` in vectors; None where that is not known to be safe or worth it.

    `body` holds no loop. Every iteration must be independent of the others (or reduce into one element).
    """
    if not _straight(body, var):
        return None
    stores, loads = collect(body, BufferStore), collect(body, TensorLoad)
    lanes = min((machine.lanes(str(buffer_of(access).dtype)) for access in stores + loads), default=1)
    if lanes < 2 or not stores or any(str(buffer_of(access).dtype) == "bool" for access in stores + loads):
        return None
    strides = [_stride(store, var, analyzer) for store in stores]
    if len(stores) == 1 and strides[0] == 0 and isinstance(body, BufferStore):
        return _reduction(var, extent, body, lanes, analyzer)
    if any(stride != 1 for stride in strides) or not _independent(stores, loads):
        return None
    heavy = any(op_name(call) in HEAVY_CALLS for call in collect(body, Call))
    if not heavy and not _contiguous(loads, var, analyzer):
        return None
    return _map(var, extent, body, lanes)


def _straight(body: Stmt, var: Var) -> bool:
    """Only stores, under conditions that are the same for every lane, of values without side effects."""
    if isinstance(body, SeqStmt):
        return all(_straight(part, var) for part in body.seq)
    if isinstance(body, IfThenElse):
        sides = [side for side in (body.then_case, body.else_case) if side is not None]
        return not uses(body.condition, [var]) and all(_straight(side, var) for side in sides)
    if not isinstance(body, BufferStore):
        return False
    if any(uses(condition, [var]) for condition in branch_conditions(body)):
        return False
    return all(op_name(call) in _PURE_CALLS for call in collect(body, Call))


def _stride(access: TensorLoad | BufferStore, var: Var, analyzer: sym.Analyzer) -> int | None:
    index = flat_index(access)
    return None if index is None else stride_of(index, var, analyzer)


def _contiguous(loads: list[TensorLoad], var: Var, analyzer: sym.Analyzer) -> bool:
    """Every load takes consecutive elements, or the same one in all lanes."""
    return all(_stride(load, var, analyzer) in (0, 1) for load in loads)


def _independent(stores: list[BufferStore], loads: list[TensorLoad]) -> bool:
    """No iteration reads or overwrites what another one writes."""
    for store in stores:
        others = [access for access in stores + loads if buffer_of(access).same_as(store.buffer)]
        if not all(same_element(access, store) for access in others):
            return False
    return True


def _map(var: Var, extent: int, body: Stmt, lanes: int) -> Stmt | None:
    """Vectors of `lanes`, then the remainder in vectors of half as many, and so on; a last element alone."""
    parts = []
    start = 0
    width = lanes
    while start < extent:
        count = (extent - start) // width
        if count:
            parts.append(_vectors(var, start, count, width, body))
            start += count * width
        width //= 2
    return sequence(parts) if extent > 1 else None


def _vectors(var: Var, start: int, count: int, width: int, body: Stmt) -> Stmt:
    """`count` vectors of `width` lanes from iteration `start` on."""
    dtype = str(var.ty.dtype)
    outer, lane = fresh(var, "_v"), fresh(var, "_l")
    base: Any = IntImm(dtype, start)
    if count > 1:
        base = outer * IntImm(dtype, width) + base
    if width == 1:
        inside = substitute(renamed(body), {var: base})
    else:
        inside = loop(lane, width, ForKind.VECTORIZED, substitute(renamed(body), {var: base + lane}))
    if count == 1:
        return inside
    return loop(outer, count, ForKind.UNROLLED if count <= _UNROLL else ForKind.SERIAL, inside)


def _reduction(var: Var, extent: int, store: BufferStore, lanes: int, analyzer: sym.Analyzer) -> Stmt | None:
    """A reduction along the loop: partial results in vectors, folded to one element, then the remainder."""
    found = reduction_operand(store)
    count = extent // lanes
    if found is None or count < 2 or not _contiguous(collect(found[1], TensorLoad), var, analyzer):
        return None
    operator, operand = found
    partials = 1 << (min(_PARTIALS, count).bit_length() - 1)
    width = partials * lanes
    dtype = str(store.buffer.dtype)
    partial = tirx.decl_buffer([width], dtype, f"{store.buffer.name}_lanes", scope="local", data_alignment=64)

    def accumulate(slot: Any, at: Any) -> BufferStore:
        value = substitute(operand, {var: at})
        return BufferStore(partial, operator(BufferLoad(partial, [slot]), value), [slot])

    index, steps = str(var.ty.dtype), count // partials
    lane, first = fresh(var, "_i"), IntImm(index, 0)
    parts: list[Stmt] = [AllocBuffer(partial)]
    parts.append(_vectors(lane, 0, partials, lanes, BufferStore(partial, identity(operator, dtype), [lane])))
    outer, inner = fresh(var, "_o"), fresh(var, "_i")
    base: Any = outer * IntImm(index, width) if steps > 1 else first
    body = _vectors(inner, 0, partials, lanes, accumulate(inner, base + inner))
    parts.append(loop(outer, steps, ForKind.SERIAL, body) if steps > 1 else body)
    for left in range(steps * partials, count):
        inner = fresh(var, "_i")
        slot = inner + IntImm(index, left % partials * lanes)
        value = accumulate(slot, inner + IntImm(index, left * lanes))
        parts.append(_vectors(inner, 0, 1, lanes, value))
    parts += _fold(partial, operator, width, var)
    total = BufferLoad(partial, [first])
    parts.append(BufferStore(store.buffer, operator(_own(store), total), store.indices))
    if count * lanes < extent:
        last = fresh(var, "_r")
        rest = substitute(store, {var: last + IntImm(index, count * lanes)})
        parts.append(loop(last, extent - count * lanes, ForKind.SERIAL, rest))
    return SeqStmt(parts)


def _own(store: BufferStore) -> TensorLoad:
    return BufferLoad(store.buffer, store.indices)


def _fold(partial: Any, operator: type, width: int, like: Var) -> list[Stmt]:
    """partial[0] = all of them, by halves."""
    parts: list[Stmt] = []
    dtype = str(like.ty.dtype)
    half = width // 2
    while half:
        lane = fresh(like, "_h")
        value = operator(BufferLoad(partial, [lane]), BufferLoad(partial, [lane + IntImm(dtype, half)]))
        parts.append(_vectors(lane, 0, 1, half, BufferStore(partial, value, [lane])))
        half //= 2
    return parts
