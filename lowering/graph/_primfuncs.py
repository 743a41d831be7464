"""PrimFuncs that TVM's ONNX importer writes where Relax has an operator (bounds, constant pads), back to operators.

Nothing is decided by a function's name. What a function seems to do is read off its only store; then the importer's
own expression for that is built again, and the two must be structurally equal.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import relax, tirx, topi
from tvm.relax import op

from ._rewrite import Expr, dtype_of, is_tensor, op_name, scalar_of, shape_of


def as_operator(mod: tvm.IRModule, call: Expr) -> Expr | None:
    """The Relax operator that `call`, a `call_tir`, stands for; None where it stays what it is."""
    if op_name(call) != "call_tir" or not is_tensor(call):
        return None
    func, arguments = mod[call.args[0]], list(call.args[1].fields)
    store = func.body
    while not isinstance(store, tirx.BufferStore):
        inner = getattr(store, "block", None)
        store = getattr(store, "body", None) if inner is None else inner
        if store is None:
            return None
    if not arguments or not is_tensor(arguments[0]):
        return None
    value = store.value
    if isinstance(value, tirx.Max | tirx.Min):
        return _bound(func, value, arguments)
    return _pad(func, value, arguments, shape_of(call)) if len(arguments) == 1 else None


def _matches(func: tirx.PrimFunc, te_func: object, *args: object) -> bool:
    """Whether the importer would have written `func` for `te_func(*args)`."""
    builder = relax.BlockBuilder()
    call = builder.call_te(te_func, *args)
    return tvm_ffi.structural_equal(builder.get()[call.args[0]].body, func.body, map_free_vars=True)


def _bound(func: tirx.PrimFunc, value: Expr, arguments: list[Expr]) -> Expr | None:
    is_max = isinstance(value, tirx.Max)
    te_func, operator = (topi.maximum, op.maximum) if is_max else (topi.minimum, op.minimum)
    x = arguments[0]
    if len(arguments) == 2 and scalar_of(arguments[1]) is not None:
        return operator(x, arguments[1]) if _matches(func, te_func, x, arguments[1]) else None
    if len(arguments) == 1 and isinstance(value.b, tirx.FloatImm):
        bound = float(value.b.value)
        return operator(x, relax.const(bound, dtype_of(x))) if _matches(func, te_func, x, bound) else None
    return None


def _pad(func: tirx.PrimFunc, value: Expr, arguments: list[Expr], out: tuple[int, ...]) -> Expr | None:
    if not isinstance(value, relax.Call) or len(value.args) != 3:
        return None
    _, load, fill = value.args
    if not hasattr(load, "indices") or not isinstance(fill, tirx.FloatImm):
        return None
    x = arguments[0]
    before = [int(i.b.value) if isinstance(i, tirx.Sub) and isinstance(i.b, tirx.IntImm) else 0 for i in load.indices]
    after = [o - i - b for o, i, b in zip(out, shape_of(x), before, strict=True)]
    if min(before + after) < 0 or not _matches(func, topi.nn.pad, x, before, after, float(fill.value)):
        return None
    widths = [w for pair in zip(before, after, strict=True) for w in pair]
    return op.nn.pad(x, widths, "constant", float(fill.value))
