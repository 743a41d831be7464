"""Front end: whatever the user has -> a validated Relax module (`ImportedModel`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemmify.errors import InputError
from gemmify.frontend.imported import ImportedModel, TensorSpec

__all__ = ["ImportedModel", "TensorSpec", "import_model"]

Shapes = Mapping[str, Sequence[int]]


def import_model(model: Any, shapes: Shapes | None = None, dtype: str | None = None) -> ImportedModel:
    """Import `model` and validate it; with `dtype` its float32 weights and activations are converted to that.

    `model` is a name of the zoo, the path of an .onnx or .pt2 file, the bytes of an ONNX model, an onnx.ModelProto, a
    torch.export.ExportedProgram, a Relax IRModule, a PrimFunc, or the list of te.Tensor that makes one (placeholders,
    then results). `shapes` gives an input's shape by name; it is required where the model leaves dimensions open, and
    may change a fixed batch (first dimension) of an ONNX model.

    Raises InputError for files and calls that are wrong, UnsupportedError for what cannot be imported.
    """
    if dtype is not None:
        from gemmify.frontend.convert_dtype import check_dtype, convert_dtype

        check_dtype(dtype)  # before the work, not after
        return convert_dtype(import_model(model, shapes), dtype)
    if isinstance(model, str | os.PathLike):
        return _import_named(model, shapes)
    if isinstance(model, bytes | bytearray | memoryview):
        from gemmify.frontend.load import parse_onnx

        return _import_proto(parse_onnx(bytes(model), "the model's data"), "model", shapes)
    if _is_model_proto(model):
        copy = type(model)()
        copy.CopyFrom(model)  # the caller's stays as it is
        return _import_proto(copy, model.graph.name or "model", shapes)
    return _import_object(model, shapes)


def _import_named(model: str | os.PathLike[str], shapes: Shapes | None) -> ImportedModel:
    """A zoo name, or a path."""
    from gemmify import zoo
    from gemmify.frontend.load import load_onnx_file, read_file

    text = os.fspath(model)
    path = Path(text)
    if isinstance(model, str) and text in zoo.ZOO:
        return _import_proto(zoo.build(text), text, shapes)
    if not path.exists() and path.name == text and not path.suffix:
        raise InputError(f"{zoo.unknown_name(text)}; nor is there a file of that name")
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth"):
        raise InputError(
            f"{path} looks like a PyTorch checkpoint, which holds weights without the network: "
            "save it with torch.export.save as .pt2, or export it to ONNX"
        )
    if suffix == ".pt2":
        from gemmify.frontend.torch_program import load_pt2

        read_file(path)
        return _import_torch(load_pt2(path), path.stem, shapes)
    return _import_proto(load_onnx_file(path), path.stem, shapes)


def _is_model_proto(model: Any) -> bool:
    return type(model).__name__ == "ModelProto"


def _import_proto(model: Any, name: str, shapes: Shapes | None) -> ImportedModel:
    from gemmify.frontend.onnx_model import import_onnx

    return import_onnx(model, name, shapes)


def _import_torch(program: Any, name: str, shapes: Shapes | None) -> ImportedModel:
    from gemmify.frontend.torch_program import from_program

    return _finish(from_program(program), name, shapes)


def _import_object(model: Any, shapes: Shapes | None) -> ImportedModel:
    import tvm

    from gemmify.frontend import tensor_expression, torch_program

    if torch_program.is_exported_program(model):
        return _import_torch(model, "model", shapes)
    if isinstance(model, tvm.IRModule):
        return _finish(model, "model", shapes)
    if isinstance(model, tvm.tirx.PrimFunc):
        return _finish(tensor_expression.from_prim_func(model), tensor_expression.NAME, shapes)
    if tensor_expression.is_tensor_list(model):
        return _finish(tensor_expression.from_tensors(model), tensor_expression.NAME, shapes)
    raise InputError(
        f"cannot import a {type(model).__name__}: a model is a zoo name, a path, ONNX bytes or "
        "ModelProto, a torch ExportedProgram, a Relax module, a PrimFunc or a list of te.Tensor"
    )


def _finish(mod: Any, name: str, shapes: Shapes | None) -> ImportedModel:
    from gemmify.frontend import relax_module

    mod = relax_module.import_relax(mod, shapes)
    inputs = relax_module.input_specs(mod)
    relax_module.check_static(mod)
    return ImportedModel(name, mod, inputs, relax_module.output_specs(mod))
