"""The two gradients of a layer, as problems of their own: what is given, what is asked.

With the output's gradient `dO = dL/dO` of a loss L, training needs, for every convolution (and fully connected layer),

    dI[n, i, c] = sum_{o, k: o s + k d - p = i} sum_m dO[n, o, m] W[m, k, c]          `InputGradientProblem`
    dW[m, k, c] = sum_{n, o} dO[n, o, m] I[n, o s + k d - p, c]                       `WeightGradientProblem`

Both are named by their forward problem, and both execute as many multiply-adds as it. A fully connected layer is the
convolution of one pixel. `lowering.backward` holds their lowerings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from .problem import ConvProblem, DenseProblem, TransposedConvProblem


@dataclass(frozen=True)
class GradientProblem:
    """What both gradients share: the forward problem, in which every size is derived."""

    forward: ConvProblem | DenseProblem

    @cached_property
    def conv(self) -> ConvProblem:
        """The forward problem as a convolution: itself, or one pixel under a kernel of one."""
        forward = self.forward
        if isinstance(forward, ConvProblem):
            return forward
        one, none = (1,), (0,)
        return ConvProblem(forward.n, forward.c, forward.m, one, one, one, none, none, one, 1, forward.dtype)

    @property
    def dtype(self) -> str:
        return self.forward.dtype

    @property
    def element(self) -> int:
        """Bytes an element, `e` in the formulas."""
        return self.forward.element

    @property
    def macs(self) -> int:
        """Multiply-adds by the definition, those of the forward pass: `N Ho Wo M K^2 C/g`."""
        return self.forward.macs

    def _size(self, pixels: tuple[int, ...], channels: int, layout: str) -> tuple[int, ...]:
        if isinstance(self.forward, DenseProblem):
            return (self.forward.n, channels)
        return (self.conv.n, channels, *pixels) if layout == "NCHW" else (self.conv.n, *pixels, channels)

    def input_size(self, layout: str = "NHWC") -> tuple[int, ...]:
        """Shape of the layer's input `I`, and of its gradient: `(N, *size, C)`."""
        return self._size(self.conv.size, self.conv.c, layout)

    def output_size(self, layout: str = "NHWC") -> tuple[int, ...]:
        """Shape of the layer's output `O`, and of its gradient: `(N, *out, M)`."""
        return self._size(self.conv.out_size, self.conv.m, layout)

    def weight_size(self) -> tuple[int, ...]:
        """Shape of the weight `W`, and of its gradient: `(M, *kernel, C/g)`."""
        if isinstance(self.forward, DenseProblem):
            return (self.forward.m, self.forward.c)
        return (self.conv.m, *self.conv.kernel, self.conv.c_group)

    def operand_shapes(self, layout: str = "NHWC") -> dict[str, tuple[int, ...]]:
        """The operands by the names that stages read, in the order in which they are given."""
        raise NotImplementedError

    def result_shape(self, layout: str = "NHWC") -> tuple[int, ...]:
        """Shape of the gradient that is computed."""
        raise NotImplementedError


@dataclass(frozen=True)
class InputGradientProblem(GradientProblem):
    """`dI` of the module's equation, from `data` = dO and `weight` = W. Positions that no window reads get 0."""

    def operand_shapes(self, layout: str = "NHWC") -> dict[str, tuple[int, ...]]:
        return {"data": self.output_size(layout), "weight": self.weight_size()}

    def result_shape(self, layout: str = "NHWC") -> tuple[int, ...]:
        return self.input_size(layout)

    @cached_property
    def transposed(self) -> TransposedConvProblem:
        """The transposed convolution that it is: C and M exchanged, dO its input.

        `output_padding` is what the floor in the forward output's size left over: the input's last rows that no window
        reaches, and that must be written as 0 all the same.
        """
        conv = self.conv
        sides = zip(conv.padded_size, conv.out_size, conv.stride, conv.dilation, conv.kernel, strict=True)
        over = tuple(hp - (o - 1) * s - d * (k - 1) - 1 for hp, o, s, d, k in sides)
        window = (conv.kernel, conv.stride, conv.pad_before, conv.pad_after, conv.dilation)
        return TransposedConvProblem(conv.n, conv.m, conv.c, conv.out_size, *window, over, conv.groups, conv.dtype)


@dataclass(frozen=True)
class WeightGradientProblem(GradientProblem):
    """`dW` of the module's equation, from `data` = dO and `input` = I: two activations, nothing to fold."""

    def operand_shapes(self, layout: str = "NHWC") -> dict[str, tuple[int, ...]]:
        return {"data": self.output_size(layout), "input": self.input_size(layout)}

    def result_shape(self, layout: str = "NHWC") -> tuple[int, ...]:
        del layout
        return self.weight_size()

    @property
    def reduction(self) -> int:
        """Length of the sum, the `k` of its GEMM: `N Ho Wo`."""
        return self.conv.n * prod(self.conv.out_size)
