"""A layer in float64, and how far a compiled one is from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemmify.layer import LayerKernel
from gemmify.layer_reference import channels_first, reference
from lowering import Problem
from lowering.base import activation_shape, weight_shape


@dataclass(frozen=True, eq=False)
class Exact:
    """Inputs of a layer with bias and ReLU (channels last), and `want`, its float64 output before the ReLU."""

    data: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    want: np.ndarray

    @staticmethod
    def draw(problem: Problem, rng: np.random.Generator) -> Exact:
        """Uniform in -1/2 .. 1/2."""
        shapes = (activation_shape(problem), weight_shape(problem), (problem.m,))
        data, weight, bias = ((rng.random(shape) - 0.5).astype(problem.dtype) for shape in shapes)
        return Exact(data, weight, bias, reference(problem, data, weight) + bias)

    @property
    def largest(self) -> float:
        """The largest absolute output before the ReLU."""
        return float(np.abs(self.want).max())

    def bind(self, kernel: LayerKernel, sign: int = 1) -> None:
        """Give `kernel` these inputs; with `sign` -1 the data and the bias negated. All that it writes is NaN."""
        data = self.data if kernel.kernels.lowering.layout == "NHWC" else channels_first(self.data)
        kernel.bind(sign * data, self.weight, [sign * self.bias])

    def error(self, kernel: LayerKernel) -> float:
        """Run `kernel` (with bias and ReLU) on these inputs, and leave it bound to them: the largest difference of an
        output from `want`, over the largest absolute output; NaN where an output is not written.

        The ReLU hides half of the outputs. With data and bias negated it hides the other half, and
        `v = relu(v) - relu(-v)`: two runs show every output.
        """
        self.bind(kernel, -1)
        kernel()
        negative = self._channels_last(kernel)
        self.bind(kernel)
        kernel()
        return float(np.abs(self._channels_last(kernel) - negative - self.want).max()) / self.largest

    def error_after_relu(self, kernel: LayerKernel) -> float:
        """The same of the output that stands there, which `kernel` last computed: its ReLU included."""
        return float(np.abs(self._channels_last(kernel) - np.maximum(self.want, 0)).max()) / self.largest

    def _channels_last(self, kernel: LayerKernel) -> np.ndarray:
        out = kernel.output().astype(np.float64)
        return out if kernel.kernels.lowering.layout == "NHWC" else np.moveaxis(out, 1, -1)
