"""The register tile: it fits the registers of each machine, keeps its promises, and works on narrower machines too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_arrays, reference

from gemmify.layer import compile_layer
from lowering import LOWERINGS, DenseProblem, conv2d
from schedules import Machine, parse_target
from schedules.cpu.tile import TileRequest, candidates, choose_tile, modelled_cycles

TARGETS = {
    "sse": "llvm -mcpu=x86-64",
    "avx2": "llvm -mcpu=x86-64-v3",
    "avx512": "llvm -mcpu=x86-64-v4",
    "neon": "llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1",
}
MACHINES = {name: Machine.from_target(parse_target(target)) for name, target in TARGETS.items()}

requests = st.builds(
    TileRequest,
    outer=st.integers(1, 300),
    inner=st.integers(1, 300),
    n=st.integers(1, 2100),
    k=st.integers(1, 5000),
    groups=st.sampled_from([1, 2, 32]),
    dtype=st.sampled_from(["float32", "float64"]),
    vector_a=st.booleans(),
    nr_divides=st.booleans(),
    mr_divides=st.booleans(),
    row_bytes=st.sampled_from([0, 12, 4096, 16384]),
)


@pytest.mark.parametrize("name", MACHINES)
@settings(max_examples=60, derandomize=True, deadline=None)
@given(request=requests)
def test_every_candidate_fits_and_the_choice_is_the_cheapest(name: str, request: TileRequest) -> None:
    machine = MACHINES[name]
    tiles = candidates(request, machine)
    lanes = machine.lanes(request.dtype)
    for mr, nr in tiles:
        v = max(1, nr // lanes)
        assert mr * v + v + 1 <= machine.vector_registers
        assert not request.nr_divides or request.n % nr == 0
        assert not request.mr_divides or request.inner % mr == 0
        assert 1 <= mr <= request.inner
    chosen = choose_tile(request, machine)
    assert chosen in tiles
    assert modelled_cycles(request, machine, *chosen) == min(modelled_cycles(request, machine, *t) for t in tiles)


def test_rows_of_a_in_one_cache_set_are_few() -> None:
    far = TileRequest(outer=1, inner=1000, n=8, k=1024, row_bytes=4096)
    near = TileRequest(outer=1, inner=1000, n=8, k=1024, row_bytes=4100)
    machine = MACHINES["avx512"]
    assert choose_tile(far, machine)[0] <= 1.5 * machine.l1_bytes / 4096
    assert choose_tile(near, machine)[0] > choose_tile(far, machine)[0]


@pytest.mark.parametrize("name", ["sse", "avx2"])
@pytest.mark.parametrize("problem", [conv2d(17, 13, 13, 37, 3), conv2d(24, 9, 9, 24, 3, g=24), DenseProblem(5, 70, 50)])
def test_narrow_machines_compute_the_same(name: str, problem: object) -> None:
    data, weight = random_arrays(problem, 5)  # type: ignore[arg-type]
    want = reference(problem, data, weight)  # type: ignore[arg-type]
    for key, lowering in LOWERINGS.items():
        if lowering.applicable(problem) is not None or lowering.layout == "NCHW":  # type: ignore[arg-type]
            continue
        layer = compile_layer(problem, key, parse_target(TARGETS[name]), epilogue=())  # type: ignore[arg-type]
        got = layer.run(data, weight)
        assert np.abs(got - want).max() <= 5e-5 * np.abs(want).max(), key
