"""ONNX -> Relax: checked, cleaned and normalized on the ONNX graph, then imported by TVM with our converters."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import tvm
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

from gemmify.errors import GemmifyError, InputError, UnsupportedError
from gemmify.frontend import fold, normalize, relax_module, unsupported
from gemmify.frontend.converters import CONVERTERS, Context, constant
from gemmify.frontend.graph import Graph, to_graph
from gemmify.frontend.imported import ImportedModel, TensorSpec
from gemmify.frontend.layers import name_layers
from gemmify.frontend.load import first_line
from gemmify.frontend.shapes import declared, fix_inputs, real_inputs, warn_weights

_ROUNDS = 20  # folding and shape inference feed each other; every round folds a node or ends the loop


def import_onnx(source: onnx.ModelProto, name: str, shapes: Mapping[str, Sequence[int]] | None) -> ImportedModel:
    """Import a ModelProto; the shapes of its inputs are written into `source`.

    Raises InputError for a model that is not valid or whose shapes stay open, UnsupportedError for operators (or forms
    of them) that cannot be imported; warns (GemmifyWarning) of weights that hold NaN or infinity.
    """
    unsupported.check_opsets(source)
    if not source.graph.output:
        raise InputError("the model has no outputs, so there is nothing to compute")
    if not real_inputs(source.graph):
        raise InputError("the model has no inputs, so its result is a constant and there is nothing to compile")
    before = [declared(i) for i in real_inputs(source.graph)]
    expanded = unsupported.expand_functions(source)
    unsupported.check_operators(expanded.graph.node)
    inputs = fix_inputs(source.graph, shapes)
    graph = to_graph(expanded, inputs)
    _check(graph)
    graph.prune()
    warn_weights(graph.constants)
    prepare(graph)
    mod = _import(graph)
    outputs = relax_module.output_specs(mod, graph.outputs)
    _check_batch(source, before, inputs, outputs)
    return ImportedModel(name, mod, tuple(inputs), outputs, source)


def _check(graph: Graph) -> None:
    model = graph.light_model()
    for output in model.graph.output:
        output.type.tensor_type.shape.SetInParent()  # the checker wants the field, whatever it says
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError, or what its C++ side lets through
        raise InputError(f"the model is not valid ONNX: {first_line(error)}") from None


def prepare(graph: Graph) -> None:
    """Fold constants, infer shapes, and rewrite nodes into the forms that the importer reads rightly."""
    fold.fold_constants(graph)
    normalize.simplify(graph)
    for _ in range(_ROUNDS):
        graph.infer()
        if not fold.fold_constants(graph):
            break
    graph.prune()
    normalize.resolve(graph)
    graph.prune()


class _Values(dict[str, Any]):
    """The importer's table of values, in which a constant becomes a Relax constant when it is first read."""

    def __init__(self, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.constants = constants

    def __missing__(self, name: str) -> Any:
        self[name] = constant(self.constants[name])
        return self[name]


class _Importer(ONNXGraphImporter):
    """TVM's importer on a prepared `Graph`: constants go in as arrays, and `CONVERTERS` replace its own."""

    def __init__(self, graph: Graph) -> None:
        super().__init__({}, None, keep_params_in_input=False, sanitize=False)
        self.prepared = graph
        self.layer_names: dict[str, str] = {}  # marker -> ONNX node name

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        self._nodes = _Values(self.prepared.constants)

    def _convert_operator(self, op_name: str, inputs: list[Any], attrs: dict[str, Any], opset: int) -> Any:
        node = attrs["tvm_custom"]["name"]
        try:
            convert = CONVERTERS.get(op_name)
            if convert is None:
                return super()._convert_operator(op_name, inputs, attrs, opset)
            context = Context(self.bb, opset, lambda call: self._emit_layer(call, node))
            return self.bb.normalize(convert(context, inputs, attrs))
        except GemmifyError:
            raise
        except Exception as error:  # the importer raises anything from AssertionError to TVM's own errors
            raise UnsupportedError(f"{op_name} (node {node!r}) cannot be imported: {first_line(error)}") from None

    def _emit_layer(self, call: Any, node: str) -> Any:
        marker = f"gemmify_layer_{len(self.layer_names)}"
        self.layer_names[marker] = node
        return self.bb.emit(call, name_hint=marker)


def _import(graph: Graph) -> tvm.IRModule:
    inputs = [
        onnx.helper.make_tensor_value_info(s.name, onnx.helper.np_dtype_to_tensor_dtype(_np_dtype(s)), s.shape)
        for s in graph.inputs
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in graph.outputs]
    proto = onnx.helper.make_graph(graph.nodes, "main", inputs, outputs)
    importer = _Importer(graph)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints beside raising
        warnings.simplefilter("ignore")
        try:
            mod = importer.from_onnx(proto, graph.opset)
        except Exception:
            importer.bb._end_block()  # the builder would complain on stderr of the block left open
            raise
    mod = relax_module.fold(mod)
    relax_module.check_static(mod)
    return name_layers(mod, importer.layer_names)


def _np_dtype(spec: TensorSpec) -> Any:
    import ml_dtypes  # noqa: F401  (registers bfloat16 and the float8 types with numpy)
    import numpy as np

    return np.dtype(spec.dtype)


def _check_batch(
    source: onnx.ModelProto, before: Sequence[Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """A fixed batch that was overridden must reach every output that had it: a Reshape may hold the old one."""
    changed = {
        (old[0], new.shape[0])
        for old, new in zip(before, inputs, strict=True)
        if old and isinstance(old[0], int) and old[0] != new.shape[0]
    }
    for old_batch, batch in changed:
        for value, spec in zip(source.graph.output, outputs, strict=True):
            dims = declared(value)
            if dims and dims[0] == old_batch and (not spec.shape or spec.shape[0] != batch):
                raise InputError(
                    f"the batch cannot be changed from {old_batch} to {batch}: the model fixes it inside, "
                    f"and its output {spec.name!r} came out as {list(spec.shape)}; export it with an open "
                    "batch"
                )
            value.CopyFrom(onnx.helper.make_tensor_value_info(spec.name, value.type.tensor_type.elem_type, spec.shape))
    if changed:
        del source.graph.value_info[:]
