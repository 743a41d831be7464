"""Refusing, before the import, what the importer cannot take: all offending nodes in one sentence."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.inliner
from tvm.relax.frontend.onnx import onnx_frontend

from gemmify.errors import InputError, UnsupportedError

OLDEST_OPSET = 7
_CONTROL_FLOW = {"If", "Loop", "Scan"}
_CONTRIB = "com.microsoft"
_SHOWN = 12
_INFERRED_AS_FUNCTIONS = {"MeanVarianceNormalization"}  # onnx infers their shapes through their function bodies


def supported(node: onnx.NodeProto) -> bool:
    """Whether the importer knows the node's operator, in the node's domain."""
    if node.op_type not in onnx_frontend._get_convert_map() or node.op_type in _CONTROL_FLOW:
        return False
    contrib = not onnx.defs.has(node.op_type) or node.op_type == "Attention"  # the importer's Attention is Microsoft's
    return node.domain == _CONTRIB if contrib else node.domain in ("", "ai.onnx")


def check_opsets(model: onnx.ModelProto) -> None:
    """Raises InputError for a model without an operator set, or with one outside of what can be imported."""
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not versions:
        raise InputError("the model does not say which ONNX operator set (opset) it uses")
    if not OLDEST_OPSET <= versions[0] <= newest:
        raise InputError(
            f"the model uses opset {versions[0]}, but {OLDEST_OPSET} to {newest} are required: "
            "convert it with onnx.version_converter or export it again"
        )


def expand_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inline the model's own functions, and operators that the importer lacks but the standard defines by others."""

    def missing() -> set[str]:
        return {n.op_type for n in model.graph.node if not supported(n) and n.domain in ("", "ai.onnx")}

    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    functions = [("", op) for op in sorted(missing()) if op not in _CONTROL_FLOW and _has_body(op)]
    _write_defaults(model, {op for _, op in functions} | _INFERRED_AS_FUNCTIONS)
    if functions:
        model = onnx.inliner.inline_selected_functions(model, functions, inline_schema_functions=True)
    return model


def _write_defaults(model: onnx.ModelProto, ops: set[str]) -> None:
    """Write the default of every attribute that a node leaves out: onnx leaves references to them open."""
    version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    for node in model.graph.node:
        if node.op_type not in ops or node.domain not in ("", "ai.onnx"):
            continue
        present = {a.name for a in node.attribute}
        for name, attribute in onnx.defs.get_schema(node.op_type, version, "").attributes.items():
            default = attribute.default_value
            if name not in present and default is not None and default.name:
                node.attribute.append(default)


def _has_body(op: str) -> bool:
    if not onnx.defs.has(op):
        return False
    schema = onnx.defs.get_schema(op)
    return bool(schema.has_function or schema.has_context_dependent_function)


def check_operators(nodes: Iterable[onnx.NodeProto]) -> None:
    """Raises UnsupportedError that names every node whose operator cannot be imported."""
    bad = [
        f"{n.op_type} (node {n.name or next(iter(n.output), '')!r}, domain {n.domain or 'ai.onnx'})"
        for n in nodes
        if not supported(n)
    ]
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise UnsupportedError(f"the model uses operators that cannot be imported: {', '.join(bad[:_SHOWN])}{more}")
