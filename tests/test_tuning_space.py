"""The space of a task: what is in it, what is left out, and what becomes of points from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from gemmify import zoo
from gemmify.bench.shapes import layers_suite
from gemmify.errors import InputError
from gemmify.kernels import layer_kernels, tile_request
from gemmify.policy import Policy
from gemmify.select import choose
from gemmify.tuning.point import Point
from gemmify.tuning.space import FAR, MOST_SCRATCH, Space
from gemmify.tuning.task import Task
from lowering import LOWERINGS, DenseProblem, Lowering, Tile, conv2d
from lowering.epilogue import EpilogueOp
from schedules import Machine
from schedules.cpu.tile import candidates, modelled_cycles
from schedules.machine import Streams

EPILOGUE = (EpilogueOp("bias", 0), EpilogueOp("relu"))
AVX512 = Machine(64, 32, 2, 48 << 10, 2 << 20, 64 << 20, 2, "sapphirerapids", "x86_64", streams=Streams(3.5, 9.0, 0.0))
AVX2 = Machine(32, 16, 2, 32 << 10, 256 << 10, 8 << 20, 4, "haswell", "x86_64")
PROBLEMS = (
    conv2d(32, 28, 28, 48, 3),
    conv2d(13, 9, 11, 7, 3, 2, p=0),
    conv2d(16, 15, 15, 16, 5, g=16),
    conv2d(24, 7, 7, 40, 1),
    DenseProblem(3, 50, 70),
)


@pytest.fixture(scope="module")
def space() -> Space:
    return Space(Task(PROBLEMS[0], EPILOGUE), AVX512)


@pytest.mark.parametrize("machine", [AVX512, AVX2], ids=["avx512", "avx2"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_untuned_choice_is_a_point_of_the_space(problem: object, machine: Machine) -> None:
    space = Space(Task(problem, EPILOGUE), machine)
    choice = choose("layer", problem, machine, Policy())
    assert space.default() == Point(choice.lowering.key, choice.tile)
    for key in space.keys:
        default = space.default(key)
        assert space.valid(default)
        assert next(space.points(key)) == default
        assert default.tile in next(iter(space.variants(key).values())).tiles


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_samples_and_neighbours_are_in_the_space_and_build(problem: object) -> None:
    space, rng = Space(Task(problem, EPILOGUE), AVX512), Random(7)
    for key in space.keys:
        point = space.sample(rng, key)
        for _ in range(3):
            other = space.neighbours(rng, point)
            assert other.lowering == key
            assert space.canonical(other) == other
            point = other
        layer_kernels(point.configured(), problem, AVX512, EPILOGUE, point.tile, point.schedule)


def test_a_neighbour_differs_in_one_choice(space: Space) -> None:
    rng, point = Random(0), space.default("implicit-gemm")
    for _ in range(20):
        other = space.neighbours(rng, point)
        changed = (other.tile != point.tile) + (other.sizes != point.sizes)
        # Where the tile changes, knobs that do not fit it move to the nearest that do.
        changed += other.tile == point.tile and dict(other.schedule) != dict(point.schedule)
        assert changed == 1
        if other.tile == point.tile:
            assert len(set(other.schedule) ^ set(point.schedule)) <= 2
        point = other


def test_points_are_all_different_and_the_same_in_log_form(space: Space) -> None:
    points = list(space.points("kn2row-aa"))
    assert len(set(points)) == len(points) > 20
    assert all(Point.from_dict(point.to_dict()) == point for point in points)


def test_samples_reach_every_free_choice(space: Space) -> None:
    """Every value of every size is drawn at some time, and of every knob."""
    rng = Random(0)
    for key in ("winograd-4", "im2row-strip", "implicit-gemm"):
        drawn = [space.sample(rng, key) for _ in range(250)]
        variants = space.variants(key)
        assert {point.sizes for point in drawn} == {variant.sizes for variant in variants.values()}
        first = next(iter(variants.values()))
        names = {name for name in space.knob_space(first, first.default)}
        assert names <= {name for point in drawn for name, _ in point.schedule}


def test_slow_tiles_and_large_scratch_are_left_out() -> None:
    problem = conv2d(256, 28, 28, 256, 3)
    small_cache = replace(AVX512, l2_bytes=512 << 10)
    for machine in (AVX512, small_cache):
        space = Space(Task(problem, EPILOGUE), machine)
        for key in space.keys:
            for variant in space.variants(key).values():
                request = tile_request(variant.lowering, problem)
                cycles = {t: modelled_cycles(request, machine, t.mr, t.nr) for t in variant.tiles}
                assert max(cycles.values()) <= FAR * min(cycles.values())
                assert {(t.mr, t.nr) for t in variant.tiles} <= set(candidates(request, machine))
                cost = variant.lowering.cost(problem, variant.default)
                assert not variant.sizes or cost.thread_bytes <= MOST_SCRATCH * machine.l2_bytes
    large, small = (Space(Task(problem, EPILOGUE), m) for m in (AVX512, small_cache))
    assert len(small.variants("winograd-4")) < len(large.variants("winograd-4"))


def test_fewer_registers_leave_fewer_tiles() -> None:
    task = Task(PROBLEMS[0], EPILOGUE)
    wide, narrow = Space(task, AVX512), Space(task, AVX2)
    key = "implicit-gemm"
    assert not narrow.valid(Point(key, Tile(14, 32))) and wide.valid(Point(key, Tile(14, 32)))
    few, many = (len(next(iter(s.variants(key).values())).tiles) for s in (narrow, wide))
    assert 0 < few < many


def test_a_slow_tile_that_fits_is_valid_for_a_plan(space: Space) -> None:
    """What a person writes need not be among what is sampled."""
    variant = next(iter(space.variants("implicit-gemm").values()))
    slow = Point("implicit-gemm", Tile(1, 16))
    assert slow.tile not in variant.tiles
    assert space.valid(slow) and space.adapt(slow) == slow


def test_what_is_not_valid(space: Space) -> None:
    default = space.default("winograd-4")
    wrong = [
        replace(default, lowering="no such lowering"),
        replace(default, lowering="dense"),
        replace(default, tile=Tile(31, 64)),
        replace(default, sizes=(("block", (5, 5)),)),
        replace(default, sizes=(("block", 7),)),
        replace(default, sizes=(("fused", 1),)),
        replace(default, sizes=(("colour", 1),)),
        replace(default, schedule=(("colour", 1),)),
        replace(default, schedule=(("k_unroll", 3),)),
        replace(default, schedule=(("k_unroll", True),)),
    ]
    assert [point for point in wrong if space.valid(point)] == []


def test_defaults_written_out_are_the_same_point(space: Space) -> None:
    variant = next(iter(space.variants("winograd-4").values()))
    knobs = tuple((name, values[0]) for name, values in space.knob_space(variant, variant.default).items())
    assert variant.full and knobs
    spelt = Point("winograd-4", variant.default, variant.full, knobs)
    assert space.canonical(spelt) == space.default("winograd-4")


def test_adapted_points_are_valid_and_near() -> None:
    here, there = (Space(Task(p, EPILOGUE), AVX512) for p in (conv2d(64, 56, 56, 64, 3), conv2d(256, 14, 14, 100, 3)))
    rng = Random(1)
    for key in here.keys:
        for _ in range(4):
            adapted = there.adapt(here.sample(rng, key))
            assert (adapted is None) == (key not in there.keys)
            assert adapted is None or there.valid(adapted)
    point = Point("implicit-gemm", Tile(6, 64), (), (("k_unroll", 4),))
    assert there.adapt(point) == point
    assert there.adapt(replace(point, tile=Tile(6, 4096))) is not None
    assert there.adapt(replace(point, lowering="dense")) is None


def test_bounds_hold_for_every_point() -> None:
    problem = conv2d(64, 28, 28, 64, 3)
    free = Space(Task(problem, EPILOGUE), AVX512)
    rng, limit = Random(0), 300_000
    tight = Space(Task(problem, EPILOGUE), AVX512, max_workspace=limit)
    for key in tight.keys:
        for point in (tight.sample(rng, key) for _ in range(6)):
            assert point.configured().cost(problem, point.tile).scratch(AVX512.cores) <= limit
    outside = [p for p in (free.sample(rng, "winograd-4") for _ in range(30))]
    beyond = [p for p in outside if p.configured().cost(problem, p.tile).scratch(AVX512.cores) > limit]
    assert beyond and not any(tight.valid(point) for point in beyond)
    exact = Space(Task(problem, EPILOGUE), AVX512, max_error=5e-6)
    assert "winograd-6" in free.keys and "winograd-6" not in exact.keys
    assert "error" in exact.left_out["winograd-6"]


def test_lowerings_that_were_asked_for() -> None:
    task = Task(PROBLEMS[0], EPILOGUE)
    assert set(Space(task, AVX512, ["im2row", "direct", "dense"]).keys) == {"im2row", "direct"}
    with pytest.raises(InputError, match="did you mean im2row"):
        Space(task, AVX512, ["im2roww"])
    with pytest.raises(InputError, match=r"none of the lowerings asked for applies.*dense.*what works"):
        Space(task, AVX512, ["dense"])


def test_channels_first_only_where_asked_for(space: Space) -> None:
    nchw = {key for key, lowering in LOWERINGS.items() if lowering.layout == "NCHW"}
    assert nchw and not nchw & set(space.keys)
    assert all("NCHW" in space.left_out[key] for key in nchw & set(space.left_out) if key.startswith("im2col"))
    assert Space(space.task, AVX512, ["im2col"]).keys == ("im2col",)


def test_nothing_fits() -> None:
    with pytest.raises(InputError, match="no lowering is expected to stay below an error"):
        Space(Task(PROBLEMS[0], EPILOGUE), AVX512, max_error=1e-30)


def test_a_lowering_without_free_sizes_or_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The space works where a schedule offers nothing: tiles remain."""
    monkeypatch.setattr("schedules.knob_space", lambda func, machine: {})
    monkeypatch.setattr(Lowering, "choices", lambda self, problem: {})
    space = Space(Task(PROBLEMS[3], EPILOGUE), AVX512, ["direct"])
    points = list(space.points("direct"))
    assert len(points) == space.size("direct") > 1
    assert all(point.sizes == () and point.schedule == () for point in points)
    only = Space(Task(DenseProblem(1, 4, 1), ()), AVX512, ["direct"])
    assert only.neighbours(Random(0), only.default()) == only.default()


def _zoo_tasks() -> Iterator[tuple[str, Task]]:
    for name, problem in layers_suite(zoo.ZOO).items():
        yield name, Task(problem, EPILOGUE)


def test_the_default_of_every_zoo_layer_is_in_its_space() -> None:
    for name, task in _zoo_tasks():
        assert Space(task, AVX512).valid(Space(task, AVX512).default()), name


@pytest.mark.slow
def test_random_points_of_every_zoo_layer_build() -> None:
    wrong = []
    for name, task in _zoo_tasks():
        space, rng = Space(task, AVX512), Random(name)
        for _ in range(20):
            point = space.sample(rng, rng.choice(space.keys))
            try:
                layer_kernels(point.configured(), task.problem, AVX512, EPILOGUE, point.tile, point.schedule)
            except Exception as err:
                wrong.append(f"{name}: {point.title}: {err!r}")
    assert not wrong, "\n".join(wrong)
