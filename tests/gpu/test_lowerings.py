"""Every lowering in every precision on a CUDA device, against float64: odd sizes, strides, groups, dilation.

What a kernel writes begins as NaN, scratch between launches too, and every layer runs in two orders of threads. The
default cases meet every lowering and every precision; `-m slow` runs each of them on every problem, and on random ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import emulator
import pytest
import tvm

from gemmify.conformance import check, compile_cases
from gemmify.errors import InputError
from gemmify.kernels import on_machine
from gemmify.layer import compile_layer
from gemmify.random_layers import random_layers
from lowering import LOWERINGS, DenseProblem, Lowering, Problem, TransposedConvProblem, conv2d
from lowering.epilogue import EpilogueOp
from schedules import Gpu, machine_of

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
PROBLEMS: dict[str, Problem] = {
    "plain": conv2d(16, 9, 7, 24, 3, n=2),
    "odd": conv2d(5, 11, 8, 7, 3, n=3, d=2),
    "groups": conv2d(16, 9, 7, 24, 3, s=2, n=2, g=2),
    "depthwise": conv2d(24, 7, 9, 24, 3, g=24, n=2),
    "pointwise": conv2d(40, 6, 5, 33, 1, n=2, p=0),
    "cover": conv2d(6, 4, 4, 10, 4, p=0, n=3),
    "dense": DenseProblem(5, 72, 33),
    "transposed": TransposedConvProblem(2, 8, 12, (5, 4), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), (1, 0)),
}
EPILOGUE = (EpilogueOp("bias", 0), EpilogueOp("add", 1), EpilogueOp("relu"))
DEFAULT = {
    ("float32", "plain"),
    ("float16", "plain"),
    ("tf32", "dense"),
    ("bfloat16", "groups"),
    ("float16", "depthwise"),
    ("tf32", "pointwise"),
    ("bfloat16", "transposed"),
}
CASES = [
    pytest.param(precision, name, marks=[] if (precision, name) in DEFAULT else pytest.mark.slow)
    for precision in PRECISIONS
    for name in PROBLEMS
]


def usable(problem: Problem, gpu: Gpu) -> list[Lowering]:
    """The lowerings that apply to a problem on a GPU."""
    staged = on_machine(problem, gpu)
    return [lowering for lowering in LOWERINGS.values() if lowering.applicable(staged) is None]


def wrong(problem: Problem, precision: str, ops: Any, goal: tvm.target.Target, emulated: bool) -> Iterator[str]:
    """What is wrong with any lowering of `problem` in `precision`."""
    gpu = machine_of(goal)
    assert isinstance(gpu, Gpu) and gpu.allow_tf32 == (precision == "tf32")
    problem = replace(problem, dtype="float32" if precision == "tf32" else precision)
    for layer in compile_cases([(problem, ops)], gpu, goal, usable(problem, gpu)):
        for order in (0, 1) if emulated else (0,):
            if emulated:
                emulator.set_order(order)
            if (said := check(layer, ops)) is not None:
                yield f"order {order}: {said}"


@pytest.mark.parametrize(("precision", "name"), CASES)
def test_numbers(precision: str, name: str, target: Callable[..., Any], emulated: bool) -> None:
    assert not list(wrong(PROBLEMS[name], precision, EPILOGUE, target(tf32=precision == "tf32"), emulated))


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_75", marks=pytest.mark.slow)])
def test_older_gpus(arch: str, target: Callable[..., Any], emulated: bool) -> None:
    """mma on sm_80; on sm_75 no asynchronous copies."""
    if not emulated:
        pytest.skip("a real GPU is of one architecture")
    emulator.set_capability(arch)
    assert not list(wrong(PROBLEMS["plain"], "float16", (), target(arch), emulated))


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_random_layers(precision: str, target: Callable[..., Any], emulated: bool) -> None:
    found = (p for p in random_layers(PRECISIONS.index(precision)) if p.dtype == "float32")
    for problem in islice(found, 6):
        assert not list(wrong(problem, precision, EPILOGUE[::2], target(tf32=precision == "tf32"), emulated))


def test_every_lowering_and_precision_runs_by_default(gpu: Gpu) -> None:
    met = {lowering.key for _, name in DEFAULT for lowering in usable(PROBLEMS[name], gpu)}
    refused = {key for key, low in LOWERINGS.items() if all(low not in usable(p, gpu) for p in PROBLEMS.values())}
    assert met == set(LOWERINGS) - refused
    assert {precision for precision, _ in DEFAULT} == set(PRECISIONS)
    assert refused == {"im2row-strip", "fft"}


def test_a_layer_alone(target: Callable[..., Any]) -> None:
    """`compile_layer` runs, times, and refuses what makes no sense on a GPU."""
    problem = PROBLEMS["dense"]
    layer = compile_layer(problem, "dense", target(), epilogue=())
    assert check(layer, ()) is None
    assert all(seconds > 0 for seconds in layer.time(repeat=2, warmup=1))
    with pytest.raises(InputError, match="im2row-strip does not apply: needs a cache"):
        compile_layer(PROBLEMS["plain"], "im2row-strip", target())


@pytest.mark.parametrize("key", ["indirect-gemm", "precomp-gemm"])
@pytest.mark.parametrize("c", [3, 8])
def test_tables_of_offsets_are_not_read_past_their_ends(target: Callable[..., Any], key: str, c: int) -> None:
    """Rows and steps that fill up a block have no entry in the table."""
    layer = compile_layer(conv2d(c, 15, 15, 17, 3, s=2), key, target(), epilogue=())
    assert check(layer, ()) is None
