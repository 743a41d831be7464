"""Winograd in one kernel, transformed tiles and products in shared memory: numbers, launches, when it is offered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import emulator
import pytest

from gemmify.conformance import check, compile_cases
from gemmify.errors import InputError
from gemmify.kernels import layer_kernels, on_machine
from gemmify.layer import compile_layer
from lowering import LOWERINGS, ConvProblem, conv2d
from lowering.epilogue import EpilogueOp
from schedules import Gpu

EPILOGUE = (EpilogueOp("bias", 0), EpilogueOp("add", 1), EpilogueOp("relu"))
# Tiles that reach outside the image, rows that fill no register tile, more channels than a block takes at a time.
CASES = {
    "odd": ("winograd-2", conv2d(5, 11, 7, 37, 3, n=2)),
    "vectors": ("winograd-2", conv2d(16, 12, 12, 40, 3, n=2)),
    "five": ("winograd-2", conv2d(7, 9, 6, 6, 5, n=2)),
    "one image": ("winograd-4", conv2d(24, 14, 15, 33, 3, n=1)),
    "large tiles": ("winograd-4", conv2d(6, 13, 10, 35, 3, n=2)),
    "large kernel": ("winograd-4", conv2d(3, 9, 14, 3, 5, n=2)),
    "largest": ("winograd-6", conv2d(4, 11, 14, 5, 3, n=2)),
    "line": ("winograd-2", ConvProblem(2, 9, 34, (23,), (3,), (1,), (1,), (1,), (1,))),
    "volume": ("winograd-2", ConvProblem(1, 8, 5, (3, 6, 5), (1, 3, 3), (1, 1, 1), (0, 1, 1), (0, 1, 1), (1, 1, 1))),
    "few": ("winograd-4", conv2d(9, 4, 4, 2, 3, n=3)),
}


def fused(key: str) -> Any:
    return LOWERINGS[key].configured(fused=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numbers(name: str, dtype: str, target: Callable[..., Any], emulated: bool) -> None:
    key, problem = CASES[name]
    layer = compile_layer(replace(problem, dtype=dtype), fused(key), target(), epilogue=EPILOGUE)
    assert layer.workspace_bytes == layer.kernels.cost.scratch(1) == 0
    for order in (0, 1) if emulated else (0,):
        if emulated:
            emulator.set_order(order)
        assert check(layer, EPILOGUE) is None


@pytest.mark.parametrize("name", ["odd", "vectors", "large tiles"])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_threads_do_not_race(
    name: str, multiprocessors: int, target: Callable[..., Any], gpu: Gpu, only_emulated: None
) -> None:
    """On a small GPU a block takes all channels, one range of them after the other."""
    emulator.set_watched(True)
    key, problem = CASES[name]
    small = replace(gpu, multiprocessors=multiprocessors)
    for layer in compile_cases([(problem, EPILOGUE)], small, target(), [fused(key)]):
        for order in (0, 1):
            emulator.set_order(order)
            assert check(layer, EPILOGUE) is None


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
@pytest.mark.parametrize("name", CASES)
def test_one_launch(name: str, arch: str, target: Callable[..., Any]) -> None:
    """One kernel a layer beside that of the weight, on the GPU with the least shared memory, too."""
    key, problem = CASES[name]
    gpu = Gpu.from_target(target(arch))
    kernels = layer_kernels(fused(key), problem, gpu, EPILOGUE)
    assert [kernel.kind for kernel in kernels.kernels] == ["weight", "output"]
    assert kernels.kernels[-1].scratch_bytes == 0
    script = kernels.kernels[-1].func.script()
    assert script.count('"blockIdx.x"') == 1 and "alloc_shared" in script


def test_offered_where_it_fits(gpu: Gpu) -> None:
    def offer(problem: ConvProblem, key: str = "winograd-2") -> Any:
        return LOWERINGS[key].choices(on_machine(problem, gpu))

    small = conv2d(64, 56, 56, 64, 3)
    assert offer(small) == {"fused": (False, True)} == offer(small, "winograd-4")
    assert layer_kernels(LOWERINGS["winograd-2"], small, gpu).cost.workspace, "the default is unfused, as before"
    assert offer(conv2d(1024, 56, 56, 64, 3)) == {} == offer(conv2d(64, 56, 56, 64, 3, g=2))


def test_refused_where_it_does_not_fit(target: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="fused"):
        compile_layer(conv2d(1024, 8, 8, 8, 3), fused("winograd-2"), target())
