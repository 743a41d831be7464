"""A small builder of ONNX graphs with seeded weights, scaled so that activations keep a sane size through the network.

Real weights are not needed to compile or to time a network, but their *size* matters: with a careless scale a deep
network overflows or its softmax saturates, and a comparison of two outputs then says nothing. The builder therefore
carries an estimate of the mean square of every tensor, and scales each layer's weights (after He) to make it 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 17
IR_VERSION = 8

# By how much a k x k max pooling raises the mean square of a rectified map, about; measured on these networks.
_MAX_POOL_GAIN = {2: 1.6, 3: 2.0}


@dataclass(frozen=True)
class Tensor:
    """A value of the graph under construction: its name, its shape (NCHW or NC) and its estimated mean square.

    `rectified` says that most of it is not negative, so that a ReLU leaves its mean square about as it is.
    """

    name: str
    shape: tuple[int, ...]
    power: float
    rectified: bool = False

    @property
    def channels(self) -> int:
        return self.shape[1]


class Builder:
    """Adds one layer a call; every call takes and returns a `Tensor`. The same seed gives the same bytes."""

    def __init__(self, name: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        # Filled in place: protobuf copies whatever is handed over whole, which for VGG is half a gigabyte each time.
        self.proto = onnx.ModelProto(ir_version=IR_VERSION, producer_name="gemmify")
        self.proto.opset_import.append(helper.make_opsetid("", OPSET))
        self.graph = self.proto.graph
        self.graph.name = name

    def input(self, name: str, shape: Sequence[int]) -> Tensor:
        """A graph input, taken to be of mean square 1."""
        self.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return Tensor(name, tuple(shape), 1.0)

    def constant(self, name: str, values: np.ndarray) -> str:
        """An initializer holding `values` as raw little-endian bytes; returns its name."""
        self.graph.initializer.add(
            name=name,
            dims=values.shape,
            raw_data=values.tobytes(),
            data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
        )
        return name

    def uniform(self, name: str, shape: tuple[int, ...], low: float, high: float) -> str:
        """A float32 weight, uniform in [low, high): several times faster to draw than a normal one."""
        values = self.rng.random(shape, dtype=np.float32)
        values *= np.float32(high - low)
        values += np.float32(low)
        return self.constant(name, values)

    def _weight(self, name: str, shape: tuple[int, ...], power: float) -> str:
        limit = (3.0 / (prod(shape[1:]) * power)) ** 0.5  # a uniform on [-a, a] has variance a^2 / 3
        return self.uniform(name, shape, -limit, limit)

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        shape: tuple[int, ...],
        power: float,
        rectified: bool = False,
        **attributes: object,
    ) -> Tensor:
        """A node `name` of one output `name_out`, whose shape and estimated mean square the caller knows."""
        self.graph.node.append(helper.make_node(op, list(inputs), [f"{name}_out"], name=name, **attributes))
        return Tensor(f"{name}_out", shape, power, rectified)

    def conv(
        self, name: str, x: Tensor, m: int, k: int, stride: int = 1, pad: int = 0, groups: int = 1, bias: bool = True
    ) -> Tensor:
        """Conv of `m` output channels, kernel k x k; the result has mean square about 1."""
        n, c, h, w = x.shape
        inputs = [x.name, self._weight(f"{name}_weight", (m, c // groups, k, k), x.power)]
        if bias:
            inputs.append(self.uniform(f"{name}_bias", (m,), -0.1, 0.1))
        out = tuple((size + 2 * pad - k) // stride + 1 for size in (h, w))
        return self.node(
            "Conv",
            name,
            inputs,
            (n, m, *out),
            1.0,
            kernel_shape=[k, k],
            strides=[stride] * 2,
            pads=[pad] * 4,
            group=groups,
        )

    def batch_norm(self, name: str, x: Tensor, scale: float = 1.0) -> Tensor:
        """Batch normalization with statistics near the truth; the result has mean square about `scale`^2."""
        c = (x.channels,)
        inputs = [
            x.name,
            self.uniform(f"{name}_gamma", c, 0.8 * scale, 1.2 * scale),
            self.uniform(f"{name}_beta", c, -0.1, 0.1),
            self.uniform(f"{name}_mean", c, -0.1, 0.1),
            self.uniform(f"{name}_var", c, 0.8 * x.power, 1.2 * x.power),
        ]
        return self.node("BatchNormalization", name, inputs, x.shape, scale * scale, epsilon=1e-5)

    def relu(self, name: str, x: Tensor) -> Tensor:
        return self.node("Relu", name, [x.name], x.shape, x.power if x.rectified else x.power / 2, rectified=True)

    def relu6(self, name: str, x: Tensor) -> Tensor:
        bounds = [self.constant(f"{name}_{end}", np.array(v, np.float32)) for end, v in (("min", 0), ("max", 6))]
        return self.node("Clip", name, [x.name, *bounds], x.shape, x.power / 2, rectified=True)

    def lrn(self, name: str, x: Tensor) -> Tensor:
        """Local response normalization with AlexNet's constants."""
        return self.node("LRN", name, [x.name], x.shape, x.power, x.rectified, size=5, alpha=1e-4, beta=0.75, bias=1.0)

    def max_pool(self, name: str, x: Tensor, k: int, stride: int, pads: Sequence[int] = (0, 0, 0, 0)) -> Tensor:
        n, c, h, w = x.shape
        out = ((h + pads[0] + pads[2] - k) // stride + 1, (w + pads[1] + pads[3] - k) // stride + 1)
        return self.node(
            "MaxPool",
            name,
            [x.name],
            (n, c, *out),
            x.power * _MAX_POOL_GAIN[k],
            x.rectified,
            kernel_shape=[k, k],
            strides=[stride] * 2,
            pads=list(pads),
        )

    def global_average_pool(self, name: str, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        # What is left of a rectified map after averaging is its mean: of a half-rectified normal, 1/pi of its power.
        return self.node("GlobalAveragePool", name, [x.name], (n, c, 1, 1), x.power / np.pi)

    def concat(self, name: str, xs: Sequence[Tensor]) -> Tensor:
        n, _, h, w = xs[0].shape
        c = sum(x.channels for x in xs)
        power = sum(x.power * x.channels for x in xs) / c
        return self.node("Concat", name, [x.name for x in xs], (n, c, h, w), power, xs[0].rectified, axis=1)

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.node("Add", name, [x.name, y.name], x.shape, x.power + y.power, x.rectified or y.rectified)

    def flatten(self, name: str, x: Tensor) -> Tensor:
        return self.node("Flatten", name, [x.name], (x.shape[0], prod(x.shape[1:])), x.power, x.rectified, axis=1)

    def fc(self, name: str, x: Tensor, m: int) -> Tensor:
        """Fully connected layer `Y[n, m] = X[n, c] W[m, c]^T + b`, as a Gemm with transB."""
        inputs = [
            x.name,
            self._weight(f"{name}_weight", (m, x.channels), x.power),
            self.uniform(f"{name}_bias", (m,), -0.1, 0.1),
        ]
        return self.node("Gemm", name, inputs, (x.shape[0], m), 1.0, transB=1)

    def softmax(self, x: Tensor) -> Tensor:
        """Softmax over the classes; its result is the graph's output `prob`."""
        self.graph.node.append(helper.make_node("Softmax", [x.name], ["prob"], name="softmax", axis=1))
        return Tensor("prob", x.shape, 0.0)

    def finish(self, output: Tensor) -> onnx.ModelProto:
        """The finished model, with `output` as its result: its inputs are the real ones, its weights initializers."""
        self.graph.output.append(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, output.shape))
        return self.proto
