"""Relax -> Relax: a network as it was exported, to a network of layers that the lowerings know.

`normalize` runs the five passes in their order; each is also a plain TVM module pass.
"""

from __future__ import annotations

import tvm

from .canonicalize import Canonicalize
from .epilogue import LayerSite, describe_layer
from .fold_batch_norm import FoldBatchNorm
from .gather_epilogues import LAYER_ATTR, GatherEpilogues
from .layout import ConvertLayout
from .widen_sums import WidenSums

PASSES = (Canonicalize, FoldBatchNorm, ConvertLayout, GatherEpilogues, WidenSums)


def normalize(mod: tvm.IRModule) -> tvm.IRModule:
    """`mod` with its `main` (weights as constants, NCHW operators, static shapes) canonical, folded, in NHWC layout and
    with each layer in a private function that `describe_layer` reads. The inputs and outputs keep their layouts.

    Raises ValueError where `main` is missing or holds control flow.
    """
    return tvm.transform.Sequential([pass_() for pass_ in PASSES])(mod)


__all__ = [
    "LAYER_ATTR",
    "PASSES",
    "Canonicalize",
    "ConvertLayout",
    "FoldBatchNorm",
    "GatherEpilogues",
    "LayerSite",
    "WidenSums",
    "describe_layer",
    "normalize",
]
