"""Bytes and files -> a complete ONNX ModelProto, or one sentence that says what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from gemmify.errors import InputError

ZIP_MAGIC = b"PK\x03\x04"  # torch.export and torch.save write zip archives


def read_file(path: Path) -> bytes:
    """The bytes of a model file. Raises InputError where it is missing, a directory, unreadable or empty."""
    if path.is_dir():
        raise InputError(f"{path} is a directory, but a model file (.onnx or .pt2) is required")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"the model file {path} does not exist") from None
    except OSError as error:
        raise InputError(f"the model file {path} cannot be read: {error.strerror or error}") from None
    if not data:
        raise InputError(f"{path} is empty: it holds no model")
    return data


def parse_onnx(data: bytes, what: str) -> onnx.ModelProto:
    """Parse a serialized ModelProto; `what` names it in errors. Raises InputError for anything else."""
    if not data:
        raise InputError(f"{what} is empty: it holds no model")
    if data.startswith(ZIP_MAGIC):
        raise InputError(f"{what} is a zip archive, not an ONNX model (a torch.export file must be named *.pt2)")
    if data.startswith(b"\x7fELF"):
        raise InputError(f"{what} is a compiled library, not a model: give the model that it was made from")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, ValueError):  # ValueError: a string field that is no UTF-8
        raise InputError(f"{what} is not an ONNX model, or it is truncated: its protobuf cannot be read") from None
    if not model.HasField("graph") or not model.ir_version:
        # Random bytes can parse as a message of unknown fields.
        raise InputError(f"{what} is not an ONNX model: it has no {'graph' if model.ir_version else 'IR version'}")
    return model


def load_onnx_file(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with the external data that lies beside it. Raises InputError."""
    model = parse_onnx(read_file(path), str(path))
    if any(uses_external_data(t) for t in model.graph.initializer):
        try:
            load_external_data_for_model(model, str(path.parent))
        except Exception as error:  # onnx raises its checker's error, OSError or ValueError here
            raise InputError(
                f"{path} keeps weights in a file beside it that cannot be read: {first_line(error)}"
            ) from None
    return model


def first_line(error: BaseException) -> str:
    """The part of an error that says what is wrong, in one line: without traceback, context and file positions."""
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("Traceback", "File ", "==>", "Stack trace", "Context:")
    lines = [line for line in lines if line and not line.startswith(noise)]
    said = lines[0] if lines else type(error).__name__
    return re.sub(r"T\.u?int\d+\((-?\d+)\)", r"\1", said)  # TVM's spelling of a plain number
