"""Padding of convolutions and pools as plain numbers: auto_pad, ceil_mode and output_shape are worked out here.

A window operator of kernel k, dilation d and stride s on a size n, padded by p before and q after, has the size
`floor((n + p + q - d(k-1) - 1) / s) + 1`; with ceil_mode the quotient is rounded up, but a window that would start
in the padding after the input is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from gemmify.frontend.graph import Graph, attributes, refuse, set_attributes


@dataclass(frozen=True)
class Window:
    """A window's numbers, one entry a spatial dimension; `size` is the input's."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))


def read_window(graph: Graph, node: onnx.NodeProto) -> Window:
    """The window of a Conv, ConvTranspose or pool node, with auto_pad worked out. Raises UnsupportedError."""
    values: dict[str, Any] = attributes(node)
    shape = graph.shape(node.input[0])
    weight = graph.shape(node.input[1]) if len(node.input) > 1 else None
    if shape is None or ("kernel_shape" not in values and weight is None):
        raise refuse(node, "of an input whose shape is known only at run time")
    size = shape[2:]
    kernel = tuple(values.get("kernel_shape") or (weight or ())[2:])
    ones = (1,) * len(size)
    stride, dilation = tuple(values.get("strides", ones)), tuple(values.get("dilations", ones))
    pads = list(values.get("pads", (0,) * 2 * len(size)))
    mode = values.get("auto_pad", "NOTSET")
    if mode == "VALID":
        pads = [0] * 2 * len(size)
    elif mode in ("SAME_UPPER", "SAME_LOWER") and node.op_type != "ConvTranspose":
        pads = _same(size, kernel, stride, dilation, mode)
    if any(p < 0 for p in pads):
        raise refuse(node, f"with negative padding {pads}")
    return Window(size, kernel, stride, dilation, tuple(pads[: len(size)]), tuple(pads[len(size) :]))


def _same(
    size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], mode: str
) -> list[int]:
    before, after = [], []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before + after


def resolve_conv(graph: Graph, node: onnx.NodeProto) -> None:
    """Explicit pads, strides, dilations and kernel_shape on a Conv."""
    w = read_window(graph, node)
    set_attributes(
        node, auto_pad=None, pads=[*w.before, *w.after], strides=w.stride, dilations=w.dilation, kernel_shape=w.kernel
    )


def resolve_conv_transpose(graph: Graph, node: onnx.NodeProto) -> None:
    """Explicit pads and output_padding on a ConvTranspose: its output has size
    `s (n - 1) + output_padding + d(k-1) + 1 - p - q`."""
    values: dict[str, Any] = attributes(node)
    w = read_window(graph, node)
    extra = list(values.get("output_padding", (0,) * len(w.size)))
    before, after = list(w.before), list(w.after)
    same = values.get("auto_pad") in ("SAME_UPPER", "SAME_LOWER")
    target = values.get("output_shape")
    if target is not None or same:
        sizes = [n * s for n, s in zip(w.size, w.stride, strict=True)]
        sizes = sizes if target is None else list(target)[-len(sizes) :]
        for i, out in enumerate(sizes):
            total = w.stride[i] * (w.size[i] - 1) + extra[i] + w.extent[i] - out
            if total < 0:  # larger than the full result: zeros after it
                extra[i], total = extra[i] - total, 0
            large = total - total // 2
            before[i], after[i] = (total // 2, large) if values.get("auto_pad") == "SAME_UPPER" else (large, total // 2)
    if any(e >= s for e, s in zip(extra, w.stride, strict=True) if e):
        raise refuse(node, f"with output padding {extra} that is not below its strides {list(w.stride)}")
    set_attributes(
        node,
        auto_pad=None,
        output_shape=None,
        pads=[*before, *after],
        strides=w.stride,
        dilations=w.dilation,
        kernel_shape=w.kernel,
        output_padding=extra,
    )


def resolve_pool(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Explicit padding without ceil_mode on a pool; gives a Pad node to put before it where padding counts, but what
    rounding up adds must not."""
    values: dict[str, Any] = attributes(node)
    w = read_window(graph, node)
    after = list(w.after)
    if values.get("ceil_mode"):
        for i, (n, e, s) in enumerate(zip(w.size, w.extent, w.stride, strict=True)):
            span = n + w.before[i] + w.after[i] - e
            last = -(-span // s) * s  # where the last window starts, counted from the padding before
            if last >= n + w.before[i]:
                last -= s
            after[i] += max(last - span, 0)
    if node.op_type == "MaxPool" and values.get("storage_order"):
        set_attributes(node, storage_order=None)  # matters to the indices only, which are not supported
    grown = tuple(after) != w.after
    counts = bool(values.get("count_include_pad")) or node.op_type == "LpPool"
    inserted = []
    if grown and counts and node.op_type == "AveragePool":
        inserted.append(_pad(graph, node, w))
        before, after = [0] * len(w.size), [a - b for a, b in zip(after, w.after, strict=True)]
        counts = False
    else:
        before = list(w.before)
    set_attributes(
        node,
        auto_pad=None,
        ceil_mode=None,
        pads=[*before, *after],
        strides=w.stride,
        dilations=w.dilation,
        kernel_shape=w.kernel,
    )
    if node.op_type == "AveragePool":
        set_attributes(node, count_include_pad=int(counts))
    return inserted


def _pad(graph: Graph, node: onnx.NodeProto, w: Window) -> onnx.NodeProto:
    """Zero padding as a node of its own, in the form of the graph's opset; `node` then reads its result."""
    pads = [0, 0, *w.before, 0, 0, *w.after]
    padded = graph.fresh(f"{node.name}_padded")
    x = node.input[0]
    node.input[0] = padded
    name = f"{node.name}_pad"
    if graph.opset < 11:
        return helper.make_node("Pad", [x], [padded], name=name, pads=pads)
    return helper.make_node("Pad", [x, graph.add_constant(name, np.array(pads, np.int64))], [padded], name=name)
