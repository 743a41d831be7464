"""A sum of shifted products whose terms need never be in memory: one product over all the shifts.

    P[x, k, n]   = sum_c A[x, c] B[k, c, n]              the block `gemmify.axes`, and a copy of it
    S[y, n]      = sum_k inside(y, k) P[y + shift(k), k, n]      `gemmify.accumulate` with `gemmify.hold` = "tile"

`hold` = "tile" says that P is there one register tile at a time. On a GPU the tile stays where it is and the next shift
is added to it: S is a product over k and c, A read at the shifted place under the condition.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.tirx import BufferLoad

from ..cpu.tir_tools import constant, substitute
from ..cpu.vector_math import op_name
from .equation import Equation

AXES_ANNOTATION = "gemmify.axes"
HOLD_ANNOTATION = "gemmify.hold"
TILE = "tile"


def merged(equations: list[Equation]) -> Equation | None:
    """The sum of the function as one product, where it has one that is held by the tile; None elsewhere."""
    total = next((eq for eq in equations if str(eq.annotations.get(HOLD_ANNOTATION)) == TILE), None)
    if total is None or (term := _term(total)) is None:
        return None
    condition, copied = term
    copy = next((eq for eq in equations if eq.buffer.same_as(copied.source)), None)
    if copy is None or not isinstance(copy.value, TensorLoad) or copy.reduced:
        return None
    product = next((eq for eq in equations if eq.buffer.same_as(copy.value.source)), None)
    if product is None or AXES_ANNOTATION not in product.annotations:
        return None
    product = product.renamed()
    at = {axis: index for axis, index in zip(copy.indices, copied.indices, strict=True)}
    there = [substitute(index, at) for index in copy.value.indices]
    value = substitute(product.value, dict(zip(product.indices, there, strict=True)))
    if not isinstance(value, tirx.Add) or not isinstance(value.b, tirx.Mul):
        return None
    a, b = value.b.a, value.b.b
    if condition is not None:
        a = tirx.if_then_else(condition, a, tirx.const(0, str(a.ty.dtype)))
    own = BufferLoad(total.buffer, list(total.indices))
    inner = product.reduced
    return replace(
        total,
        axes=(*total.axes, *(axis for axis, _ in inner)),
        extents=(*total.extents, *(extent for _, extent in inner)),
        reduction=(*total.reduction, *(True for _ in inner)),
        value=own + a * b,
        annotations={AXES_ANNOTATION: "o" * (len(total.spatial) - 1) + "j"},
    )


def _term(total: Equation) -> tuple[Any | None, TensorLoad] | None:
    """(condition or None, load) of a sum of one load, 0 where the condition does not hold."""
    if not isinstance(total.value, tirx.Add):
        return None
    term = total.value.b
    if isinstance(term, TensorLoad):
        return None, term
    if not isinstance(term, Call) or op_name(term) != "tirx.if_then_else":
        return None
    condition, load, other = term.args
    zero = constant(other) == 0 or float(getattr(other, "value", 1)) == 0
    return (condition, load) if zero and isinstance(load, TensorLoad) else None
