"""Rewriting ONNX nodes into the forms that the importer reads rightly.

TVM's importer (0.27) misreads some legal forms: it pads MaxPool with auto_pad SAME_LOWER wrongly, pads convolutions
with auto_pad by a copy, rounds pooled sizes up past the end (ceil_mode), takes opset 10's Resize scales for a region
of interest, has no opset 9 Slice, and no Upsample of opset 9. Every rule below removes one such form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from gemmify.frontend.graph import Graph, attributes, refuse, set_attributes, used_names
from gemmify.frontend.windows import resolve_conv, resolve_conv_transpose, resolve_pool

Rule = Callable[[Graph, onnx.NodeProto], Any]  # gives the nodes to put before this one, or None


def simplify(graph: Graph) -> None:
    """Rules that need no shapes: drop Dropout, Identity and empty attributes, fold the factors of Gemm."""
    used = set(graph.outputs).union(*(used_names(n) for n in graph.nodes))
    for node in graph.nodes:
        empty = [a.name for a in node.attribute if a.type == onnx.AttributeProto.INTS and not a.ints]
        set_attributes(node, **dict.fromkeys(empty))
        rule = _EARLY.get(node.op_type)
        if rule and node.domain == "":
            rule(graph, node)
        _drop_unused_outputs(node, used)
    _bypass_identity(graph)


def resolve(graph: Graph) -> None:
    """Rules that need the shapes of `graph.types` (padding by number, sizes of Resize), and those for old opsets."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        rule = _LATE.get(node.op_type) if node.domain == "" else None
        before = rule(graph, node) if rule else None
        nodes += [*(before or []), node]
    graph.nodes = nodes


def _drop_unused_outputs(node: onnx.NodeProto, used: set[str]) -> None:
    """The importer gives these operators their first output only; the others are optional."""
    if node.op_type not in ("MaxPool", "BatchNormalization", "Dropout", "LayerNormalization"):
        return
    keep = max((i + 1 for i, name in enumerate(node.output) if name in used), default=1)
    del node.output[keep:]
    if keep > 1:
        raise refuse(node, f"whose extra output {node.output[keep - 1]!r} is used")


def _bypass_identity(graph: Graph) -> None:
    source: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = source.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in graph.outputs:
            source[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    graph.nodes = kept


def _dropout(graph: Graph, node: onnx.NodeProto) -> None:
    training = graph.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if len(node.input) > 2 and node.input[2] and (training is None or training.any()):
        raise refuse(node, "in training mode")
    if len(node.output) < 2 or not any(node.output[1] in n.input for n in graph.nodes):
        node.op_type = "Identity"
        del node.input[1:], node.output[1:], node.attribute[:]


def _batch_norm(graph: Graph, node: onnx.NodeProto) -> None:
    values = attributes(node)
    if values.get("training_mode"):
        raise refuse(node, "in training mode")
    if not values.get("spatial", 1):
        raise refuse(node, "with spatial=0 (statistics of each position)")
    set_attributes(node, spatial=None, momentum=None)


def _gemm(graph: Graph, node: onnx.NodeProto) -> None:
    """A constant B becomes [c, m] with alpha in it, a constant C takes up beta: what is left is `A B + C`."""
    values: dict[str, Any] = attributes(node)
    b = graph.constants.get(node.input[1])
    if b is not None and (values.get("transB") or values.get("alpha", 1.0) != 1.0):
        b = b.T if values.get("transB") else b  # a view: the copy is made once, when the constant is
        b = b if values.get("alpha", 1.0) == 1.0 else (b * values["alpha"]).astype(b.dtype)
        node.input[1] = graph.add_constant(f"{node.input[1]}_folded", b)
        set_attributes(node, transB=None, alpha=None)
    c = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    if c is not None and values.get("beta", 1.0) not in (0.0, 1.0):
        node.input[2] = graph.add_constant(f"{node.input[2]}_folded", (c * values["beta"]).astype(c.dtype))
        set_attributes(node, beta=None)


def _slice(graph: Graph, node: onnx.NodeProto) -> None:
    """Opset 1's attributes become opset 10's inputs."""
    values: dict[str, Any] = attributes(node)
    if "starts" in values:
        axes = values.get("axes") or list(range(len(values["starts"])))
        parts = {"starts": values["starts"], "ends": values["ends"], "axes": axes}
        node.input.extend(graph.add_constant(f"{node.name}_{k}", np.array(v, np.int64)) for k, v in parts.items())
        del node.attribute[:]


def _top_k(graph: Graph, node: onnx.NodeProto) -> None:
    """Opset 10's input k becomes opset 1's attribute, which is what the importer reads below opset 11."""
    if graph.opset == 10:
        count = graph.constants.get(node.input[1])
        if count is None:
            raise refuse(node, "with a k known only at run time")
        set_attributes(node, k=int(count.item()))
        del node.input[1:]


def _upsample(graph: Graph, node: onnx.NodeProto) -> None:
    """Upsample (opset 7: scales as attribute, 9: as input) and Resize of opset 10 are Resize without half pixels.

    "nearest" takes the value before on an axis that grows, and the one after on an axis that shrinks: the example
    `resize_downsample_nearest` of opset 10.
    """
    values: dict[str, Any] = attributes(node)
    if "scales" in values:
        node.input.append(graph.add_constant(f"{node.name}_scales", np.array(values["scales"], np.float32)))
    x, scales = node.input[:2]
    del node.input[:], node.attribute[:]
    node.op_type = "Resize"
    node.input.extend([x, "", scales])
    mode = str(values.get("mode", "nearest"))
    factors = graph.constants.get(scales)
    shrinks, grows = (False, False) if factors is None else (bool((factors < 1).any()), bool((factors > 1).any()))
    if mode == "nearest" and shrinks and grows:
        raise refuse(node, "of mode nearest that makes one axis larger and another smaller, below opset 11")
    set_attributes(
        node,
        mode="linear" if mode == "bilinear" else mode,
        coordinate_transformation_mode="asymmetric",
        nearest_mode="ceil" if shrinks else "floor",
    )


# What TVM's resize knows; its tf_crop_and_resize would need the region of interest, which is left out.
_COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")


def _resize(graph: Graph, node: onnx.NodeProto) -> None:
    """Every Resize gets constant `sizes` of full rank; TVM derives the scales from them, so they must agree."""
    if node.op_type == "Upsample" or graph.opset <= 10:
        _upsample(graph, node)
    values: dict[str, Any] = attributes(node)
    if values.get("antialias") or values.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise refuse(node, "with antialias or keep_aspect_ratio_policy")
    if values.get("coordinate_transformation_mode", "half_pixel") not in _COORDINATES:
        raise refuse(node, f"with coordinate_transformation_mode {values['coordinate_transformation_mode']}")
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    if before is None or after is None or before[:2] != after[:2] or len(before) not in (3, 4, 5):
        raise refuse(node, "of a size known only at run time, or of other than the last one to three axes")
    inputs = [*node.input, "", "", ""]
    scales = graph.constants.get(inputs[2])
    if scales is not None and scales.size:
        axes = list(values.get("axes") or range(len(before)))
        exact = [before[a] * float(s) for a, s in zip(axes, scales, strict=True)]
        if any(abs(size - after[a]) > 1e-3 for a, size in zip(axes, exact, strict=True)):
            raise refuse(node, f"with scales {scales.tolist()} that give no whole sizes")
    sizes = graph.add_constant(f"{node.name}_sizes", np.array(after, np.int64))
    del node.input[1:]
    node.input.extend(["", "", sizes])
    set_attributes(node, axes=None, keep_aspect_ratio_policy=None, antialias=None)


_EARLY: dict[str, Callable[[Graph, onnx.NodeProto], None]] = {
    "Dropout": _dropout,
    "BatchNormalization": _batch_norm,
    "Gemm": _gemm,
}
# Late also where a rule makes a form that the graph's opset does not know: shape inference must not meet it.
_LATE: dict[str, Rule] = {
    "Conv": resolve_conv,
    "ConvTranspose": resolve_conv_transpose,
    "MaxPool": resolve_pool,
    "AveragePool": resolve_pool,
    "LpPool": resolve_pool,
    "Slice": _slice,
    "TopK": _top_k,
    "Upsample": _resize,
    "Resize": _resize,
}
