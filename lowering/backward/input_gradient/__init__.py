"""The lowerings of `InputGradientProblem`, one a file, in order of preference."""

from .im2col import Im2col
from .implicit_gemm import ImplicitGemm

__all__ = ["Im2col", "ImplicitGemm"]
