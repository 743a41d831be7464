"""The catalogue: every way to compute a layer as matrix multiplications, in order of preference.

`LOWERINGS` is the one list that plans, the command line, the tests and the documentation are derived from. `direct`
stands last: it always applies.
"""

from __future__ import annotations

from .base import GemmAxes, GemmShape, Lowering, LoweringCost, Reason, Stage, Tile
from .cct_balanced import CctBalanced
from .col2im import Col2im
from .dense import Dense
from .depthwise import Depthwise
from .direct import Direct
from .fft import Fft
from .im2col import Im2col
from .im2col_batched import Im2colBatched
from .im2row import Im2row
from .im2row_strip import Im2rowStrip
from .implicit_gemm import ImplicitGemm
from .indirect_gemm import IndirectGemm
from .kn2col import Kn2col
from .kn2row import Kn2row
from .kn2row_aa import Kn2rowAa
from .kn2row_as import Kn2rowAs
from .mec import Mec
from .pointwise import Pointwise
from .precomp_gemm import PrecompGemm
from .problem import ConvProblem, DenseProblem, Problem, TransposedConvProblem, conv2d
from .registry import Registry
from .sub_convolution import SubConvolution
from .winograd import Winograd2, Winograd4, Winograd6

LOWERINGS: dict[str, Lowering] = {
    lowering.key: lowering
    for lowering in (
        Dense(),
        Pointwise(),
        Depthwise(),
        ImplicitGemm(),
        PrecompGemm(),
        IndirectGemm(),
        Winograd2(),
        Winograd4(),
        Winograd6(),
        Fft(),
        Im2row(),
        Im2rowStrip(),
        Im2col(),
        Im2colBatched(),
        Mec(),
        CctBalanced(),
        Kn2row(),
        Kn2col(),
        Kn2rowAs(),
        Kn2rowAa(),
        SubConvolution(),
        Col2im(),
        Direct(),
    )
}

_registry = Registry(LOWERINGS)
register, unregister, registered = _registry.register, _registry.unregister, _registry.registered
catalogue = _registry.catalogue
"""LOWERINGS with what installed packages offer as entry points `gemmify.lowerings`, loaded at the first call."""

__all__ = [
    "LOWERINGS",
    "CctBalanced",
    "Col2im",
    "ConvProblem",
    "Dense",
    "DenseProblem",
    "Depthwise",
    "Direct",
    "Fft",
    "GemmAxes",
    "GemmShape",
    "Im2col",
    "Im2colBatched",
    "Im2row",
    "Im2rowStrip",
    "ImplicitGemm",
    "IndirectGemm",
    "Kn2col",
    "Kn2row",
    "Kn2rowAa",
    "Kn2rowAs",
    "Lowering",
    "LoweringCost",
    "Mec",
    "Pointwise",
    "PrecompGemm",
    "Problem",
    "Reason",
    "Stage",
    "SubConvolution",
    "Tile",
    "TransposedConvProblem",
    "Winograd2",
    "Winograd4",
    "Winograd6",
    "catalogue",
    "conv2d",
    "register",
    "registered",
    "unregister",
]
