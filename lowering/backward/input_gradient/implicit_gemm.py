"""`implicit-gemm` of the input gradient: the taps that reach an element are addresses, nothing is scattered."""

from __future__ import annotations

from ...sub_convolution import SubConvolution
from .transposed import TransposedGradient


class ImplicitGemm(TransposedGradient):
    """`dI` gathered: each phase of the input's positions (modulo the stride) is a stride-1 convolution of dO.

        dI[n, s j + r, c] = sum_{u, m} dO[n, j + base(r) - u rise, m] W[m, first(r) + u step, c]       r < s (`phases`)

    GEMM a phase, image and group `[H/s W/s x (K/s)^2 M]·[(K/s)^2 M x C]`; stride 1 is one convolution with the kernel
    flipped. Reads `data` = dO `(N, *out, M)` and `weight` = W `(M, *kernel, C/g)`, writes `(N, *size, C)`, 0 where no
    window of the forward pass reads. The workspace is dO in its frame of zeros where a tap reaches outside; where `s`
    does not divide H or W also the uncut gradient. Source: Dumoulin & Visin 2016, section 4 (arXiv 1603.07285); Chetlur
    et al. 2014, cuDNN, section 3 (arXiv 1410.0759).
    """

    key = "implicit-gemm"
    summary = "gathered: s^2 stride-1 convolutions of the output gradient, nothing scattered"
    gemm_formula = "s^2 x [H/s W/s x (K/s)^2 M]·[(K/s)^2 M x C]"
    workspace_formula = "e N M (Ho + b + a)(Wo + b + a) where a tap reaches out, + e N C s^2 ceil(H/s) ceil(W/s) if odd"
    source = "Dumoulin & Visin 2016, section 4 (arXiv 1603.07285)"
    form = SubConvolution()
