"""`im2col` of the input gradient: Caffe's form, all products in one GEMM, then col2im."""

from __future__ import annotations

from ...col2im import Col2im
from .transposed import TransposedGradient


class Im2col(TransposedGradient):
    """`dI = col2im(dO·W)`: the gradient of every patch, then added up where the patches overlap.

        col[n, o, k, c] = sum_m dO[n, o, m] W[m, k, c]
        dI[n, i, c]     = sum of col[n, o, k, c] over every o, k with o s + k d - p = i

    GEMM `[N Ho Wo x M]·[M x K^2 C]` (with groups `[N Ho Wo x M/g]·[M/g x K^2 C/g]` each). Reads `data` = dO
    `(N, *out, M)` and `weight` = W `(M, *kernel, C/g)`, writes `(N, *size, C)`; the scatter is computed as a
    gather: each element is written once, 0 where no patch reaches. Workspace `e N Ho Wo K^2 C` bytes. Source:
    Jia, "Convolution in Caffe: a memo"; Chellapilla et al. 2006, section 3.
    """

    key = "im2col"
    summary = "gradients of all patches in one GEMM, then added where they overlap (col2im)"
    gemm_formula = "[N Ho Wo x M]·[M x K^2 C]"
    workspace_formula = "e N Ho Wo K^2 C"
    source = Col2im.source
    form = Col2im()
