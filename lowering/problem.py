"""The problems that a lowering solves: what a layer computes, validated, with every derived size computed once.

Letters as everywhere in the project: batch `N`, input channels `C`, output channels `M`, groups `g`; the spatial sizes
of the input are `size` (`(W,)`, `(H, W)` or `(D, H, W)`), of the kernel `kernel`, and of the output `out_size`:

    out = floor((in + pad_before + pad_after - dilation (kernel - 1) - 1) / stride) + 1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

DTYPES = ("float32", "float64", "float16", "bfloat16")


def dtype_bytes(dtype: str) -> int:
    """Bytes in one element of `dtype`."""
    return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[dtype]


@dataclass(frozen=True)
class ConvProblem:
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
        dims = len(self.size)
        if dims not in (1, 2, 3):
            raise ValueError(f"a convolution has 1, 2 or 3 spatial dimensions, got {dims}")
        for name in ("kernel", "stride", "pad_before", "pad_after", "dilation"):
            value = getattr(self, name)
            if len(value) != dims:
                raise ValueError(f"{name} needs {dims} entries, one a spatial dimension, got {value}")
            if any(v < (0 if name.startswith("pad") else 1) for v in value):
                raise ValueError(f"{name} holds a value that is too small: {value}")
        if min(self.n, self.c, self.m, self.groups, *self.size) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        if self.c % self.groups or self.m % self.groups:
            raise ValueError(f"groups={self.groups} must divide the channels C={self.c} and M={self.m}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        if min(self.out_size) < 1:
            raise ValueError(f"the kernel does not fit into the padded input: {self}")

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

    @property
    def element(self) -> int:
        """Bytes an element, `e` in the formulas."""
        return dtype_bytes(self.dtype)


@dataclass(frozen=True)
class DenseProblem:
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
    def macs(self) -> int:
        return self.n * self.c * self.m

    @property
    def element(self) -> int:
        return dtype_bytes(self.dtype)


Problem = ConvProblem | DenseProblem


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
