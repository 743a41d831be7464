"""Checking a Relax module, wherever it came from: one `main`, static shapes, only the real inputs as parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import relax

from gemmify.errors import InputError, UnsupportedError
from gemmify.frontend.imported import TensorSpec
from gemmify.frontend.layers import name_layers
from gemmify.frontend.shapes import show


def import_relax(mod: tvm.IRModule, shapes: Mapping[str, Sequence[int]] | None) -> tvm.IRModule:
    """Bind weights that travel as the attribute "params", fix symbolic dimensions, name the layers.

    Raises InputError for a module without a Relax `main`, wrong shapes, or dimensions that stay symbolic.
    """
    if "main" not in [gv.name_hint for gv in mod.functions] or not isinstance(mod["main"], relax.Function):
        raise InputError("the module has no Relax function named 'main', which is what is compiled")
    if mod["main"].attrs and "params" in mod["main"].attrs:
        mod, params = relax.frontend.detach_params(mod)
        main = mod["main"]
        names = [p.name for p in main.params[len(main.params) - len(params["main"]) :]]
        mod = relax.transform.BindParams("main", dict(zip(names, params["main"], strict=True)))(mod)
    mod = _bind_shapes(mod, shapes or {})
    if not mod["main"].attrs or "global_symbol" not in mod["main"].attrs:
        mod["main"] = mod["main"].with_attr("global_symbol", "main")
    return name_layers(relax.transform.Normalize()(mod))


def _bind_shapes(mod: tvm.IRModule, shapes: Mapping[str, Sequence[int]]) -> tvm.IRModule:
    params = {p.name: p for p in mod["main"].params}
    bound: dict[Any, int] = {}
    for name, shape in shapes.items():
        if name not in params:
            raise InputError(
                f"a shape was given for {name!r}, which is not an input of the model "
                f"(its inputs: {', '.join(params) or 'none'})"
            )
        dims = _dims(params[name])
        if len(dims) != len(shape) or any(isinstance(d, int) and d != s for d, s in zip(dims, shape, strict=False)):
            raise InputError(
                f"input {name!r} has the shape {show(dims)}, which the shape given, {show(shape)}, contradicts"
            )
        bound.update({d: int(s) for d, s in zip(dims, shape, strict=True) if isinstance(d, tvm.tirx.Var)})
    return relax.transform.BindSymbolicVars(bound, "main")(mod) if bound else mod


def fold(mod: tvm.IRModule) -> tvm.IRModule:
    """Drop what no output needs, and compute what depends on constants alone."""
    dead = relax.transform.DeadCodeElimination()
    return tvm.transform.Sequential([dead, relax.transform.FoldConstant(), dead])(mod)


def input_specs(mod: tvm.IRModule) -> tuple[TensorSpec, ...]:
    """The parameters of `main`. Raises InputError for open dimensions, UnsupportedError for anything but tensors."""
    params = mod["main"].params
    for p in params:
        if not isinstance(p.ty, relax.TensorType):
            raise UnsupportedError(f"input {p.name!r} of the module is not a tensor, which is all that can be compiled")
    still = {p.name: _dims(p) for p in params if not _static(p.ty)}
    if still:
        listed = "; ".join(f"{name} is {show(dims)}" for name, dims in still.items())
        options = " ".join(
            f"--shape {name}={','.join(str(d) if isinstance(d, int) else '1' for d in dims)}"
            for name, dims in still.items()
        )
        raise InputError(
            f"the model leaves input shapes open, and compiling needs every size: {listed}; pass for example {options}"
        )
    return tuple(_spec(p.name, p.ty) for p in params)


def output_specs(mod: tvm.IRModule, names: Sequence[str] | None = None) -> tuple[TensorSpec, ...]:
    """What `main` returns, named as in `names` or `output`, `output_1` .... Raises UnsupportedError."""
    found = mod["main"].ret_ty
    fields = list(found.fields) if isinstance(found, relax.TupleType) else [found]
    if not fields:
        raise InputError("the model has no outputs, so there is nothing to compute")
    made_up = ["output" if i == 0 else f"output_{i}" for i in range(len(fields))]
    for name, ty in zip(names or made_up, fields, strict=True):
        if not isinstance(ty, relax.TensorType) or not _static(ty):
            raise UnsupportedError(
                f"the output {name!r} has a size known only at run time, and compiling needs every size"
            )
    return tuple(_spec(name, ty) for name, ty in zip(names or made_up, fields, strict=True))


def check_static(mod: tvm.IRModule) -> None:
    """Raises UnsupportedError for a binding of `main` whose size is known only at run time."""
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            ty = binding.var.ty
            fields = ty.fields if isinstance(ty, relax.TupleType) else [ty]
            if any(isinstance(f, relax.TensorType) and not _static(f) for f in fields):
                op = getattr(getattr(binding, "value", None), "op", None)
                what = f"a result of {op.name}" if isinstance(op, tvm.ir.Op) else f"the value {binding.var.name!r}"
                raise UnsupportedError(f"{what} has a size known only at run time, and compiling needs every size")


def _dims(param: Any) -> list[Any]:
    """A parameter's dimensions: whole numbers, and expressions where they are symbolic."""
    return [int(d) if isinstance(d, tvm.tirx.IntImm) else d for d in param.ty.shape or []]


def _static(ty: Any) -> bool:
    return isinstance(ty.shape, relax.ShapeExpr) and all(isinstance(d, tvm.tirx.IntImm) for d in ty.shape.values)


def _spec(name: str, ty: Any) -> TensorSpec:
    return TensorSpec(name, tuple(int(d) for d in ty.shape), str(ty.dtype))
