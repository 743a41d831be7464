"""The knobs of the schedules: numbers at random points, the default untouched, the space pruned by the machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import tvm
from tvm import s_tir, te
from tvm.s_tir import ScheduleError
from tvm.tirx import For, ForKind, PrimFunc
from tvm_ffi import structural_equal

from gemmify import kernels as kernels_module
from gemmify.conformance import check
from gemmify.kernels import ScheduleKnobs, layer_kernels, tile_for, tile_request
from gemmify.layer import compile_layer
from lowering import LOWERINGS, ConvProblem, DenseProblem, Lowering, Problem, Tile, TransposedConvProblem, conv2d
from lowering.base import operand_shapes
from lowering.epilogue import EpilogueOp
from schedules import Machine, host_target, knob_space, schedule_func
from schedules.cpu import rules
from schedules.cpu.gemm_knobs import PREFETCH_BYTES
from schedules.cpu.knobs import KNOBS
from schedules.cpu.tile import candidates
from schedules.cpu.tir_tools import collect

OPS = (EpilogueOp("bias", 0), EpilogueOp("relu"))
AVX512 = Machine(64, 32, 2, 48 << 10, 2 << 20, 60 << 20, 2, "sapphirerapids", "x86_64")
AVX2 = Machine(32, 16, 2, 32 << 10, 512 << 10, 16 << 20, 2, "haswell", "x86_64")
SSE = Machine(16, 16, 1, 32 << 10, 256 << 10, 8 << 20, 2, "x86-64", "x86_64")
# Each has rows or panels that can be blocked, steps that can be unrolled, or tails that no tile divides.
PROBLEMS: tuple[Problem, ...] = (
    conv2d(28, 12, 14, 70, 3),
    conv2d(60, 9, 10, 130, 1),
    conv2d(13, 7, 11, 37, 3, n=2),
    conv2d(24, 10, 9, 72, 3, g=2),
    conv2d(48, 12, 9, 48, 3, 2, g=48),
    conv2d(20, 6, 6, 41, 6, p=0),
    ConvProblem(1, 12, 34, (30,), (5,), (1,), (2,), (2,), (1,)),
    DenseProblem(1, 256, 400),
    DenseProblem(6, 96, 130),
    TransposedConvProblem(1, 24, 21, (6, 4), (4, 4), (2, 2), (1, 1), (1, 1), (1, 1), (0, 0)),
)


def machine_of(cores: int) -> tuple[tvm.target.Target, Machine]:
    target = tvm.target.Target({**dict(host_target().export()), "num-cores": cores})
    return target, Machine.from_target(target)


def functions(lowering: Lowering, problem: Problem, tile: Tile) -> list[PrimFunc]:
    """The unscheduled functions of a layer."""
    known = {name: (shape, problem.dtype) for name, shape in operand_shapes(problem, lowering.layout).items()}
    found = []
    for stage in lowering.stages(problem, tile):
        inputs = [te.placeholder(*known[name], name=name) for name in stage.reads]
        output = stage.compute(*inputs)
        known[stage.name] = (tuple(int(extent) for extent in output.shape), str(output.dtype))
        found.append(te.create_prim_func([*inputs, output]))
    return found


def space_of(lowering: Lowering, problem: Problem, machine: Machine, tile: Tile | None = None) -> dict[str, Any]:
    """The knobs of all functions of a layer."""
    tile = tile or tile_for(lowering, problem, machine)
    space: dict[str, Any] = {}
    for func in functions(lowering, problem, tile):
        mine = knob_space(func, machine)
        assert not set(space) & set(mine), "two kernels of one layer share a knob: a value may suit one only"
        space |= mine
    return space


def applying(key: str) -> list[Problem]:
    return [problem for problem in PROBLEMS if LOWERINGS[key].applicable(problem) is None]


def random_point(key: str, problem: Problem, machine: Machine, draw: random.Random) -> tuple[Tile, ScheduleKnobs]:
    """A register tile that fits the machine, and a value of every knob that it leaves free."""
    lowering = LOWERINGS[key]
    tile = Tile(*draw.choice(candidates(tile_request(lowering, problem), machine)))
    if draw.random() < 0.5:
        tile = tile_for(lowering, problem, machine)
    space = space_of(lowering, problem, machine, tile)
    return tile, tuple(sorted((name, draw.choice(values)) for name, values in space.items()))


def run_point(key: str, problem: Problem, cores: int, seed: str) -> str | None:
    target, machine = machine_of(cores)
    tile, schedule = random_point(key, problem, machine, random.Random(seed))
    layer = compile_layer(problem, key, target, epilogue=OPS, tile=tile, schedule=schedule)
    wrong = check(layer, OPS)
    return wrong and f"{schedule}: {wrong}"


@pytest.mark.parametrize(("number", "key"), list(enumerate(LOWERINGS)))
def test_a_random_point_is_right(number: int, key: str) -> None:
    problems = applying(key)
    assert problems
    assert run_point(key, random.Random(key).choice(problems), 1 + number % 2, key) is None


@pytest.mark.slow
@pytest.mark.parametrize(("key", "cores"), list(product(LOWERINGS, (1, 2))))
def test_many_random_points_are_right(key: str, cores: int) -> None:
    wrong = [run_point(key, problem, cores, f"{i} {cores}") for problem in applying(key) for i in range(4)]
    assert not any(wrong), "\n".join(filter(None, wrong))


CONV = conv2d(28, 12, 14, 128, 3)
EACH = [("row_block", 4), ("row_block", 1), ("panel_block", 2), ("k_unroll", 4), ("prefetch", PREFETCH_BYTES[0])]


@pytest.mark.parametrize(("knob", "value"), EACH)
def test_each_knob_alone_is_right(knob: str, value: int) -> None:
    target, _ = machine_of(2)
    layer = compile_layer(CONV, "implicit-gemm", target, epilogue=OPS, tile=Tile(7, 32), schedule=((knob, value),))
    assert check(layer, OPS) is None


def every_function() -> Iterator[tuple[str, Machine, PrimFunc]]:
    for key, lowering in LOWERINGS.items():
        for problem in applying(key):
            for func in functions(lowering, problem, tile_for(lowering, problem, AVX512)):
                yield f"{key} {problem}", AVX512, func


def test_first_values_are_the_default() -> None:
    """The untuned schedule is a point of the space, and naming it changes nothing."""
    free = 0
    for where, machine, func in every_function():
        first = {name: values[0] for name, values in knob_space(func, machine).items()}
        if first:
            free += 1
            plain, named = schedule_func(func, machine), schedule_func(func, machine, first)
            assert structural_equal(plain, named), where
    assert free > 50


def test_spaces_are_sets_of_known_knobs_and_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    functions_of_all = list(every_function())
    monkeypatch.setattr(s_tir, "Schedule", None)  # nothing is scheduled to find out what is free
    for where, machine, func in functions_of_all:
        before, space = str(func), knob_space(func, machine)
        assert str(func) == before and knob_space(func, machine) == space, where
        assert set(space) <= set(KNOBS), where
        assert all(len(values) == len(set(values)) > 1 for values in space.values()), f"{where}: {space}"


def test_other_values_change_the_code() -> None:
    """No value of a knob is another name for the default."""
    (func,) = [f for f in functions(LOWERINGS["implicit-gemm"], CONV, Tile(7, 32)) if knob_space(f, AVX512)]
    space = knob_space(func, AVX512)
    assert {"row_block", "panel_block", "k_unroll", "prefetch"} <= set(space)
    texts = [str(schedule_func(func, AVX512))]
    for name, values in space.items():
        texts += [str(schedule_func(func, AVX512, {name: value})) for value in values[1:]]
    assert len(set(texts)) == len(texts)


def loops(func: PrimFunc, kind: ForKind) -> list[int]:
    return [int(loop.extent) for loop in collect(func.body, For) if ForKind(loop.kind) == kind]


def gemm_of(key: str, problem: Problem, machine: Machine, tile: Tile | None = None) -> PrimFunc:
    lowering = LOWERINGS[key]
    return functions(lowering, problem, tile or tile_for(lowering, problem, machine))[-1]


def test_what_the_knobs_do() -> None:
    func = gemm_of("implicit-gemm", CONV, AVX512, Tile(7, 32))
    assert "prefetch(" not in str(schedule_func(func, AVX512))
    asked = str(schedule_func(func, AVX512, {"prefetch": 1024, "k_unroll": 2}))
    # Two steps of 32 columns are four lines of 64 bytes.
    assert asked.count("prefetch(") == 4
    assert 4 in loops(schedule_func(func, AVX512, {"k_unroll": 4}), ForKind.UNROLLED)


def test_the_cache_prunes_the_blocks() -> None:
    problem = conv2d(128, 28, 28, 256, 3)
    tile = Tile(4, 16)
    func = gemm_of("implicit-gemm", problem, AVX512, tile)

    def blocks(l2: int) -> tuple[set[Any], set[Any]]:
        space = knob_space(func, Machine(**{**AVX512.__dict__, "l2_bytes": l2}))
        return set(space["row_block"]), set(space.get("panel_block", (16,)))

    rows, panels = zip(*(blocks(size) for size in (64 << 10, 160 << 10, 1 << 20)), strict=True)
    assert rows[0] == {1, 28} and max(rows[1] - {28}) < max(rows[2] - {28})
    assert panels[0] == {16} and max(panels[1] - {16}) < max(panels[2] - {16})


def test_the_caches_prune_prefetching() -> None:
    func = gemm_of("implicit-gemm", CONV, AVX512)
    assert knob_space(func, AVX512)["prefetch"] == (0, *PREFETCH_BYTES)
    assert "prefetch" not in knob_space(func, Machine(**{**AVX512.__dict__, "l1_bytes": 1 << 20}))
    # What is copied in the same function is in the cache when it is read.
    batch = conv2d(64, 20, 20, 64, 3, n=2)
    assert "prefetch" not in space_of(LOWERINGS["im2col"], batch, AVX512)


def test_the_registers_prune_unrolling_and_tiles() -> None:
    """A tile of 14 x 32 is 28 vectors of 64 bytes, but 112 of 16: there eight steps of it are too much code."""
    func = gemm_of("implicit-gemm", conv2d(64, 14, 14, 64, 3), AVX512, Tile(14, 32))
    steps = [knob_space(func, machine).get("k_unroll", (1,)) for machine in (AVX512, AVX2, SSE)]
    assert [max(s) for s in steps] == [8, 4, 2]
    widest = [
        max(mr * nr for mr, nr in candidates(tile_request(LOWERINGS["implicit-gemm"], CONV), machine))
        for machine in (AVX512, AVX2, SSE)
    ]
    assert widest[0] > widest[1] > widest[2]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"row_block": 5}, "row_block must be a whole number that divides the 12 rows, found 5"),
        ({"row_block": 0}, "row_block must be a whole number"),
        ({"row_block": True}, "row_block must be a whole number"),
        ({"panel_block": 3}, "panel_block must be a whole number that divides the 4 panels, found 3"),
        ({"k_unroll": 3}, "k_unroll must be a whole number that divides the 28 steps"),
        ({"k_unroll": "4"}, "k_unroll must be a whole number"),
        ({"prefetch": 7}, "prefetch must be one of 0, 1024, 4096, found 7"),
        ({"rowblock": 1}, "no schedule has a knob 'rowblock'"),
    ],
)
def test_values_that_cannot_be(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        schedule_func(gemm_of("implicit-gemm", CONV, AVX512, Tile(7, 32)), AVX512, knobs)


def test_a_knob_of_another_kernel_is_left_to_it() -> None:
    """The weights' packing has no rows: a layer's knobs go to all of its kernels."""
    packing = functions(LOWERINGS["implicit-gemm"], CONV, Tile(7, 32))[0]
    assert knob_space(packing, AVX512) == {}
    assert structural_equal(schedule_func(packing, AVX512), schedule_func(packing, AVX512, {"row_block": 5}))


def test_a_failing_schedule_with_knobs_is_no_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> PrimFunc:
        raise ScheduleError("no")

    monkeypatch.setattr(rules, "_RULES", (fail, rules._by_structure))
    func = gemm_of("implicit-gemm", CONV, AVX512, Tile(7, 32))
    assert schedule_func(func, AVX512) is not None
    with pytest.raises(ValueError, match="cannot be made with row_block=4"):
        schedule_func(func, AVX512, {"row_block": 4, "k_unroll": 1})


def test_knobs_reach_the_layer() -> None:
    machine = machine_of(2)[1]
    lowering = LOWERINGS["implicit-gemm"]
    plain = layer_kernels(lowering, CONV, machine, (), Tile(7, 32)).kernels[-1].func
    blocked = layer_kernels(lowering, CONV, machine, (), Tile(7, 32), (("row_block", 4),)).kernels[-1].func
    assert not structural_equal(plain, blocked)
    assert kernels_module.schedule_func is schedule_func
