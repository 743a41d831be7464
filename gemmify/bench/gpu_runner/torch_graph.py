"""A network in PyTorch: an interpreter of the bundle's graph (ONNX's operators) with torch.nn.functional.

Activations and weights are channels_last. With `fused` a convolution takes the addition and the ReLU behind it along
(cuDNN's fused calls), where nothing else reads what lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Node = Mapping[str, Any]
Work = Callable[[Any, Node, list[Any]], Any]


def _window(node: Node) -> tuple[list[int], list[int], list[int], list[int]]:
    """(strides, pads before, pads after, dilations)"""
    attributes = node["attributes"]
    dims = len(attributes["kernel_shape"])
    pads = attributes.get("pads", [0] * 2 * dims)
    ones = [1] * dims
    return attributes.get("strides", ones), pads[:dims], pads[dims:], attributes.get("dilations", ones)


def _conv(torch: Any, node: Node, inputs: list[Any]) -> Any:
    strides, before, after, dilations = _window(node)
    x, bias = inputs[0], inputs[2] if len(inputs) > 2 else None
    if before != after:
        x, before = _padded(torch, x, before, after, 0.0), [0] * len(before)
    groups = node["attributes"].get("group", 1)
    if node.get("then") is None:
        return torch.nn.functional.conv2d(x, inputs[1], bias, strides, before, dilations, groups)
    if node["then"] == "relu":
        return torch.cudnn_convolution_relu(x, inputs[1], bias, strides, before, dilations, groups)
    return torch.cudnn_convolution_add_relu(x, inputs[1], inputs[-1], 1.0, bias, strides, before, dilations, groups)


def _padded(torch: Any, x: Any, before: list[int], after: list[int], value: float) -> Any:
    sides = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    return torch.nn.functional.pad(x, sides, value=value)


def _max_pool(torch: Any, node: Node, inputs: list[Any]) -> Any:
    strides, before, after, _ = _window(node)
    x = inputs[0]
    if before != after:
        x, before = _padded(torch, x, before, after, float("-inf")), [0] * len(before)
    return torch.nn.functional.max_pool2d(x, node["attributes"]["kernel_shape"], strides, before)


def _average_pool(torch: Any, node: Node, inputs: list[Any]) -> Any:
    strides, before, after, _ = _window(node)
    if before != after:
        raise NotImplementedError("AveragePool with pads that are not symmetric")
    counted = bool(node["attributes"].get("count_include_pad", 0))
    return torch.nn.functional.avg_pool2d(
        inputs[0], node["attributes"]["kernel_shape"], strides, before, count_include_pad=counted
    )


def _gemm(torch: Any, node: Node, inputs: list[Any]) -> Any:
    attributes = node["attributes"]
    a = inputs[0].t() if attributes.get("transA") else inputs[0]
    b = inputs[1].t() if attributes.get("transB") else inputs[1]
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if len(inputs) < 3:
        return torch.mm(a, b) if alpha == 1.0 else alpha * torch.mm(a, b)
    return torch.addmm(inputs[2], a, b, alpha=alpha, beta=beta)


def _clip(torch: Any, node: Node, inputs: list[Any]) -> Any:
    attributes = node["attributes"]
    bounds = [attributes.get("min"), attributes.get("max")]
    for i, bound in enumerate(inputs[1:3]):
        bounds[i] = None if bound is None else bound
    if not any(torch.is_tensor(bound) for bound in bounds):
        return torch.clamp(inputs[0], bounds[0], bounds[1])
    low, high = (None if b is None else torch.as_tensor(b, device=inputs[0].device) for b in bounds)
    return torch.clamp(inputs[0], low, high)


def _lrn(torch: Any, node: Node, inputs: list[Any]) -> Any:
    a = node["attributes"]
    constants = a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0)
    return torch.nn.functional.local_response_norm(inputs[0], a["size"], *constants)


def _batch_norm(torch: Any, node: Node, inputs: list[Any]) -> Any:
    x, scale, shift, mean, variance = inputs
    epsilon = node["attributes"].get("epsilon", 1e-5)
    return torch.nn.functional.batch_norm(x, mean, variance, scale, shift, eps=epsilon)


OPERATORS: dict[str, Work] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "LRN": _lrn,
    "BatchNormalization": _batch_norm,
    "MatMul": lambda torch, node, inputs: torch.matmul(*inputs),
    "Relu": lambda torch, node, inputs: torch.relu(inputs[0]),
    "Sigmoid": lambda torch, node, inputs: torch.sigmoid(inputs[0]),
    "Tanh": lambda torch, node, inputs: torch.tanh(inputs[0]),
    "Add": lambda torch, node, inputs: torch.add(*inputs),
    "Mul": lambda torch, node, inputs: torch.mul(*inputs),
    "Concat": lambda torch, node, inputs: torch.cat(inputs, node["attributes"]["axis"]),
    "GlobalAveragePool": lambda torch, node, inputs: torch.nn.functional.adaptive_avg_pool2d(inputs[0], 1),
    "Flatten": lambda torch, node, inputs: inputs[0].flatten(node["attributes"].get("axis", 1)),
    "Softmax": lambda torch, node, inputs: torch.softmax(inputs[0], node["attributes"].get("axis", -1)),
    "Dropout": lambda torch, node, inputs: inputs[0],
    "Identity": lambda torch, node, inputs: inputs[0],
    "Cast": lambda torch, node, inputs: inputs[0].to(getattr(torch, node["attributes"]["to"])),
}


@dataclass
class TorchGraph:
    """The network: `run(inputs)` gives its outputs. `values` are the weights by name."""

    torch: Any
    nodes: list[Node]
    outputs: list[str]
    values: dict[str, Any]

    def run(self, inputs: Mapping[str, Any]) -> list[Any]:
        known = {**self.values, **inputs}
        for node in self.nodes:
            given = [known[name] if name else None for name in node["inputs"]]
            known[node["outputs"][0]] = OPERATORS[node["op"]](self.torch, node, given)
        return [known[name] for name in self.outputs]


def unknown_operators(nodes: list[Node]) -> list[str]:
    """The operators that this interpreter does not know."""
    return sorted({node["op"] for node in nodes} - set(OPERATORS))


def fuse(nodes: list[Node], outputs: list[str]) -> list[Node]:
    """Conv, Relu and Conv, Add, Relu as one node each, where nothing else reads what lies between."""
    readers: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        for name in node["inputs"]:
            readers.setdefault(name, []).append(number)
    made: dict[int, Node] = {}
    gone: set[int] = set()
    for number, node in enumerate(nodes):
        if node["op"] == "Relu" and (found := _chain(nodes, number, readers, outputs, gone)) is not None:
            made[number], used = found
            gone |= used
    return [made.get(number, node) for number, node in enumerate(nodes) if number not in gone]


def _chain(
    nodes: list[Node], relu: int, readers: dict[str, list[int]], outputs: list[str], gone: set[int]
) -> tuple[Node, set[int]] | None:
    """The fused node that ends in the ReLU of that number, and the nodes that it stands for."""
    producers = {node["outputs"][0]: number for number, node in enumerate(nodes[:relu])}

    def only(name: str, op: str) -> int | None:
        number = producers.get(name)
        if number is None or number in gone or nodes[number]["op"] != op:
            return None
        return number if len(readers[name]) == 1 and name not in outputs else None

    source = nodes[relu]["inputs"][0]
    conv = only(source, "Conv")
    if conv is not None and len(nodes[conv]["inputs"]) == 3:
        return {**nodes[conv], "outputs": nodes[relu]["outputs"], "then": "relu"}, {conv}
    add = only(source, "Add")
    if add is None:
        return None
    for name, other in (nodes[add]["inputs"], nodes[add]["inputs"][::-1]):
        conv = only(name, "Conv")
        if conv is not None and len(nodes[conv]["inputs"]) == 3:
            inputs = [*nodes[conv]["inputs"], other]
            return {**nodes[conv], "inputs": inputs, "outputs": nodes[relu]["outputs"], "then": "add"}, {add, conv}
    return None
