"""Constant subexpressions evaluated with numpy, so that no compiler runs for a reshaped bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from ._rewrite import Expr, array_of, int_list, is_const, is_tensor, make_const, op_name, shape_of

SMALL = 1 << 16
"""Elements up to which an expression may be folded although its result is larger than what it is made of."""


def _strided_slice(x: np.ndarray, call: Expr) -> np.ndarray | None:
    axes, begin, end = (int_list(a) for a in call.args[1:4])
    steps = int_list(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    if any(s < 1 for s in steps):
        return None
    index = [slice(None)] * x.ndim
    for axis, b, e, s in zip(axes, begin, end, steps, strict=True):
        index[axis] = slice(b, e, s)
    return x[tuple(index)]


def _permute(x: np.ndarray, call: Expr) -> np.ndarray:
    return x.transpose(None if call.attrs.axes is None else int_list(call.attrs.axes))


# Operators whose result is the same elements in another shape: the shape is the one that TVM inferred.
RESHAPES = ("reshape", "expand_dims", "squeeze", "flatten", "nn.batch_flatten")

FOLDABLE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "power": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "where": np.where,
    "isnan": np.isnan,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "exp": np.exp,
    "log": np.log,
    "negative": np.negative,
    "abs": np.abs,
}


def fold(call: Expr) -> Expr | None:
    """The constant that `call` (its type inferred) evaluates to, or None where it must stay for the run."""
    name = op_name(call)
    if not is_tensor(call):
        return None
    arguments = list(call.args[0].fields) if name == "concat" and isinstance(call.args[0], relax.Tuple) else call.args
    constants = [a for a in arguments if is_const(a)]
    # Shapes, axes and bounds are arguments that are no tensors; a variable makes the whole expression variable.
    if not constants or any(is_tensor(a) and not is_const(a) for a in arguments):
        return None
    size = int(np.prod(shape_of(call)))
    if size > max(SMALL, *(array_of(c).size for c in constants)):
        return None
    values = [array_of(c) for c in constants]
    with np.errstate(all="ignore"):
        result = _evaluate(name, call, values)
    return None if result is None else make_const(result, str(call.ty.dtype))


def _evaluate(name: str, call: Expr, values: list[np.ndarray]) -> np.ndarray | None:
    if name in RESHAPES:
        return values[0].reshape(shape_of(call))
    if name in FOLDABLE:
        return np.asarray(FOLDABLE[name](*values))
    if name == "permute_dims":
        return _permute(values[0], call)
    if name == "broadcast_to":
        return np.broadcast_to(values[0], shape_of(call))
    if name == "concat":
        return np.concatenate(values, axis=int(call.attrs.axis or 0))
    if name == "strided_slice":
        return _strided_slice(values[0], call)
    if name == "astype":
        return values[0]
    return None
