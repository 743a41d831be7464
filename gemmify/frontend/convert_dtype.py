"""A network of float32 in half precision: weights and activations converted, every operator in the new dtype.

What must not lose digits keeps them further on: layers add up in float32 (`lowering.precision`), and so do pooling,
softmax and normalisations (`lowering.graph.widen_sums`). Batch norms are folded from weights that are rounded already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from gemmify.errors import InputError, UnsupportedError
from gemmify.frontend.imported import ImportedModel
from lowering.graph._module import rewrite_main
from lowering.graph._rewrite import (
    Emitter,
    Expr,
    Graph,
    array_of,
    dtype_of,
    is_const,
    is_var,
    make_const,
    op_name,
    substitute,
)

DTYPES = ("float16", "bfloat16", "float32")
_WIDE = "float32"
_LARGEST = {"float16": 65504.0}


def check_dtype(dtype: Any) -> str:
    """`dtype`, one of DTYPES; InputError for anything else."""
    if dtype not in DTYPES:
        raise InputError(f"a network is converted to {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")
    return str(dtype)


def convert_dtype(model: ImportedModel, dtype: str) -> ImportedModel:
    """`model` with its float32 inputs, outputs, weights and operators in `dtype`; other dtypes stay as they are.

    `source` is dropped: the file does not compute in that dtype. Raises InputError for an unknown dtype and for weights
    that float16 cannot hold, UnsupportedError for a network with an operator whose result cannot be of `dtype`.
    """
    if check_dtype(dtype) == _WIDE or not _has(model, _WIDE):
        return model
    mod = rewrite_main(model.mod, lambda func: _converted(func, dtype))
    specs = [
        tuple(replace(spec, dtype=dtype) if spec.dtype == _WIDE else spec for spec in part)
        for part in (model.inputs, model.outputs)
    ]
    return replace(model, mod=mod, inputs=specs[0], outputs=specs[1], source=None)


def _has(model: ImportedModel, dtype: str) -> bool:
    graph = Graph(model.mod["main"])
    found = [*graph.params, *(var for var, _ in graph.bindings)]
    return any(isinstance(e.ty, relax.TensorType) and dtype_of(e) == dtype for e in found)


def _converted(func: relax.Function, dtype: str) -> relax.Function:
    graph, out = Graph(func), Emitter()

    def narrow(expr: Expr) -> Expr:
        if not is_const(expr) or dtype_of(expr) != _WIDE:
            return expr
        return make_const(_checked(array_of(expr), dtype), dtype)

    for param in graph.params:
        if dtype_of(param) == _WIDE:
            out.env[param] = relax.Var(param.name, relax.TensorType(param.ty.shape, dtype))
    graph.params = [out.lookup(param) for param in graph.params]
    for var, value in graph.bindings:
        made = _with_attributes(_mapped(substitute(value, out.lookup), narrow), dtype)
        out.env[var] = out.emit(made, var.name) if not isinstance(made, relax.Tuple) else made
        _require(var, out.env[var], value, dtype)
    return out.finish(graph, [narrow(substitute(o, out.lookup)) for o in graph.outputs])


def _checked(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values`, after a check that the dtype can hold them."""
    largest = _LARGEST.get(dtype)
    if largest is None or not values.size:
        return values
    finite = values[np.isfinite(values)]  # an infinite bound of a clip stays infinite
    if finite.size and float(np.abs(finite).max()) > largest:
        found = float(np.abs(finite).max())
        raise InputError(f"a weight of {found:.3g} does not fit into {dtype} ({largest:g} at most); take bfloat16")
    return values


def _mapped(value: Expr, narrow: Any) -> Expr:
    """`value` with its constants narrowed."""
    if isinstance(value, relax.Call):
        return relax.Call(value.op, [_mapped(arg, narrow) for arg in value.args], value.attrs, value.ty_args)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_mapped(item, narrow) for item in value.fields])
    return value if is_var(value) else narrow(value)


def _with_attributes(value: Expr, dtype: str) -> Expr:
    """A call that names float32 as the dtype of its result, with the new one there."""
    if not isinstance(value, relax.Call) or value.attrs is None:
        return value
    name = op_name(value)
    if name == "astype" and str(value.attrs.dtype) == _WIDE:
        return relax.op.astype(value.args[0], dtype)
    named = str(getattr(value.attrs, "out_dtype", "") or "")
    if named == _WIDE:
        attrs = tvm.ir.make_node(value.attrs.type_key(), **{**_fields(value.attrs), "out_dtype": dtype})
        return relax.Call(value.op, list(value.args), attrs, value.ty_args)
    return value


def _fields(attrs: Any) -> dict[str, Any]:
    return {name: getattr(attrs, name) for name in attrs.keys()}  # noqa: SIM118 (no dict)


def _require(var: Expr, made: Expr, value: Expr, dtype: str) -> None:
    """UnsupportedError where a result that was float32 is not of the new dtype now."""
    for old, new in zip(_tensors(var.ty), _tensors(made.ty), strict=True):
        if str(old.dtype) == _WIDE and str(new.dtype) != dtype:
            what = op_name(value) or "a part of the network"
            raise UnsupportedError(
                f"{what} cannot be computed in {dtype}; leave --dtype out, or convert the model itself"
            )


def _tensors(ty: Any) -> Sequence[Any]:
    fields = list(ty.fields) if isinstance(ty, relax.TupleType) else [ty]
    return [field for field in fields if isinstance(field, relax.TensorType)]
