"""The named shapes of the suites: every convolution of the zoo's networks, and GEMMs of the sizes that matter."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import numpy as np

from gemmify.errors import InputError
from gemmify.zoo import ZOO
from gemmify.zoo.builder import Builder, Tensor
from lowering import ConvProblem, DenseProblem, Problem, conv2d

# (m, n, k) of C[m,n] = sum_k A[m,k] B[k,n], by what they stand for.
_GEMMS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "square": tuple((s, s, s) for s in (64, 128, 256, 512, 1024, 2048)),
    "skinny": ((1, 1000, 2048), (1, 4096, 9216), (7, 512, 512), (8, 1000, 4096), (1000, 8, 1024), (4096, 16, 256)),
    "conv": ((3136, 64, 576), (784, 128, 1152), (196, 256, 2304), (49, 512, 4608), (3136, 64, 64), (196, 1024, 256)),
    "fc": ((256, 192, 1152),),  # the worked example of Warden 2015
    "odd": ((31, 37, 41), (97, 101, 103), (251, 257, 263), (509, 521, 523)),
}


LOWERING_NETWORKS = ("alexnet", "vgg16", "googlenet", "resnet50")
# What none of these networks has: a large kernel with stride 1, for which the literature takes a Fourier transform.
_LARGE_KERNELS = {"large:11x11": conv2d(64, 56, 56, 64, 11)}


class _Recorder(Builder):
    """A network's builder that notes each convolution and draws no weights."""

    def __init__(self, name: str) -> None:
        super().__init__(name, seed=0)
        self.found: dict[str, ConvProblem] = {}

    def constant(self, name: str, values: np.ndarray) -> str:
        return name

    def uniform(self, name: str, shape: tuple[int, ...], low: float, high: float) -> str:
        return name

    def conv(
        self, name: str, x: Tensor, m: int, k: int, stride: int = 1, pad: int = 0, groups: int = 1, bias: bool = True
    ) -> Tensor:
        n, c, h, w = x.shape
        self.found[name] = conv2d(c, h, w, m, k, stride, pad, n=n, g=groups)
        return super().conv(name, x, m, k, stride, pad, groups, bias)


def network_convolutions(network: str) -> dict[str, ConvProblem]:
    """`{layer name: problem}` of every convolution of a zoo network at batch 1, in the network's order."""
    recorder = _Recorder(network)
    ZOO[network](recorder, recorder.input("data", (1, 3, 224, 224)))
    return recorder.found


def layers_suite(networks: Iterable[str] = tuple(ZOO)) -> dict[str, ConvProblem]:
    """Every distinct convolution of the zoo, or of some of its networks, under its first name `network:layer`."""
    suite: dict[str, ConvProblem] = {}
    seen: set[ConvProblem] = set()
    for network in networks:
        for layer, problem in network_convolutions(network).items():
            if problem not in seen:
                seen.add(problem)
                suite[f"{network}:{layer}"] = problem
    return suite


def gemm_suite() -> dict[str, DenseProblem]:
    """`{"square:512x512x512": problem, ...}`: rows m, outputs n, inputs k of a fully connected layer."""
    return {f"{kind}:{m}x{n}x{k}": DenseProblem(m, k, n) for kind, sizes in _GEMMS.items() for m, n, k in sizes}


def lowerings_suite() -> dict[str, ConvProblem]:
    """Every distinct convolution of the networks that the literature measures, named as in the suite `layers`, and a
    large kernel."""
    return {**layers_suite(LOWERING_NETWORKS), **_LARGE_KERNELS}


def representatives(shapes: Mapping[str, Problem]) -> dict[str, Problem]:
    """One layer a network, kernel, stride and output size: that with the most multiply-adds, the first of equals."""
    most: dict[tuple[object, ...], str] = {}
    for name, problem in shapes.items():
        window = (problem.kernel, problem.stride, problem.out_size) if isinstance(problem, ConvProblem) else (name,)
        kind = (name.partition(":")[0], *window)
        if kind not in most or problem.macs > shapes[most[kind]].macs:
            most[kind] = name
    return {name: problem for name, problem in shapes.items() if name in most.values()}


SUITES: dict[str, Callable[[], Mapping[str, Problem]]] = {
    "layers": layers_suite,
    "gemm": gemm_suite,
    "lowerings": lowerings_suite,
}


def select_shapes(suite: str, layer: str | None = None) -> dict[str, Problem]:
    """The shapes of a suite, or those whose name is `layer` or matches it as a pattern (`resnet50:*`).

    Raises InputError for a suite or a layer that there is not; the message names close ones.
    """
    if suite not in SUITES:
        raise InputError(f"unknown suite {suite!r}; choose from {', '.join(SUITES)}")
    shapes: dict[str, Problem] = dict(SUITES[suite]())
    if layer is None:
        return shapes
    found = {name: problem for name, problem in shapes.items() if fnmatchcase(name, layer)}
    if not found:
        close = difflib.get_close_matches(layer, shapes, n=3, cutoff=0.3) or list(shapes)[:3]
        raise InputError(f"suite {suite!r} has no layer {layer!r}; close ones are {', '.join(close)}")
    return found
