"""Every lowering that applies, on more than 500 random layers with random epilogues, against float64.

Everything that a kernel writes is NaN beforehand, so that an element left out shows. The kernels of one batch of layers
are compiled together; `gemmify.conformance` holds the check itself. Beside the numbers, what `cost` reports must be
what is allocated, to the byte. The first parts run by default, the others with `-m slow`: compiling a layer in one
lowering takes about 0.2 s.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import pytest
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from oracle import random_epilogue, random_problem

from gemmify.conformance import Case, check, compile_cases
from lowering import LOWERINGS, ConvProblem, DenseProblem, Problem, TransposedConvProblem, conv2d
from lowering.epilogue import EpilogueOp
from schedules import Machine, parse_target

PROBLEMS, BATCH = 504, 21
DEFAULT_PARTS = 3
PARTS = [pytest.param(i, marks=[] if i < DEFAULT_PARTS else pytest.mark.slow) for i in range(PROBLEMS // BATCH)]


@lru_cache(maxsize=1)
def random_cases() -> list[Case]:
    """PROBLEMS different layers, each with its epilogue; the same ones in every run."""
    found: dict[Problem, tuple[EpilogueOp, ...]] = {}

    @settings(
        max_examples=3 * PROBLEMS,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(random_problem(), random_epilogue())
    def collect(problem: Problem, ops: tuple[EpilogueOp, ...]) -> None:
        if len(found) < PROBLEMS:
            found.setdefault(problem, ops)

    collect()
    cases = list(found.items())
    # Hypothesis starts from the simplest: mixed, every batch takes about as long.
    random.Random(0).shuffle(cases)
    return cases


# Layers of the networks at reduced channel counts, each with an odd tail that no tile divides.
NAMED: dict[str, Problem] = {
    "alexnet:conv1": conv2d(3, 59, 59, 24, 11, 4, 2),
    "alexnet:conv2": conv2d(12, 13, 13, 40, 5, g=2),
    "alexnet:fc8": DenseProblem(1, 300, 1000 // 8 + 1),
    "vgg:conv1.1": conv2d(3, 30, 30, 33, 3),
    "vgg:conv3.2": conv2d(24, 14, 14, 36, 3),
    "resnet50:conv1": conv2d(3, 45, 45, 20, 7, 2, 3),
    "resnet50:res4-3x3": conv2d(36, 14, 14, 36, 3),
    "resnet50:res5-3x3": conv2d(40, 7, 7, 48, 3),
    "resnet50:res3-stride-1x1": conv2d(40, 15, 15, 52, 1, 2),
    "googlenet:5x5-reduced": conv2d(12, 14, 14, 20, 5),
    "squeezenet:conv10": conv2d(32, 13, 13, 100, 1),
    "mobilenet:depthwise": conv2d(33, 14, 14, 33, 3, g=33),
    "mobilenet:depthwise-stride": conv2d(48, 15, 15, 48, 3, 2, g=48),
    "lenet:conv-covers-input": conv2d(6, 5, 5, 31, 5, p=0),
    "wavenet:dilated-1d": ConvProblem(1, 13, 29, (61,), (2,), (1,), (8,), (0,), (8,)),
    "c3d:conv1": ConvProblem(1, 3, 18, (5, 11, 9), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "inception:1x7": ConvProblem(1, 16, 19, (12, 12), (1, 7), (1, 1), (0, 3), (0, 3), (1, 1)),
    "dcgan:up-4x4": TransposedConvProblem(1, 19, 21, (4, 4), (4, 4), (2, 2), (1, 1), (1, 1), (1, 1), (0, 0)),
    "unet:up-2x2": TransposedConvProblem(1, 23, 17, (7, 7), (2, 2), (2, 2), (0, 0), (0, 0), (1, 1), (0, 0)),
    "decoder:up-3x3": TransposedConvProblem(1, 14, 20, (7, 7), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), (1, 1), 2),
    "batch-of-3": conv2d(8, 9, 9, 17, 3, n=3),
}


@pytest.fixture(scope="module")
def target() -> tvm.target.Target:
    return parse_target("llvm")


@pytest.mark.parametrize("part", PARTS)
def test_random_layers(part: int, target: tvm.target.Target) -> None:
    cases = random_cases()
    assert len(cases) == PROBLEMS
    run_cases(cases[part * BATCH : (part + 1) * BATCH], target)


@pytest.mark.parametrize("part", range(3))
def test_layers_of_networks(part: int, target: tvm.target.Target) -> None:
    ops = (EpilogueOp("bias", 0), EpilogueOp("add", 1), EpilogueOp("relu"))
    run_cases([(problem, ops) for problem in list(NAMED.values())[part::3]], target)


def run_cases(cases: Sequence[Case], target: tvm.target.Target) -> None:
    ops_of = dict(cases)
    layers = compile_cases(cases, Machine.from_target(target), target)
    assert len(layers) >= len(cases)
    wrong = [found for layer in layers if (found := check(layer, ops_of[layer.kernels.problem])) is not None]
    assert not wrong, "\n".join(wrong)


def test_random_layers_cover_every_lowering() -> None:
    for key, lowering in LOWERINGS.items():
        count = sum(lowering.applicable(problem) is None for problem, _ in random_cases())
        assert count >= 10, f"{key} applies to {count} random layers only"
