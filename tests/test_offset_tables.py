"""Lowerings that read offsets from a table made at compile time: `precomp-gemm` and `indirect-gemm`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from models import small_cnn
from oracle import random_arrays, reference
from tvm import te

import gemmify
from gemmify.fold import evaluate
from gemmify.kernels import layer_kernels
from gemmify.layer import compile_layer
from gemmify.pipeline_build import kernel_workspace_bytes
from lowering import LOWERINGS, ConvProblem, Problem, Tile, conv2d
from lowering.indirect_gemm import OUTSIDE, reaches_outside
from schedules import Machine, parse_target

PADDED = conv2d(16, 9, 7, 33, 3, n=2)
TABLES = ("precomp-gemm", "indirect-gemm")


def constants(key: str, problem: Problem, tile: Tile) -> dict[str, np.ndarray]:
    """The weight stages of a lowering that read nothing, folded with numpy."""
    stages = [s for s in LOWERINGS[key].build(problem, tile) if s.kind == "weight" and not s.reads]
    return {stage.name: evaluate(stage.compute(), {}) for stage in stages}


def test_one_offset_a_tap() -> None:
    """Worked by hand: 5 pixels and two pads make rows of 7, dilation 2 steps over one pixel or one row."""
    problem = ConvProblem(1, 4, 8, (5, 5), (2, 2), (1, 1), (1, 1), (1, 1), (2, 2))
    table = constants("precomp-gemm", problem, Tile(4, 16))["offsets"]
    assert table.dtype == np.int32
    assert table.tolist() == [0, 2, 14, 16]


def test_one_offset_a_pixel_and_tap() -> None:
    """Worked by hand: 3 inputs of 2 channels, kernel 3, a pad of 1 at both ends; two tiles of 2 rows."""
    problem = ConvProblem(1, 2, 8, (3,), (3,), (1,), (1,), (1,), (1,))
    found = constants("indirect-gemm", problem, Tile(2, 16))
    assert found["offsets"].dtype == np.int32
    # [tile][tap][row]: element of the image, 2 a pixel; the row past the end points at a readable place.
    assert found["offsets"].tolist() == [[[OUTSIDE, 0], [0, 2], [2, 4]], [[2, 0], [4, 0], [OUTSIDE, 0]]]
    assert found["zeros"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("problem", "outside"),
    [
        (conv2d(8, 6, 6, 8, 3, p=0), False),
        (conv2d(8, 6, 6, 8, 3), True),
        (ConvProblem(1, 8, 8, (6,), (3,), (1,), (0,), (1,), (1,)), True),
        # Stride 3 over 6 + 2 never comes to the pad behind.
        (ConvProblem(1, 8, 8, (6,), (3,), (3,), (0,), (2,), (1,)), False),
    ],
)
def test_zeros_only_where_a_tap_reaches_them(problem: ConvProblem, outside: bool) -> None:
    table = constants("indirect-gemm", problem, Tile(4, 16))
    assert reaches_outside(problem) == outside == bool((table["offsets"] == OUTSIDE).any())
    assert ("zeros" in table) == outside


@pytest.mark.parametrize("key", TABLES)
def test_the_table_counts_with_the_weights(key: str) -> None:
    tile = Tile(4, 16)
    cost = LOWERINGS[key].cost(PADDED, tile)
    base = LOWERINGS["implicit-gemm"].cost(PADDED, tile)
    by_hand = {"precomp-gemm": 4 * 9, "indirect-gemm": 4 * 9 * 9 * 8 + 4 * 16}
    assert cost.weight_bytes == base.weight_bytes + by_hand[key]
    assert cost.workspace_bytes == {"precomp-gemm": base.workspace_bytes, "indirect-gemm": 0}[key]


@pytest.mark.parametrize("key", TABLES)
def test_kernels_take_no_hidden_memory_and_name_their_dtype(key: str) -> None:
    target = parse_target("llvm")
    kernels = layer_kernels(LOWERINGS[key], PADDED, Machine.from_target(target)).kernels
    assert {k.name: k.dtype for k in kernels if not k.reads}["offsets"] == "int32"
    functions: dict[str, Any] = {k.name: k.func for k in kernels if k.kind != "weight"}
    assert kernel_workspace_bytes(tvm.IRModule(functions), target, 2) == {}


def test_the_row_of_zeros_is_found_wherever_the_input_lies() -> None:
    """Inputs at many addresses, ahead of the zeros and behind them, each in a field of NaN."""
    layer = compile_layer(PADDED, "indirect-gemm", parse_target("llvm"), epilogue=())
    data, weight = random_arrays(PADDED, 3)
    want = reference(PADDED, data, weight)
    kept = []
    for size in (1, 1 << 10, 1 << 16, 1 << 22):
        kept.append(np.full(size, np.nan, "float32"))
        got = layer.run(data.copy(), weight)
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("key", [*TABLES, "mec", "cct-balanced"])
def test_a_network_with_its_table_among_the_constants(key: str) -> None:
    """Every layer that can be in one lowering, run twice, its input within the arena."""
    model = small_cnn()
    base = gemmify.compile(model, lowering="direct")
    rng = np.random.default_rng(0)
    inputs = {spec.name: rng.standard_normal(spec.shape).astype(spec.dtype) for spec in base.inputs}
    want = base.run(inputs)
    found = gemmify.compile(model, lowering=key)
    assert key in {layer["lowering"] for layer in found.layers}
    for _ in range(2):
        for got, ref in zip(found.run(inputs), want, strict=True):
            np.testing.assert_allclose(got, ref, rtol=1e-4, atol=1e-5)


def test_fold_gives_integers() -> None:
    table = te.compute((6,), lambda i: (i // 3 * 10 - i % 3).astype("int32"), name="table")
    found = evaluate(table, {})
    assert found.dtype == np.int32 and found.tolist() == [0, -1, -2, 10, 9, 8]
