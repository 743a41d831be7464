"""Layers run between zones of poison: a kernel that writes, or computes from, what lies outside a tensor is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import te

from gemmify.guarded import Guarded
from gemmify.layer import compile_layer
from lowering import Lowering, Stage, Tile, conv2d
from lowering.base import Epilogue, no_epilogue
from lowering.im2row import Im2row
from schedules import parse_target


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32"])
def test_zones_show_what_is_written_to_them(dtype: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    guarded = Guarded.of(array)
    np.testing.assert_array_equal(guarded.tensor.numpy(), array)
    assert guarded.intact and guarded.filled
    for zone, at in ((0, -1), (1, 0)):
        kept = guarded.zones[zone][at]
        guarded.zones[zone][at] = 0
        assert not guarded.intact
        guarded.zones[zone][at] = kept
    assert guarded.intact and not Guarded.poisoned((5,), "float32").filled


class Astray(Im2row):
    """im2row whose copy leaves its last pixel out, or takes it from behind the input."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def build(self, problem: Any, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        first, *rest = super().build(problem, tile, epilogue)

        def unroll(data: te.Tensor) -> te.Tensor:
            shape = (1, *problem.out_size, *problem.kernel, problem.c)
            return te.compute(shape, lambda n, y, x, i, j, c: data(n, y + i + self.shift, x + j, c), name="im2row")

        return (Stage(first.name, first.reads, unroll, first.kind), *rest)


@pytest.mark.parametrize(("shift", "found"), [(0, []), (1, ["im2row: not filled"]), (-1, ["im2row: not filled"])])
def test_a_copy_from_outside_the_input_is_a_fault(shift: int, found: list[str]) -> None:
    lowering: Lowering = Astray(shift)
    layer = compile_layer(conv2d(4, 6, 6, 8, 3, p=0), lowering, parse_target("llvm"), epilogue=())
    rng = np.random.default_rng(0)
    layer.run(rng.standard_normal((1, 6, 6, 4)).astype("f"), rng.standard_normal((8, 3, 3, 4)).astype("f"))
    assert layer.faults() == found


def test_no_lowering_touches_a_page_beside_its_tensors() -> None:
    script = Path(__file__).with_name("guard_pages.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    last = "\n".join(run.stdout.splitlines()[-1:])
    assert run.returncode == 0 and last.startswith("done"), f"{last}\n{run.stderr[-2000:]}"
