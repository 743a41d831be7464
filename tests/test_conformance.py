"""Every lowering that applies, on more than 500 random layers with random epilogues, against float64.

Everything that a kernel writes is NaN beforehand, so that an element left out shows. The kernels of one batch of layers
are compiled together. Beside the numbers, what `cost` reports must be what is allocated, to the byte. The first parts
run by default, the others with `-m slow`: compiling a layer in one lowering takes about 0.2 s.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from oracle import (
    UNIT,
    apply_epilogue,
    channels_first,
    magnitude,
    random_arrays,
    random_epilogue,
    random_problem,
    reference,
)

from gemmify.kernels import LayerKernels, layer_kernels, operand_shape
from gemmify.layer import LayerKernel
from gemmify.pipeline_build import TIR_PIPELINE
from lowering import LOWERINGS, ConvProblem, DenseProblem, Problem, conv2d
from lowering.epilogue import EpilogueOp
from schedules import Machine, parse_target

PROBLEMS, BATCH = 504, 21
DEFAULT_PARTS = 3
PARTS = [pytest.param(i, marks=[] if i < DEFAULT_PARTS else pytest.mark.slow) for i in range(PROBLEMS // BATCH)]
Case = tuple[Problem, tuple[EpilogueOp, ...]]


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
    "batch-of-3": conv2d(8, 9, 9, 17, 3, n=3),
}


class _Function:
    """One kernel of a module that holds many, where a LayerKernel asks for `main`."""

    def __init__(self, module: Any, name: str) -> None:
        self._module, self._name = module, name

    def __getitem__(self, _: str) -> Any:
        return self._module[self._name]


def compile_cases(cases: Sequence[Case], machine: Machine, target: tvm.target.Target) -> list[LayerKernel]:
    """Every lowering that applies to every case, in one module."""
    built: list[LayerKernels] = []
    for problem, ops in cases:
        usable = [lowering for lowering in LOWERINGS.values() if lowering.applicable(problem) is None]
        built += [layer_kernels(lowering, problem, machine, ops) for lowering in usable]
    names = [[f"f{i}_{j}" for j in range(len(b.kernels))] for i, b in enumerate(built)]
    functions = {
        name: kernel.func.with_attr("global_symbol", name)
        for b, own in zip(built, names, strict=True)
        for kernel, name in zip(b.kernels, own, strict=True)
    }
    module = tvm.compile(tvm.IRModule(functions), target=target, tir_pipeline=TIR_PIPELINE)
    return [LayerKernel(b, [_Function(module, name) for name in own]) for b, own in zip(built, names, strict=True)]


@dataclass(frozen=True, eq=False)
class Expected:
    """What a case computes: its arrays (channels last), the float64 result, and the largest `sum |a| |b|`."""

    data: np.ndarray
    weight: np.ndarray
    operands: list[np.ndarray]
    result: np.ndarray
    peak: float


@lru_cache(maxsize=64)
def expected(problem: Problem, ops: tuple[EpilogueOp, ...]) -> Expected:
    data, weight = random_arrays(problem, 7)
    rng = np.random.default_rng(11)
    shapes = [operand_shape(op, problem, "NHWC") for op in ops if op.operand is not None]
    operands = [rng.standard_normal(shape).astype(problem.dtype) for shape in shapes]
    result = apply_epilogue(reference(problem, data, weight), ops, operands)
    return Expected(data, weight, operands, result, float(magnitude(problem, data, weight).max()))


def check(layer: LayerKernel, ops: tuple[EpilogueOp, ...]) -> str | None:
    """What is wrong with a compiled layer, or None."""
    problem, lowering, cost = layer.kernels.problem, layer.kernels.lowering, layer.kernels.cost
    want = expected(problem, ops)
    if lowering.layout == "NCHW":
        operands = [channels_first(o) if o.ndim > 1 else o for o in want.operands]
        got = np.moveaxis(layer.run(channels_first(want.data), want.weight, operands), 1, -1)
    else:
        got = layer.run(want.data, want.weight, want.operands)
    packed = sum(int(np.prod(k.shape)) * problem.element for k in layer.kernels.kernels if k.kind == "weight")
    where = f"{lowering.key} {layer.kernels.tile} {problem} {ops}"
    if layer.workspace_bytes != cost.workspace_bytes:
        return f"{where}: cost says {cost.workspace_bytes} bytes of workspace, {layer.workspace_bytes} are allocated"
    if packed != cost.weight_bytes:
        return f"{where}: cost says {cost.weight_bytes} bytes of weights, {packed} are stored"
    limit = tolerance(problem.dtype, want, cost.error_growth, ops)
    worst = float(np.max(np.abs(got - want.result)))
    # A NaN compares as False: it must fail.
    return None if worst <= limit else f"{where}: error {worst:.2e}, limit {limit:.2e}"


def tolerance(dtype: str, want: Expected, growth: float, ops: Sequence[EpilogueOp]) -> float:
    """The largest absolute error allowed: rounding of the sum, carried through the epilogue, and the epilogue's own."""
    unit, peak = UNIT[dtype], want.peak
    error = 2 * unit * (growth + 2) * peak
    for op in ops:
        size = float(np.abs(want.operands[op.operand]).max()) if op.operand is not None else 1.0
        # No other step has a slope above 1.5 (hardswish), none maps |v| beyond |v| + 1.
        error = (error * size if op.kind in ("scale", "mul") else 1.5 * error) + 8 * unit * (peak + size)
        peak = peak * size if op.kind in ("scale", "mul") else peak + size
    return error


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
