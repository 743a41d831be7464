"""Constant folding on the ONNX graph: what depends on weights and shapes alone is computed before the import."""

from __future__ import annotations

import warnings
from math import prod

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from gemmify.frontend.graph import Graph, attributes

_RANDOM = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}
_DOMAINS = {"", "ai.onnx"}


def fold_constants(graph: Graph) -> bool:
    """Replace nodes of constant inputs by their results, and shape queries of known shapes; True if any was."""
    kept = []
    for node in graph.nodes:
        results = _evaluate(graph, node)
        if results is None:
            kept.append(node)
            continue
        graph.constants.update(zip(node.output, results, strict=False))
    folded = len(kept) < len(graph.nodes)
    graph.nodes = kept
    return folded


def _evaluate(graph: Graph, node: onnx.NodeProto) -> list[np.ndarray] | None:
    if node.domain not in _DOMAINS or node.op_type in _RANDOM or any(a.HasField("g") for a in node.attribute):
        return None
    shape = graph.shape(node.input[0]) if node.op_type in ("Shape", "Size") else None
    if shape is not None:
        values = attributes(node)
        part = shape[slice(values.get("start", 0), values.get("end"))]
        return [np.array(part if node.op_type == "Shape" else prod(shape), np.int64)]
    if not all(name in graph.constants for name in node.input if name):
        return None
    return _run_node(graph, node)


def _run_node(graph: Graph, node: onnx.NodeProto) -> list[np.ndarray] | None:
    """Run one node with onnx's reference implementation; None where that has none (the importer may know better)."""
    names = list(dict.fromkeys(name for name in node.input if name))
    outputs = [name for name in node.output if name]
    proto = helper.make_graph(
        [node],
        "node",
        [helper.make_empty_tensor_value_info(n) for n in names],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in graph.opsets.items()]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            model = helper.make_model(proto, opset_imports=opsets)
            results = ReferenceEvaluator(model).run(None, {n: graph.constants[n] for n in names})
    except Exception:  # the reference raises whatever numpy raises; the node then stays for the importer to judge
        return None
    if not all(isinstance(r, np.ndarray | np.generic) for r in results):
        return None
    by_name = dict(zip(outputs, results, strict=True))
    return [np.asarray(by_name.get(name, ())) for name in node.output]
