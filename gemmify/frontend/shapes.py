"""Which static shape every real input of an ONNX model gets, from the model and from what the caller asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from gemmify.errors import GemmifyWarning, InputError, UnsupportedError
from gemmify.frontend.imported import TensorSpec

Dims = list[int | str] | None  # a name (or "?") for a dimension that the model leaves open; None: even the rank is open


def real_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The graph's inputs that are not initializers listed once more (as IR versions below 4 require)."""
    weights = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return [i for i in graph.input if i.name not in weights]


def declared(value: onnx.ValueInfoProto) -> Dims:
    """The dimensions that the model declares: positive numbers, or names where they are open."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in tensor.shape.dim]


def fix_inputs(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]] | None) -> list[TensorSpec]:
    """Decide the shape of every real input and write it into `graph`; open dimensions take the caller's `shapes`.

    An open dimension named alike in two inputs needs to be given once. The batch (first dimension) may be given
    another value than a fixed one. Raises InputError for unknown inputs, wrong ranks, contradictions, and for every
    input that stays open; UnsupportedError for inputs that are no tensors of numbers.
    """
    inputs = real_inputs(graph)
    wanted = {name: _checked(name, shape) for name, shape in (shapes or {}).items()}
    for name in wanted:
        if name not in (i.name for i in inputs):
            known = ", ".join(i.name for i in inputs) or "none"
            raise InputError(
                f"a shape was given for {name!r}, which is not an input of the model (its inputs: {known})"
            )
    bound: dict[str, int] = {}
    for value in inputs:
        if value.name in wanted:
            _bind(value.name, declared(value), wanted[value.name], bound)
    found = {i.name: _resolve(declared(i), wanted.get(i.name), bound) for i in inputs}
    _refuse_open(inputs, found)
    specs = []
    for value in inputs:
        dims = [d for d in found[value.name] or [] if isinstance(d, int)]
        specs.append(TensorSpec(value.name, tuple(dims), _dtype(value)))
        value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, dims))
    return specs


def _checked(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    try:
        dims = tuple(int(d) for d in shape)
    except (TypeError, ValueError):
        dims = (0,)
    if any(d < 1 or d != given for d, given in zip(dims, shape, strict=False)) or isinstance(shape, str):
        raise InputError(f"the shape of {name!r} must be whole numbers of at least 1, got {shape!r}")
    return dims


def _bind(name: str, dims: Dims, wanted: tuple[int, ...], bound: dict[str, int]) -> None:
    if dims is None:
        return
    if len(dims) != len(wanted):
        raise InputError(
            f"input {name!r} has {len(dims)} dimensions {show(dims)}, but the shape given has "
            f"{len(wanted)}: {show(wanted)}"
        )
    for axis, (dim, value) in enumerate(zip(dims, wanted, strict=True)):
        if isinstance(dim, int) and dim != value and axis > 0:
            raise InputError(
                f"input {name!r} has the shape {show(dims)}, and the shape given, {show(wanted)}, contradicts it: "
                f"dimension {axis} is fixed at {dim}; only the first dimension (batch) and named ones can be changed"
            )
        if isinstance(dim, str) and dim != "?" and bound.setdefault(dim, value) != value:
            raise InputError(
                f"the dimension {dim!r} was given two sizes, {bound[dim]} and {value}: the model needs one"
            )


def _resolve(dims: Dims, wanted: tuple[int, ...] | None, bound: dict[str, int]) -> Dims:
    if wanted is not None:
        return list(wanted)
    return None if dims is None else [bound.get(d, d) if isinstance(d, str) else d for d in dims]


def _refuse_open(inputs: Sequence[onnx.ValueInfoProto], found: Mapping[str, Dims]) -> None:
    still = [i.name for i in inputs if found[i.name] is None or any(isinstance(d, str) for d in found[i.name] or [])]
    if not still:
        return
    listed = "; ".join(f"{name} is {show(found[name])}" for name in still)
    options = " ".join(f"--shape {name}={_example(found[name])}" for name in still)
    raise InputError(
        f"the model leaves input shapes open, and compiling needs every size: {listed}; pass for example {options}"
    )


def _example(dims: Dims) -> str:
    if dims is None:
        return "1,3,224,224"
    guess = ["1", "3", *["224"] * 8] if len(dims) >= 3 else ["1", "128"]
    return ",".join(str(d) if isinstance(d, int) else guess[min(axis, len(guess) - 1)] for axis, d in enumerate(dims))


def show(dims: Sequence[int | str] | None) -> str:
    """A shape for a message: `[1,3,height,width]`."""
    return "of unknown rank" if dims is None else f"[{','.join(map(str, dims))}]"


def _dtype(value: onnx.ValueInfoProto) -> str:
    elem = value.type.tensor_type.elem_type
    if not value.type.HasField("tensor_type") or elem in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        raise UnsupportedError(f"input {value.name!r} is not a tensor of numbers, which is all that can be compiled")
    return str(np.dtype(helper.tensor_dtype_to_np_dtype(elem)))


def warn_weights(constants: Mapping[str, np.ndarray]) -> None:
    """Warn, in one GemmifyWarning, of every weight that holds NaN or infinity."""

    def finite(values: np.ndarray) -> bool:
        # A sum is several times cheaper than isfinite, and finite unless it overflows: then look closely.
        if values.dtype.kind != "f" or np.isfinite(values.sum(dtype=np.float64)):
            return True
        return bool(np.isfinite(values).all())

    bad = [name for name, values in constants.items() if values.size > 1 and not finite(values)]
    if bad:
        message = f"weights hold NaN or infinity, and so may the results: {', '.join(bad)}"
        warnings.warn(message, GemmifyWarning, stacklevel=3)
