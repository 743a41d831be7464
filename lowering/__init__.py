"""The catalogue: every way to compute a layer as matrix multiplications, in order of preference.

`LOWERINGS` is the one list that plans, the command line, the tests and the documentation are derived from. `direct`
stands last: it always applies.
"""

from __future__ import annotations

from .base import GemmAxes, GemmShape, Lowering, LoweringCost, Reason, Stage, Tile
from .dense import Dense
from .depthwise import Depthwise
from .direct import Direct
from .im2col import Im2col
from .im2row import Im2row
from .implicit_gemm import ImplicitGemm
from .pointwise import Pointwise
from .problem import ConvProblem, DenseProblem, Problem, conv2d
from .winograd import Winograd2, Winograd4, Winograd6

LOWERINGS: dict[str, Lowering] = {
    lowering.key: lowering
    for lowering in (
        Dense(),
        Pointwise(),
        Depthwise(),
        ImplicitGemm(),
        Winograd2(),
        Winograd4(),
        Winograd6(),
        Im2row(),
        Im2col(),
        Direct(),
    )
}

__all__ = [
    "LOWERINGS",
    "ConvProblem",
    "Dense",
    "DenseProblem",
    "Depthwise",
    "Direct",
    "GemmAxes",
    "GemmShape",
    "Im2col",
    "Im2row",
    "ImplicitGemm",
    "Lowering",
    "LoweringCost",
    "Pointwise",
    "Problem",
    "Reason",
    "Stage",
    "Tile",
    "Winograd2",
    "Winograd4",
    "Winograd6",
    "conv2d",
]
