"""The problems that a lowering solves: what a layer computes, validated, with every derived size computed once.

Letters as everywhere in the project: batch `N`, input channels `C`, output channels `M`, groups `g`; the spatial sizes
of the input are `size` (`(W,)`, `(H, W)` or `(D, H, W)`), of the kernel `kernel`, and of the output `out_size`:

    out = floor((in + pad_before + pad_after - dilation (kernel - 1) - 1) / stride) + 1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar

DTYPES = ("float32", "float64", "float16", "bfloat16")


def dtype_bytes(dtype: str) -> int:
    """Bytes in one element of `dtype`."""
    return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8}[dtype]


def accumulator(dtype: str) -> str:
    """The dtype that a layer whose tensors are of `dtype` computes in, its scratch included: float32 for the halves."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


class Typed:
    """What follows from the dtype of a problem's tensors."""

    dtype: str
    staged: ClassVar[bool] = False
    """Whether every tensor between input and output is a workspace of its own: see `lowering.staged`."""

    @property
    def element(self) -> int:
        """Bytes an element of the activations and the weights, `e` in the formulas."""
        return dtype_bytes(self.dtype)

    @property
    def accumulator(self) -> str:
        """The dtype of all arithmetic and of everything between input and output."""
        return accumulator(self.dtype)

    @property
    def scratch_element(self) -> int:
        """Bytes an element of scratch: `e`, but 4 where the tensors are of 2 bytes."""
        return dtype_bytes(self.accumulator)

    @property
    def moved_element(self) -> int:
        """Bytes an element of scratch that is only moved: as stored where the problem is staged, else as computed."""
        return self.element if self.staged else self.scratch_element

    @property
    def widened(self) -> bool:
        """Whether elements are stored in fewer digits than they are computed with, and widened ahead of a GEMM."""
        return self.accumulator != self.dtype and not self.staged


@dataclass(frozen=True)
class ConvProblem(Typed):
    """A convolution (cross-correlation) of 1, 2 or 3 spatial dimensions.

        O[n, m, o] = sum_{c, k} I[n, g(m) C/g + c, o s + k d - p] W[m, c, k]

    `n`, `c`, `m` are the batch and the channel counts; the tuples hold one entry a spatial dimension, outermost first
    (H before W). Zero padding may differ before and after. Raises ValueError for sizes that make no convolution.
    """

    n: int
    c: int
    m: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad_before: tuple[int, ...]
    pad_after: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_window("a convolution", self, ("kernel", "stride", "pad_before", "pad_after", "dilation"))
        if min(self.out_size) < 1:
            raise ValueError(f"the kernel does not fit into the padded input: {self}")

    @property
    def op(self) -> str:
        """The kind of layer, as tables name it."""
        return f"conv{self.dims}d"

    @property
    def dims(self) -> int:
        """Spatial dimensions: 1, 2 or 3."""
        return len(self.size)

    @cached_property
    def padded_size(self) -> tuple[int, ...]:
        return tuple(s + a + b for s, a, b in zip(self.size, self.pad_before, self.pad_after, strict=True))

    @cached_property
    def out_size(self) -> tuple[int, ...]:
        return tuple(
            (hp - d * (k - 1) - 1) // s + 1
            for hp, d, k, s in zip(self.padded_size, self.dilation, self.kernel, self.stride, strict=True)
        )

    @property
    def pixels(self) -> int:
        """Output positions an image: `Ho Wo`."""
        return prod(self.out_size)

    @property
    def taps(self) -> int:
        """Kernel positions: `Kh Kw`."""
        return prod(self.kernel)

    @property
    def c_group(self) -> int:
        return self.c // self.groups

    @property
    def m_group(self) -> int:
        return self.m // self.groups

    @property
    def macs(self) -> int:
        """Multiply-adds by the definition: `N Ho Wo M K^2 C/g`."""
        return self.n * self.pixels * self.m * self.taps * self.c_group

    @property
    def padded(self) -> bool:
        return any(self.pad_before) or any(self.pad_after)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c and self.groups > 1


@dataclass(frozen=True)
class TransposedConvProblem(Typed):
    """A transposed convolution (a "deconvolution") of 1, 2 or 3 spatial dimensions: the scatter of a convolution.

        O[n, m, i s + k d - p] += I[n, g(m) C/g + c, i] W[m, c, k]      for every c, i, k whose target lies in O

        out = (in - 1) stride - pad_before - pad_after + dilation (kernel - 1) + 1 + output_padding

    The weight is stored `(M, *kernel, C/g)`, its kernel not flipped: the letters are those of the layer that runs, `C`
    what it reads and `M` what it writes, so that all layers share one order. (ONNX and PyTorch store
    `(C, M/g, *kernel)`.) It is also the gradient of a convolution by its input: that of `ConvProblem(n, c, m, ...)` has
    `c` and `m` swapped, reads the output's gradient, and its `output_padding` is what the floor of `out` left over.

    `pad_before` and `pad_after` cut the output, `output_padding` extends its end; an element to which nothing is added
    is 0. Raises ValueError for sizes that make no layer.
    """

    n: int
    c: int
    m: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad_before: tuple[int, ...]
    pad_after: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        names = ("kernel", "stride", "pad_before", "pad_after", "dilation", "output_padding")
        _check_window("a transposed convolution", self, names)
        if min(self.out_size) < 1:
            raise ValueError(f"the pads leave nothing of the output: {self}")

    @property
    def op(self) -> str:
        """The kind of layer, as tables name it."""
        return f"conv{self.dims}d_transpose"

    @property
    def dims(self) -> int:
        """Spatial dimensions: 1, 2 or 3."""
        return len(self.size)

    @cached_property
    def full_size(self) -> tuple[int, ...]:
        """The output that all products together reach, before anything is cut: `(in - 1) s + d (K - 1) + 1`."""
        sides = zip(self.size, self.stride, self.dilation, self.kernel, strict=True)
        return tuple((i - 1) * s + d * (k - 1) + 1 for i, s, d, k in sides)

    @cached_property
    def out_size(self) -> tuple[int, ...]:
        sides = zip(self.full_size, self.pad_before, self.pad_after, self.output_padding, strict=True)
        return tuple(full - a - b + extra for full, a, b, extra in sides)

    @property
    def pixels(self) -> int:
        """Output positions an image: `Ho Wo`."""
        return prod(self.out_size)

    @property
    def in_pixels(self) -> int:
        """Input positions an image: `H W`."""
        return prod(self.size)

    @property
    def taps(self) -> int:
        """Kernel positions: `Kh Kw`."""
        return prod(self.kernel)

    @property
    def c_group(self) -> int:
        return self.c // self.groups

    @property
    def m_group(self) -> int:
        return self.m // self.groups

    @property
    def macs(self) -> int:
        """Multiply-adds by the definition, those that the pads cut off included: `N H W M K^2 C/g`."""
        return self.n * self.in_pixels * self.m * self.taps * self.c_group

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c and self.groups > 1


@dataclass(frozen=True)
class DenseProblem(Typed):
    """A fully connected layer: `Y[n, m] = sum_c X[n, c] W[m, c]`, with `n` rows, `c` inputs and `m` outputs."""

    n: int
    c: int
    m: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if min(self.n, self.c, self.m) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype} is not one of {', '.join(DTYPES)}")

    @property
    def op(self) -> str:
        """The kind of layer, as tables name it."""
        return "dense"

    @property
    def macs(self) -> int:
        return self.n * self.c * self.m


SpatialProblem = ConvProblem | TransposedConvProblem
Problem = SpatialProblem | DenseProblem


def _check_window(what: str, problem: SpatialProblem, names: tuple[str, ...]) -> None:
    """ValueError where the sizes of a layer with a window are no sizes, or do not belong together."""
    dims = len(problem.size)
    if dims not in (1, 2, 3):
        raise ValueError(f"{what} has 1, 2 or 3 spatial dimensions, got {dims}")
    for name in names:
        value = getattr(problem, name)
        if len(value) != dims:
            raise ValueError(f"{name} needs {dims} entries, one a spatial dimension, got {value}")
        if any(v < (0 if "pad" in name else 1) for v in value):
            raise ValueError(f"{name} holds a value that is too small: {value}")
    if min(problem.n, problem.c, problem.m, problem.groups, *problem.size) < 1:
        raise ValueError(f"every size must be at least 1: {problem}")
    if problem.c % problem.groups or problem.m % problem.groups:
        raise ValueError(f"groups={problem.groups} must divide the channels C={problem.c} and M={problem.m}")
    if problem.dtype not in DTYPES:
        raise ValueError(f"dtype {problem.dtype} is not one of {', '.join(DTYPES)}")


def conv2d(
    c: int,
    h: int,
    w: int,
    m: int,
    k: int,
    s: int = 1,
    p: int | None = None,
    *,
    n: int = 1,
    d: int = 1,
    g: int = 1,
    dtype: str = "float32",
) -> ConvProblem:
    """A square two-dimensional problem in the letters of the literature; `p` defaults to "same" for odd kernels."""
    pad = d * (k - 1) // 2 if p is None else p
    return ConvProblem(n, c, m, (h, w), (k, k), (s, s), (pad, pad), (pad, pad), (d, d), g, dtype)
