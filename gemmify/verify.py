"""Does a compiled network compute what its model says? Compared with an independent engine on seeded random inputs.

The reference is ONNX Runtime where it is installed; else, for an ONNX model, onnx's reference evaluator on the model
cast to float64, with our own operators where its own are wrong or slow (`reference_ops`); for a `.pt2` file PyTorch in
float64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .manifest import Manifest

TOLERANCE = 1e-4
"""Largest error that is accepted, as a share of the reference's largest absolute value."""
HALF_TOLERANCE = 8 * 2.0**-11
"""The same where a tensor is in float16: a few of the roundings that every tensor in between goes through."""
REFERENCES = ("auto", "onnxruntime", "float64")


def to_float64(model: Any) -> Any:
    """A copy of the ONNX ModelProto `model` in which every float32 and float16 tensor is float64, casts too."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _widen_graph(copy.graph)
    return copy


def _widen_graph(graph: Any) -> None:
    from onnx import TensorProto

    for initializer in graph.initializer:
        _widen_tensor(initializer)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in graph.node:
        for attribute in node.attribute:
            _widen_attribute(node.op_type, attribute)


def _widen_attribute(op: str, attribute: Any) -> None:
    from onnx import TensorProto, helper, numpy_helper

    if attribute.HasField("t"):
        _widen_tensor(attribute.t)
    if attribute.HasField("g"):
        _widen_graph(attribute.g)
    if op == "Cast" and attribute.name == "to" and attribute.i in (TensorProto.FLOAT, TensorProto.FLOAT16):
        attribute.i = TensorProto.DOUBLE
    if op == "Constant" and attribute.name in ("value_float", "value_floats"):
        values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
        attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(np.asarray(values, np.float64))))


def _widen_tensor(tensor: Any) -> None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _run_float64(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    from .reference_ops import OPERATORS

    wide = {k: v.astype(np.float64) if v.dtype in (np.float32, np.float16) else v for k, v in inputs.items()}
    evaluator = ReferenceEvaluator(to_float64(model), new_ops=list(OPERATORS))
    return dict(zip(evaluator.output_names, evaluator.run(None, wide), strict=True))


def _run_onnxruntime(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _program(path: Path) -> Any:
    import torch

    try:
        return torch.export.load(str(path))
    except Exception as err:  # torch raises RuntimeError, KeyError, zipfile errors ...
        said = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise InputError(f"{path} is not a program that torch.export.save wrote: {said}") from err


def _run_torch(path: Path, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    if importlib.util.find_spec("torch") is None:
        raise InputError(f"verifying {path} needs PyTorch, which is not installed; `pip install gemmify[torch]`")
    import torch

    module = _program(path).module().double()
    tensors = [torch.from_numpy(v) for v in inputs.values()]
    with torch.no_grad():
        result = module(*(t.double() if t.is_floating_point() else t for t in tensors))
    results = result if isinstance(result, tuple | list) else [result]
    return [t.numpy() for t in results]


def onnx_model(model: Any) -> Any:
    """The ONNX ModelProto that `model` names: itself, an .onnx file, or a zoo name; None where it is not ONNX."""
    import onnx

    if isinstance(model, onnx.ModelProto):
        return model
    path = Path(str(model))
    if path.suffix == ".onnx":
        if not path.is_file():
            raise InputError(f"there is no file {path}; give an ONNX file or a name that `gemmify list` shows")
        try:
            return onnx.load(str(path))
        except Exception as err:  # onnx raises what protobuf raises: DecodeError, and others by version
            raise InputError(f"cannot read {path} as an ONNX model: {err}") from err
    from . import zoo

    return zoo.build(str(model)) if isinstance(model, str) and model in zoo.ZOO else None


Interface = list[tuple[str, list[int | str] | None]]
"""Names and dimensions of inputs or outputs; a dimension that is open has a name, or None stands for all of them."""


def interface(model: Any) -> tuple[Interface, Interface] | None:
    """The inputs and the outputs that the ONNX or `.pt2` model `model` declares; None where it is neither."""
    path = Path(str(model))
    if path.suffix == ".pt2":
        return _interface_of_program(path)
    proto = onnx_model(model)
    if proto is None:
        return None
    weights = {t.name for t in proto.graph.initializer} | {t.values.name for t in proto.graph.sparse_initializer}

    def specs(values: Any) -> Interface:
        return [(v.name, _dims(v.type.tensor_type)) for v in values]

    return specs(i for i in proto.graph.input if i.name not in weights), specs(proto.graph.output)


def _dims(tensor: Any) -> list[int | str] | None:
    if not tensor.HasField("shape"):
        return None
    return [d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in tensor.shape.dim]


def _interface_of_program(path: Path) -> tuple[Interface, Interface] | None:
    if importlib.util.find_spec("torch") is None or not path.is_file():
        return None
    program = _program(path)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}

    def specs(names: Any) -> Interface:
        shapes = [getattr(values.get(name), "shape", None) for name in names]
        dims = [None if s is None else [d if isinstance(d, int) else "?" for d in s] for s in shapes]
        return list(zip(map(str, names), dims, strict=True))

    return specs(program.graph_signature.user_inputs), specs(program.graph_signature.user_outputs)


def check_same_model(model: Any, manifest: Manifest, library: str) -> None:
    """InputError, with both sides, where `library` cannot have been made from `model`: other inputs or outputs.

    The batch (the first dimension) may differ: it can be chosen when the model is compiled.
    """
    declared = interface(model)
    if declared is None:
        return
    named = Path(str(model)).suffix != ".pt2"  # the names in a program of PyTorch's are not those of its tensors
    for kind, wanted, found in zip(("inputs", "outputs"), declared, (manifest.inputs, manifest.outputs), strict=True):
        shapes = {s.name if named else str(i): s.shape for i, s in enumerate(found)}
        dims_of = {name if named else str(i): dims for i, (name, dims) in enumerate(wanted)}
        if set(shapes) != set(dims_of) or not all(_dims_fit(dims_of[key], shapes[key]) for key in shapes):
            open_or = {name: "?" if dims is None else "x".join(map(str, dims)) or "scalar" for name, dims in wanted}
            said = ", ".join(f"{name}: {dims}" for name, dims in open_or.items())
            has = ", ".join(f"{s.name}: {'x'.join(map(str, s.shape)) or 'scalar'}" for s in found)
            raise InputError(
                f"{library} was not made from {model}: the model's {kind} are {said or 'none'}, the library's are "
                f"{has or 'none'}; give the model that it was made from"
            )


def _dims_fit(dims: list[int | str] | None, shape: Sequence[int]) -> bool:
    if dims is None:
        return True
    pairs = zip(dims[1:], shape[1:], strict=False)
    return len(dims) == len(shape) and all(have == want for want, have in pairs if isinstance(want, int))


def _of_batch(model: Any, inputs: Mapping[str, np.ndarray]) -> Any:
    """The ONNX `model` with the input shapes of `inputs`, where it fixes others: an engine would refuse them."""
    import onnx

    def fixed_otherwise(value: Any) -> list[tuple[Any, int]]:
        dims = value.type.tensor_type.shape.dim
        pairs = zip(dims, np.shape(inputs.get(value.name, 0)), strict=False)
        return [(dim, size) for dim, size in pairs if dim.dim_value > 0 and dim.dim_value != size]

    if not any(fixed_otherwise(value) for value in model.graph.input):
        return model  # not copied: a model can be large
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        for dim, size in fixed_otherwise(value):
            dim.dim_value = size
    del copy.graph.value_info[:]  # the shapes that followed from the old ones
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    return copy


def reference_outputs(
    model: Any, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], engine: str = "auto"
) -> tuple[list[np.ndarray], str]:
    """The outputs `outputs` of `model` on `inputs` by an independent engine, and that engine's name.

    `engine` is "onnxruntime", "float64", or "auto": the first that is installed. Raises InputError where the model has
    no reference, or the engine is not installed.
    """
    if engine not in REFERENCES:
        raise InputError(f"reference {engine!r} is unknown; choose one of {', '.join(REFERENCES)}")
    if Path(str(model)).suffix == ".pt2":
        return _run_torch(Path(str(model)), inputs), "torch float64"
    proto = onnx_model(model)
    if proto is None:
        raise InputError(f"{model} has no reference to compare with; verify an ONNX file, a .pt2 file or a zoo name")
    installed = importlib.util.find_spec("onnxruntime") is not None
    if engine == "onnxruntime" and not installed:
        raise InputError("ONNX Runtime is not installed; `pip install gemmify[peers]`, or use --reference float64")
    proto = _of_batch(proto, inputs)
    use_runtime = installed if engine == "auto" else engine == "onnxruntime"
    results = _run_onnxruntime(proto, inputs) if use_runtime else _run_float64(proto, inputs)
    return _ordered(results, outputs), "onnxruntime" if use_runtime else "float64"


def _ordered(results: dict[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """The results under `names`, or in their own order where the names were lost on the way."""
    if set(names) <= set(results):
        return [results[name] for name in names]
    return list(results.values())


def computes_in_half(model: Any, manifest: Manifest) -> bool:
    """Whether a tensor of the network is in float16: an input, an output, a layer's, or one inside the ONNX `model`."""
    dtypes = {spec.dtype for spec in (*manifest.inputs, *manifest.outputs)}
    dtypes |= {layer["problem"].get("dtype") for layer in manifest.layers}
    if "float16" in dtypes:
        return True
    proto = None if Path(str(model)).suffix == ".pt2" else onnx_model(model)
    return proto is not None and _half_in_graph(proto.graph)


def _half_in_graph(graph: Any) -> bool:
    from onnx import TensorProto

    half = TensorProto.FLOAT16
    values = [*graph.input, *graph.output, *graph.value_info]
    attributes = [(node.op_type, attribute) for node in graph.node for attribute in node.attribute]
    return (
        any(tensor.data_type == half for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type == half for value in values)
        or any(op == "Cast" and a.name == "to" and a.i == half for op, a in attributes)
        or any(a.HasField("t") and a.t.data_type == half for _, a in attributes)
        or any(a.HasField("g") and _half_in_graph(a.g) for _, a in attributes)
    )


def compare(
    names: Sequence[str],
    got: Sequence[np.ndarray],
    want: Sequence[np.ndarray],
    tolerance: float | None = None,
    half: bool = False,
) -> list[dict[str, Any]]:
    """Per output: name, max_abs_error, max_abs_reference, relative_error (their ratio), holds, and why where it fails.

    `max |got - want| <= tolerance * max |want|`, the tolerance by default that of the output's dtype, or of float16
    where the network holds a tensor in it (`half`); where the reference is all zero, the error itself is compared.
    """
    if not len(names) == len(got) == len(want):
        raise InputError(f"the network has {len(got)} outputs, its reference {len(want)}: not the same model")
    rows = []
    for name, have, ref in zip(names, got, want, strict=True):
        usual = HALF_TOLERANCE if half or have.dtype == np.float16 else TOLERANCE
        allowed = usual if tolerance is None else tolerance
        row: dict[str, Any] = {"name": name, "holds": False, "tolerance": allowed}
        rows.append(row)
        if have.shape != np.shape(ref):
            row["why"] = f"shape {have.shape}, the reference has {np.shape(ref)}"
            continue
        a, b = np.asarray(have, np.float64), np.asarray(ref, np.float64)
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
            row["why"] = "not finite where the reference is, or the other way round"
            continue
        error = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
        largest = float(np.abs(b[finite]).max(initial=0.0))
        relative = error / largest if largest else error
        row.update(max_abs_error=error, max_abs_reference=largest, relative_error=relative, holds=relative <= allowed)
        if not row["holds"]:
            row["why"] = f"relative error {relative:.3g} is above {allowed:g}"
    return rows
