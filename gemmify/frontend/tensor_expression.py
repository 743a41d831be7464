"""A tensor expression, or the PrimFunc made of one -> a Relax `main` that calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, te, tirx

from gemmify.errors import InputError
from gemmify.frontend.load import first_line

NAME = "tensor_expression"


def is_tensor_list(model: Any) -> bool:
    """Whether `model` is a non-empty sequence of te.Tensor, as te.create_prim_func takes it."""
    return isinstance(model, list | tuple) and bool(model) and all(isinstance(t, te.Tensor) for t in model)


def from_tensors(args: Sequence[te.Tensor]) -> tvm.IRModule:
    """`args` are the placeholders followed by the results, as for te.create_prim_func. Raises InputError."""
    given = [isinstance(t.op, te.PlaceholderOp) for t in args]
    if all(given) or not any(given):
        raise InputError(
            "a tensor expression needs its placeholders and its results in the list: "
            f"[A, B, C] with C computed, got {[t.op.name for t in args]}"
        )
    try:
        return from_prim_func(te.create_prim_func(list(args)))
    except InputError:
        raise
    except Exception as error:  # TVM raises its InternalError, ValueError or an assertion
        raise InputError(f"the tensor expression cannot be turned into a function: {first_line(error)}") from None


def from_prim_func(func: tirx.PrimFunc) -> tvm.IRModule:
    """Relax `main` whose parameters are the buffers that `func` reads, in order, and whose results those it writes.

    The written buffers must be the last parameters, as `call_tir` passes them. Raises InputError otherwise.
    """
    buffers = []
    for param in func.params:
        if not isinstance(param, tirx.Buffer):
            raise InputError(f"the function takes {param.name!r}, which is not a buffer; only buffers can be passed")
        buffers.append(param)
    written = _written(func)
    outputs = [b for b in buffers if any(b.same_as(w) for w in written)]
    if not outputs or list(buffers[len(buffers) - len(outputs) :]) != outputs or len(outputs) == len(buffers):
        raise InputError(
            "the function must read its first buffers and write its last ones; "
            f"it takes {[b.name for b in buffers]} and writes {[b.name for b in outputs]}"
        )
    if any(not isinstance(d, tirx.IntImm) for b in buffers for d in b.shape):
        raise InputError("the function's buffers have symbolic sizes, and compiling needs every size")
    inputs = buffers[: len(buffers) - len(outputs)]
    symbol = str(func.attrs["global_symbol"]) if func.attrs and "global_symbol" in func.attrs else NAME
    symbol = NAME if symbol == "main" else symbol
    params = [relax.Var(b.name, _type(b)) for b in inputs]
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        gv = bb.add_func(func.with_attr("global_symbol", symbol), symbol)
        types = [_type(b) for b in outputs]
        with bb.dataflow():
            out = bb.emit(relax.call_tir(gv, params, types[0] if len(types) == 1 else types), name_hint=symbol)
            result = bb.emit_output(out)
        bb.emit_func_output(result)
    return bb.get()


def _type(buffer: tirx.Buffer) -> relax.TensorType:
    return relax.TensorType([int(d) for d in buffer.shape], str(buffer.dtype))


def _written(func: tirx.PrimFunc) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        found.append(node.buffer)

    tvm_ffi.structural_walk(func.body, (tirx.BufferStore, visit))
    return found
