"""Weight stages on constants: a tensor expression evaluated with numpy, so that folding a weight compiles and runs
no code.

The same expression that a lowering writes for its weight stage is interpreted here, whole arrays at a time: each axis
becomes an index array along its own dimension. Code for another CPU than this one can therefore be made here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
from tvm import te

# An axis that a Select asks for its value is stepped through in Python where it is short: one branch is taken at
# each step.
_STEP_EXTENT = 8

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "And": np.logical_and,
    "Or": np.logical_or,
}


def evaluate(tensor: te.Tensor, inputs: Mapping[te.Tensor, np.ndarray]) -> np.ndarray:
    """The value of a tensor expression on the given arrays, one for each placeholder.

    A reduction is a sum of the product of two tensors, each read at an axis a dimension (or at a constant). Reads
    outside a tensor are allowed where a condition discards them, as in TVM's `if_then_else`.
    """
    return _compute(tensor, {t: np.asarray(a) for t, a in inputs.items()})


def _compute(tensor: te.Tensor, known: dict[te.Tensor, np.ndarray]) -> np.ndarray:
    for other, array in known.items():
        if other.same_as(tensor):
            return array
    axes, body = tensor.op.axis, tensor.op.body[0]
    if tensor.op.reduce_axis:
        known[tensor] = _contract(tensor, known)
        return known[tensor]
    extents = [int(axis.dom.extent) for axis in axes]
    stepped = [d for d, axis in enumerate(axes) if extents[d] <= _STEP_EXTENT and _is_asked(body, axis.var)]
    free = [d for d in range(len(axes)) if d not in stepped]
    out = np.empty(extents, str(tensor.dtype))
    for values in product(*(range(extents[d]) for d in stepped)):
        at: dict[Any, Any] = {axes[d].var: v for d, v in zip(stepped, values, strict=True)}
        for position, d in enumerate(free):
            shape = [1] * len(free)
            shape[position] = extents[d]
            at[axes[d].var] = np.arange(extents[d]).reshape(shape)
        where: list[Any] = [slice(None)] * len(axes)
        for d, v in zip(stepped, values, strict=True):
            where[d] = v
        out[tuple(where)] = _Expression(at, known, str(tensor.dtype)).value(body)
    known[tensor] = out
    return out


def _contract(tensor: te.Tensor, known: dict[te.Tensor, np.ndarray]) -> np.ndarray:
    """`sum a[..] b[..]` as numpy's tensor product: a matrix product wherever it is one."""
    (reduce,) = tensor.op.body
    product = reduce.source[0]
    assert type(product).__name__ == "Mul", "a weight stage sums products of two tensors only"
    letters = [*tensor.op.axis, *tensor.op.reduce_axis]
    arguments: list[Any] = []
    for factor in (product.a, product.b):
        load = factor.value if type(factor).__name__ == "Cast" else factor
        source, *index = load.args
        array = _compute(source, known).astype(_dtype_of(factor), copy=False)
        constant = tuple(int(i.value) if type(i).__name__ == "IntImm" else slice(None) for i in index)
        arguments += [
            array[constant],
            [_letter(letters, i) for i in index if type(i).__name__ != "IntImm"],
        ]
    read = {letter for letters_of in arguments[1::2] for letter in letters_of}
    extents = [int(axis.dom.extent) for axis in tensor.op.axis]
    spatial = range(len(extents))
    out: np.ndarray = np.einsum(*arguments, [d for d in spatial if d in read], optimize=True)
    out = out.reshape([extents[d] if d in read else 1 for d in spatial])
    return np.ascontiguousarray(np.broadcast_to(out, extents), dtype=str(tensor.dtype))


def _dtype_of(expr: Any) -> str:
    return str(expr.ty.dtype)


def _letter(axes: list[Any], var: Any) -> int:
    """The number of an axis among `axes`."""
    found = [number for number, axis in enumerate(axes) if axis.var.same_as(var)]
    assert found, f"a weight stage sums products read at single axes only, found {var}"
    return found[0]


def _is_asked(expr: Any, var: Any) -> bool:
    """Whether the condition of a Select compares `var` with a constant."""
    return any(
        type(e).__name__ == "Select" and type(e.condition).__name__ == "EQ" and e.condition.a.same_as(var)
        for e in _walk(expr)
    )


def _walk(expr: Any) -> Iterator[Any]:
    yield expr
    for child in _children(expr):
        yield from _walk(child)


def _children(expr: Any) -> list[Any]:
    kind = type(expr).__name__
    if kind in _BINARY:
        return [expr.a, expr.b]
    if kind == "Select":
        return [expr.condition, expr.true_value, expr.false_value]
    if kind == "Cast":
        return [expr.value]
    if kind == "Call":
        return [a for a in expr.args if not isinstance(a, te.Tensor)]
    return []


class _Expression:
    """Evaluates one body with its axes bound to index arrays (or to numbers, those that are stepped through)."""

    def __init__(self, axes: dict[Any, Any], known: dict[te.Tensor, np.ndarray], dtype: str) -> None:
        self.axes, self.known, self.dtype = axes, known, dtype

    def value(self, expr: Any) -> Any:
        kind = type(expr).__name__
        if kind == "Var":
            return next(v for axis, v in self.axes.items() if axis.same_as(expr))
        if kind == "IntImm":
            return int(expr.value)
        if kind == "FloatImm":
            return np.dtype(_dtype_of(expr)).type(float(expr.value))
        if kind in _BINARY:
            return _BINARY[kind](self.value(expr.a), self.value(expr.b))
        if kind == "Select":
            return self._choose(expr.condition, expr.true_value, expr.false_value)
        if kind == "Cast":
            return np.asarray(self.value(expr.value)).astype(_dtype_of(expr), copy=False)
        assert kind == "Call", f"a weight stage holds a {kind}, which folding does not know"
        if expr.op.name == "te.tensor_load":
            tensor, *index = expr.args
            return self._read(_compute(tensor, self.known), [self.value(i) for i in index])
        assert expr.op.name == "prim.if_then_else", f"a weight stage calls {expr.op.name}, which folding does not know"
        return self._choose(*expr.args)

    def _choose(self, condition: Any, yes: Any, no: Any) -> Any:
        test = self.value(condition)
        if isinstance(test, bool | np.bool_):
            return self.value(yes if test else no)
        return np.where(test, self.value(yes), self.value(no))

    @staticmethod
    def _read(array: np.ndarray, index: list[Any]) -> Any:
        bounded = [np.clip(i, 0, size - 1) for i, size in zip(index, array.shape, strict=True)]
        return array[tuple(bounded)]
