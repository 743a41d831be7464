"""The ONNX graph as the importer works on it: nodes, constants as arrays, real inputs; shape inference on demand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from gemmify.errors import InputError, UnsupportedError
from gemmify.frontend.imported import TensorSpec
from gemmify.frontend.load import first_line

# Constants above this many elements cannot be a shape, a pad or an axis: shape inference need not see them.
_SMALL = 1024

# Types whose raw bytes can be taken as they are: onnx's own conversion copies them once more.
_PLAIN: dict[int, type] = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.DOUBLE: np.float64}


@dataclass
class Graph:
    """A graph being prepared for import. Nodes are in topological order and have unique names.

    `output_types` are the outputs' ONNX element types as declared; `types` maps a value's name to its (shape, element
    type) as far as shape inference knows them.
    """

    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    inputs: list[TensorSpec]
    outputs: list[str]
    opsets: dict[str, int]
    output_types: dict[str, int]
    types: dict[str, tuple[tuple[int, ...] | None, int]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return self.opsets.get("", self.opsets.get("ai.onnx", 1))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The static shape of a value, or None where it is not known."""
        if name in self.constants:
            return self.constants[name].shape
        return self.types.get(name, (None, 0))[0]

    def fresh(self, stem: str) -> str:
        """A value name that the graph does not use yet."""
        used = {v for n in self.nodes for v in (*n.input, *n.output)}
        used.update(self.constants, (i.name for i in self.inputs))
        name, count = stem, 0
        while name in used:
            count += 1
            name = f"{stem}_{count}"
        return name

    def add_constant(self, stem: str, values: np.ndarray) -> str:
        """Add a constant under a new name made from `stem`; returns the name."""
        name = self.fresh(stem)
        self.constants[name] = values
        return name

    def prune(self) -> None:
        """Drop nodes and constants that no output needs."""
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(used_names(node))
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}

    def light_model(self) -> onnx.ModelProto:
        """The graph with every large constant turned into an input: quick to check and to infer shapes on."""

        def info(name: str, dtype: np.dtype | str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

        small = {n: v for n, v in self.constants.items() if v.size <= _SMALL}
        inputs = [info(s.name, s.dtype, s.shape) for s in self.inputs]
        inputs += [info(n, v.dtype, v.shape) for n, v in self.constants.items() if n not in small]
        outputs = [onnx.ValueInfoProto(name=name) for name in self.outputs]
        for output in outputs:
            output.type.tensor_type.elem_type = self.output_types[output.name]
        graph = helper.make_graph(self.nodes, "light", inputs, outputs)
        graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in small.items())
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=min(10, onnx.IR_VERSION))

    def infer(self) -> None:
        """Refresh `types` by ONNX shape inference. Raises InputError where the shapes contradict each other."""
        try:
            model = onnx.shape_inference.infer_shapes(self.light_model(), strict_mode=True, data_prop=True)
        except Exception as error:  # InferenceError, or TypeError / ValidationError from the C++ side
            raise InputError(f"the model's shapes do not fit together: {_inference_reason(error)}") from None
        for info in (*model.graph.input, *model.graph.value_info, *model.graph.output):
            tensor = info.type.tensor_type
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
            known = tensor.HasField("shape") and all(d >= 0 for d in dims)
            self.types[info.name] = (tuple(dims) if known else None, tensor.elem_type)


def _inference_reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if "(op_type:" in line or "Error" in line]
    return (lines[-1] if lines else first_line(error)).strip()


def used_names(node: onnx.NodeProto) -> Iterator[str]:
    """Every value name that a node reads, in its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from used_names(inner)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The node's attributes by name, as Python values (strings decoded)."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: v.decode() if isinstance(v, bytes) else v for name, v in values.items()}


def set_attributes(node: onnx.NodeProto, **values: object) -> None:
    """Set attributes; None removes one."""
    kept = [a for a in node.attribute if a.name not in values]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(helper.make_attribute(name, v) for name, v in values.items() if v is not None)


def refuse(node: onnx.NodeProto, what: str) -> UnsupportedError:
    """The error for a form of an operator that cannot be imported."""
    return UnsupportedError(f"{node.op_type} (node {node.name!r}) {what}, which cannot be imported")


def to_graph(model: onnx.ModelProto, inputs: list[TensorSpec]) -> Graph:
    """The working graph of `model`, whose real inputs (with static shapes) are `inputs`. Raises InputError."""
    proto = model.graph
    constants = {t.name: _array(t) for t in proto.initializer}
    for sparse in proto.sparse_initializer:
        constants[sparse.values.name] = _dense(sparse)
    nodes = []
    names: set[str] = set()
    for original in proto.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.domain == "ai.onnx":
            node.domain = ""
        base = node.name or next((o for o in node.output if o), node.op_type)
        node.name, count = base, 0
        while node.name in names:
            count += 1
            node.name = f"{base}_{count}"
        names.add(node.name)
        nodes.append(node)
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    types = {o.name: o.type.tensor_type.elem_type for o in proto.output}
    return Graph(nodes, constants, inputs, list(types), opsets, types)


def _array(tensor: onnx.TensorProto) -> np.ndarray:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise InputError(
            f"the weight {tensor.name!r} lies in another file: pass the path of the .onnx file, not its bytes"
        )
    if tensor.data_type == onnx.TensorProto.STRING:
        raise UnsupportedError(f"the constant {tensor.name!r} holds strings, which cannot be compiled")
    try:
        if tensor.data_type in _PLAIN and tensor.HasField("raw_data") and sys.byteorder == "little":
            return np.frombuffer(tensor.raw_data, _PLAIN[tensor.data_type]).reshape(tuple(tensor.dims))
        return numpy_helper.to_array(tensor)
    except Exception as error:  # ValueError, or onnx's own TypeError for an unknown data type
        want = prod(tensor.dims)
        raise InputError(
            f"the weight {tensor.name!r} of shape {list(tensor.dims)} ({want} elements) "
            f"cannot be read: {first_line(error)}"
        ) from None


def _dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    values, indices = _array(sparse.values), _array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    where = tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, dense.shape)
    dense[where] = values
    return dense
