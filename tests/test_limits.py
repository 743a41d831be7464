"""What cannot be built is refused in words: tensors beyond 32-bit addresses, tiles that do not divide a layer."""

from __future__ import annotations

import pytest

from gemmify.errors import InputError
from gemmify.layer import compile_layer
from gemmify.select import consider
from lowering import LOWERINGS, ConvProblem, Tile, conv2d
from schedules import Machine, parse_target

MACHINE = Machine.from_target(parse_target("llvm"))
LARGE = conv2d(64, 224, 224, 64, 3, n=128)


def test_a_workspace_beyond_32_bits_is_a_reason() -> None:
    reasons = {c.lowering.key: str(c.reason or "") for c in consider(LARGE, MACHINE)}
    for key in ("im2col-batched", "kn2col", "kn2row"):
        assert "needs tensors of fewer than 2^31 elements, got 3699" in reasons[key], key
    assert not reasons["implicit-gemm"] and not reasons["kn2row-aa"]
    with pytest.raises(InputError, match=r"fewer than 2\^31 elements"):
        compile_layer(LARGE, "kn2col", parse_target("llvm"))


@pytest.mark.parametrize(
    ("key", "problem", "tile", "said"),
    [
        ("winograd-4", conv2d(16, 13, 13, 16, 3), Tile(5, 16), "winograd-4 needs a tile whose mr divides 16"),
        ("winograd-2", conv2d(8, 12, 12, 24, 3, g=2), Tile(1, 16), "winograd-2 needs a tile whose nr divides 12"),
        ("depthwise", conv2d(8, 9, 9, 8, 3, g=8), Tile(2, 16), "depthwise needs a tile whose nr divides 8"),
        ("implicit-gemm", conv2d(8, 9, 9, 8, 3), Tile(512, 512), "at most 4096 elements"),
    ],
)
def test_a_tile_that_does_not_divide_is_refused(key: str, problem: ConvProblem, tile: Tile, said: str) -> None:
    with pytest.raises(InputError, match=said):
        compile_layer(problem, key, parse_target("llvm"), tile=tile)


def test_scratch_counts_each_stage_by_its_own_tasks() -> None:
    problem = ConvProblem(3, 33, 65, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    cost = LOWERINGS["fft"].cost(problem, Tile(10, 32))
    assert len({tasks for _, tasks in cost.stage_bytes}) == 2
    for threads in (1, 2, 16, 1000):
        expected = sum(min(threads, tasks) * size for size, tasks in cost.stage_bytes)
        assert cost.scratch(threads) - cost.workspace_bytes == expected
