"""What an import gives: a Relax module whose `main` takes the model's real inputs, and the names and types of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import tvm


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its name in the model, its shape, and its dtype by numpy's name ("float32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ImportedModel:
    """A validated model.

    `mod["main"]` takes exactly `inputs` (in this order, of static shapes), holds the weights as constants, keeps
    activations in the model's layout (NCHW for ONNX), and returns the one output or a tuple of `outputs` in this order.
    The binding of every layer (convolution, matrix product) bears the layer's name. `source` is the ONNX model with its
    input shapes fixed, where the model came from ONNX.
    """

    name: str
    mod: tvm.IRModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source: onnx.ModelProto | None = None
