"""Bound, cost model, search and budget, against a time function whose optimum is known."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import log, log2, prod
from random import Random
from typing import ClassVar

import numpy as np
import pytest

from gemmify.errors import InputError
from gemmify.tuning import cost_model, features
from gemmify.tuning.bound import Limits, lower_bound
from gemmify.tuning.budget import Budget
from gemmify.tuning.cost_model import CostModel, Row
from gemmify.tuning.history import History
from gemmify.tuning.point import Point
from gemmify.tuning.search import FAR_OFF, FEW, PATIENCE, Search
from gemmify.tuning.space import Space
from gemmify.tuning.task import Task
from lowering import LOWERINGS, ConvProblem, DenseProblem, Tile, conv2d
from lowering.epilogue import EpilogueOp
from schedules import Machine
from schedules.machine import Streams

EPILOGUE = (EpilogueOp("bias", 0), EpilogueOp("relu"))
MACHINE = Machine(64, 32, 2, 48 << 10, 2 << 20, 64 << 20, 2, "sapphirerapids", "x86_64", streams=Streams(3.5, 9.0, 0.0))
KEYS = ("implicit-gemm", "im2row-strip", "winograd-4", "kn2row-aa")
TASK = Task(conv2d(32, 28, 28, 48, 3), EPILOGUE)
LIMITS = Limits(200e9, 20e9)


@pytest.fixture(scope="module")
def space() -> Space:
    return Space(TASK, MACHINE, KEYS)


class Fake:
    """Seconds of a point of `space`: least for an `implicit-gemm` of 6 x 64 that writes out two steps; every choice
    costs its own factor, whatever the schedules offer. Wide tiles with many steps written out fail."""

    BASE: ClassVar = {"implicit-gemm": 1e-4, "im2row-strip": 1.25e-4, "winograd-4": 1.4e-4, "kn2row-aa": 4e-4}

    def __init__(self, space: Space, noise: float = 0.0) -> None:
        self.space, self.noise, self.calls = space, noise, 0

    def exact(self, point: Point) -> float | None:
        variant = self.space.variant(point)
        assert variant is not None
        knobs = {name: values[0] for name, values in self.space.knob_space(variant, point.tile).items()}
        knobs |= dict(point.schedule)
        if point.tile.nr >= 128 and knobs.get("k_unroll", 1) == 4:
            return None
        far = 0.12 * abs(log2(point.tile.mr / 6)) + 0.15 * abs(log2(point.tile.nr / 64))
        far += sum(0.08 * abs(log2(_number(value)) - 1.0) for value in knobs.values())
        far += sum(0.05 * abs(log2(_number(value)) - 2.0) for _, value in variant.full)
        return self.BASE[point.lowering] * (1 + far)

    def __call__(self, point: Point) -> float | None:
        self.calls += 1
        seconds = self.exact(point)
        return None if seconds is None else seconds * (1 + self.noise * Random(point.title).random())


def _number(value: object) -> float:
    if isinstance(value, tuple):
        return float(max(1, prod(value)))
    return float(max(1, value)) if isinstance(value, int) else 1.0 + (value != "copy")


@pytest.fixture(scope="module")
def optimum(space: Space) -> float:
    """The least time of all points, found by going through them."""
    fake = Fake(space)
    times = [fake.exact(point) for key in ("implicit-gemm", "im2row-strip") for point in space.points(key)]
    return min(seconds for seconds in times if seconds is not None)


def run(search: Search, fake: Fake, trials: int, batch: int = 8) -> list[Point]:
    """Propose and observe until `trials` points were measured; the points in order."""
    tried: list[Point] = []
    while len(tried) < trials and (points := search.propose(min(batch, trials - len(tried)))):
        for point in points:
            search.observe(point, fake(point))
        tried += points
    return tried


# Search.


def test_a_search_finds_the_optimum_more_often_than_chance(space: Space, optimum: float) -> None:
    trials, seeds, hits, lucky = 88, range(5), 0, 0
    for seed in seeds:
        search = Search(space, seed)
        run(search, Fake(space, noise=0.01), trials)
        assert search.best is not None
        exact = Fake(space).exact(search.best[0])
        assert exact is not None
        hits += exact <= 1.03 * optimum
        rng = Random(seed)
        drawn = [Fake(space).exact(space.sample(rng, rng.choice(KEYS))) for _ in range(trials)]
        lucky += min(t for t in drawn if t is not None) <= 1.03 * optimum
    assert hits >= 4
    assert hits > lucky


def test_no_point_twice_and_all_valid(space: Space) -> None:
    search = Search(space, 3)
    tried = run(search, Fake(space, 0.02), 72)
    assert len(tried) == len(set(tried)) == 72
    assert all(space.valid(point) and space.canonical(point) == point for point in tried)


def test_batches_in_flight_do_not_repeat_a_point(space: Space) -> None:
    search = Search(space, 0)
    points = [point for _ in range(4) for point in search.propose(6)]
    assert len(set(points)) == len(points) == 24


def test_equal_seeds_and_observations_give_equal_proposals(space: Space) -> None:
    first, second = (run(Search(space, 5), Fake(space), 48) for _ in range(2))
    assert first == second
    assert run(Search(space, 6), Fake(space), 48) != first


def test_a_fresh_space_does_not_change_the_proposals(space: Space) -> None:
    """What earlier searches read of a space (its knobs) must not steer a later one."""
    again = Space(TASK, MACHINE, KEYS)
    assert run(Search(again, 5), Fake(again), 40) == run(Search(space, 5), Fake(space), 40)


def test_the_default_is_first_then_seeds_then_the_other_lowerings(space: Space) -> None:
    won = Point("winograd-4", Tile(7, 32))
    points = Search(space, 0, [won, won, Point("fft", Tile(8, 32))]).propose(6)
    assert points[0] == space.default()
    assert points[1] == space.adapt(won)
    rest = [point.lowering for point in points[2:5]]
    assert rest == [key for key in space.keys if space.default(key) not in points[:2]][:3]


def test_a_seed_of_another_layer_is_adapted(space: Space) -> None:
    foreign = Point("im2row-strip", Tile(9, 1024), (("rows", 500),), (("no such knob", 3),))
    point = Search(space, 0, [foreign]).propose(2)[1]
    assert point.lowering == "im2row-strip" and point != space.default("im2row-strip") and space.valid(point)


def test_suggested_points_come_next_unless_they_were_tried(space: Space) -> None:
    search = Search(space, 0)
    first = search.propose(1)
    won = space.adapt(Point("im2row-strip", Tile(5, 48)))
    assert won is not None
    search.suggest([first[0], won])
    assert search.propose(1) == [won]


def test_a_lost_point_is_proposed_again_a_measured_one_is_not(space: Space) -> None:
    search = Search(space, 0)
    a, b, *_ = search.propose(4)
    search.observe(a, 1e-3)
    search.lost(a)
    search.lost(b)
    later = [point for _ in range(3) for point in search.propose(4)]
    assert later.count(b) == 1 and a not in later


def test_a_point_that_is_lost_twice_is_given_up(space: Space) -> None:
    search = Search(space, 0)
    first = search.propose(1)
    search.lost(first[0])
    assert search.propose(1) == first
    search.lost(first[0])
    assert first[0] not in [point for _ in range(4) for point in search.propose(4)]
    assert search.results[first[0]] is None


def test_a_large_lowering_that_may_have_no_more_trials_is_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Space(TASK, MACHINE, ["direct", "im2row-strip"])
    assert small.size("im2row-strip") > 1000
    search, seen = Search(small, 0), 0
    for point in small.points("direct"):
        search.observe(point, 1e-4)
    for point, _ in zip(small.points("im2row-strip"), range(FEW - 1), strict=False):
        search.observe(point, 1e-2)
    original = small.points

    def counted(key: str) -> Iterator[Point]:
        nonlocal seen
        for point in original(key):
            seen += key == "im2row-strip"
            yield point

    monkeypatch.setattr(small, "points", counted)
    (last,) = search.propose(8)
    assert last.lowering == "im2row-strip" and seen <= 3 * FEW
    search.observe(last, 1e-2)
    assert search.propose(8) == [] and seen <= 3 * FEW


def test_similar_layers_of_one_title_give_seeds_in_a_fixed_order() -> None:
    """A title does not tell the padding: two layers may share it, at the same distance from a third."""
    apart = [Task(replace(TASK.problem, pad_before=(p, p), pad_after=(2 - p, 2 - p))) for p in (0, 1, 2)]
    assert len({task.title for task in apart}) == 1
    points = [Point("direct", Tile(1, nr)) for nr in (16, 32, 48)]
    seeds = {task: [(1e-3, point)] for task, point in zip(apart, points, strict=True)}
    found = History(seeds=seeds).seeds_for(apart[1])
    assert set(found) == set(points) and found[0] == points[1], "its own first"
    assert History(seeds=dict(reversed(seeds.items()))).seeds_for(apart[1]) == found


def test_a_lowering_that_is_far_off_gets_few_trials(space: Space) -> None:
    search = Search(space, 1)
    tried = run(search, Fake(space), 80)
    assert Fake.BASE["kn2row-aa"] > FAR_OFF * Fake.BASE["implicit-gemm"] * 1.2
    assert sum(point.lowering == "kn2row-aa" for point in tried) <= FEW


def test_a_lowering_whose_bound_is_above_the_best_is_dropped(space: Space) -> None:
    # Peak such that only the fewest multiply-adds of all, those of winograd, are within reach of the time.
    limits = Limits(2 * TASK.problem.macs / 1e-3, 1e12)
    search = Search(space, 0, limits=limits)
    default = space.default("winograd-4")
    search.observe(default, 0.5e-3)
    assert search.keys == ["winograd-4"]
    assert {point.lowering for _ in range(4) for point in search.propose(8)} == {"winograd-4"}


def test_it_converges_at_the_bound_and_says_so(space: Space) -> None:
    search = Search(space, 0, limits=LIMITS)
    assert search.bound == min(space.bound(key, LIMITS) for key in space.keys)
    point = space.default(min(space.keys, key=lambda key: space.bound(key, LIMITS)))
    search.observe(point, 1.5 * search.bound)
    assert search.converged is None
    search.observe(space.neighbours(Random(0), point), 1.02 * search.bound)
    assert search.converged == "within 2 % of its bound"


def test_bounds_that_a_time_disproves_are_dropped(space: Space) -> None:
    """Limits measured while the machine was busy put the bound above what is reached: no reason to stop."""
    search = Search(space, 0, limits=Limits(2 * TASK.problem.macs / 1e-3, 1e12))
    assert search.bound is not None
    search.observe(search.propose(1)[0], 0.8 * search.bound)
    assert search.bound is None and search.converged is None


def test_it_converges_without_gain(space: Space) -> None:
    search, fake = Search(space, 0), Fake(space)
    while search.converged is None and fake.calls < 400:
        run(search, fake, 8)
    assert search.converged is not None and search.converged.startswith("no gain above 1% in ")
    assert PATIENCE <= fake.calls < 400


def test_patience_grows_past_the_idle_trials_of_an_older_log(space: Space) -> None:
    search, fake = Search(space, 0), Fake(space)
    assert not search.go_on(), "it has not ended"
    search.observe(space.default(), 1e-9)
    for _ in range(3 * PATIENCE // 8 + 2):
        for point in search.propose(8):
            search.observe(point, fake(point))
    assert search.converged is not None and search.go_on() and search.converged is None
    assert search.patience > 2 * PATIENCE


def test_a_slow_gain_still_counts(space: Space) -> None:
    """Steps of 0.4 % each are a gain, though none of them is 1 %."""
    search, seconds = Search(space, 0), 1e-3
    for _ in range(20):
        for point in search.propose(8):
            seconds *= 0.996
            search.observe(point, seconds)
        assert search.converged is None


def test_failures_alone_do_not_stop_it_and_it_ends_when_all_is_tried() -> None:
    small = Space(Task(DenseProblem(1, 20, 30), ()), MACHINE, ["dense"])
    search = Search(small, 0)
    everything = set(small.points("dense"))
    tried = []
    while points := search.propose(8):
        for point in points:
            search.observe(point, None)
        tried += points
    assert set(tried) == everything and len(tried) == len(everything)
    assert search.best is None
    assert search.converged == f"all {len(everything)} points tried"


def test_points_from_a_log_that_are_not_in_the_space_are_passed_over(space: Space) -> None:
    search = Search(space, 0)
    search.observe(Point("fft", Tile(8, 32)), 1e-9)
    search.observe(Point("winograd-4", Tile(1000, 32)), 1e-9)
    assert search.best is None and search.trials == 0


def test_a_repeated_observation_keeps_the_best_time(space: Space) -> None:
    search, point = Search(space, 0), space.default()
    for seconds in (3e-4, 2e-4, None, 4e-4):
        search.observe(point, seconds)
    assert search.best == (point, 2e-4) and search.trials == 1 and search.results[point] == 2e-4


# Bound.


@pytest.mark.parametrize("problem", [conv2d(16, 14, 14, 24, 3), conv2d(8, 9, 9, 8, 3, g=8), DenseProblem(2, 40, 30)])
def test_a_bound_with_a_tile_is_not_below_the_one_without(problem: ConvProblem | DenseProblem) -> None:
    for lowering in LOWERINGS.values():
        if lowering.applicable(problem) is None:
            loose = lower_bound(lowering, problem, None, MACHINE, LIMITS)
            assert loose > 0
            for tile in (Tile(2, 16), Tile(1, 32)):
                assert loose <= lower_bound(lowering, problem, tile, MACHINE, LIMITS)


def test_a_bound_is_the_larger_of_arithmetic_and_weights() -> None:
    many, few = conv2d(64, 56, 56, 64, 3), DenseProblem(1, 4096, 4096)
    direct, dense = LOWERINGS["direct"], LOWERINGS["dense"]
    assert lower_bound(direct, many, None, MACHINE, LIMITS) == pytest.approx(2 * many.macs / 200e9)
    assert lower_bound(dense, few, None, MACHINE, LIMITS) == pytest.approx(4 * 4096 * 4096 / 20e9)
    winograd = lower_bound(LOWERINGS["winograd-4"], many, None, MACHINE, LIMITS)
    assert winograd == pytest.approx(2 * many.macs / 4 / 200e9)


def test_a_bound_needs_a_lowering_that_applies() -> None:
    with pytest.raises(InputError, match="dense does not apply"):
        lower_bound(LOWERINGS["dense"], conv2d(8, 8, 8, 8, 3), None, MACHINE, LIMITS)
    with pytest.raises(ValueError, match="positive"):
        Limits(0.0, 1.0)


# Features and the model.


def test_features_are_finite_of_one_length_and_tell_points_apart(space: Space) -> None:
    rng = Random(0)
    points = [space.sample(rng, key) for key in space.keys for _ in range(8)]
    other = Space(Task(DenseProblem(3, 100, 50), ()), MACHINE)
    rows = [features.vector(TASK, point, MACHINE) for point in points]
    rows += [features.vector(other.task, other.default(), MACHINE)]
    assert len({row.shape for row in rows}) == 1
    assert np.isfinite(np.stack(rows)).all()
    kinds = {(p.lowering, p.sizes, p.tile) for p in points}
    assert len({row.tobytes() for row in rows}) == len(kinds) + 1


def test_features_refuse_what_does_not_fit() -> None:
    for point in (Point("nothing", Tile(4, 16)), Point("dense", Tile(4, 16))):
        with pytest.raises(ValueError):
            features.vector(TASK, point, MACHINE)


def test_knob_values_and_the_table() -> None:
    point = Point("direct", Tile(4, 16), (("block", (3, 7)), ("fused", True), ("pad", "copy")), (("row_block", 8),))
    values = features.knob_values(point)
    assert values["fused"] == 1.0 and values["pad=copy"] == 1.0
    assert values["block"] == pytest.approx(log2(22)) and values["block[-1]"] == 3.0
    table = features.table([np.zeros(2, np.float32)], [{"a": 1.0, "unknown": 9.0}], ("a", "b"))
    assert table.shape == (1, 4) and table[0, 2] == 1.0 and np.isnan(table[0, 3])


def _rows(space: Space, count: int, seed: int) -> list[Row]:
    rng, fake = Random(seed), Fake(space)
    return [Row(TASK, point := space.draft(rng, "implicit-gemm"), fake(point)) for _ in range(count)]


def test_the_model_ranks_what_it_has_not_seen_and_is_deterministic(space: Space) -> None:
    rows, held_out = _rows(space, 150, 0), _rows(space, 60, 1)
    points = [row.point for row in held_out]
    scores = []
    for _ in range(2):
        model = CostModel(MACHINE, seed=1)
        model.fit(rows)
        scores.append(model.predict(TASK, points))
    assert np.array_equal(*scores)
    truth = [cost_model.LOST if row.seconds is None else -log(row.seconds) for row in held_out]
    assert np.corrcoef(np.argsort(np.argsort(truth)), np.argsort(np.argsort(scores[0])))[0, 1] > 0.8


def test_the_model_transfers_to_a_layer_that_it_has_not_seen(space: Space) -> None:
    model = CostModel(MACHINE)
    model.fit(_rows(space, 150, 0))
    other = Space(Task(conv2d(64, 14, 14, 64, 3), EPILOGUE), MACHINE, ["implicit-gemm"])
    good, bad = Point("implicit-gemm", Tile(6, 64)), Point("implicit-gemm", Tile(1, 240))
    assert np.diff(model.predict(other.task, [bad, good]))[0] > 0


def test_failures_are_ranked_last(space: Space) -> None:
    points = [space.draft(Random(i), "implicit-gemm") for i in range(80)]
    model = CostModel(MACHINE)
    model.fit(Row(TASK, p, None if p.tile.nr > 32 else 1e-4) for p in points)
    good, bad = Point("implicit-gemm", Tile(7, 16)), Point("implicit-gemm", Tile(4, 96))
    assert np.diff(model.predict(TASK, [bad, good]))[0] > 1


def test_a_model_without_rows_says_nothing_and_skips_rows_it_cannot_read() -> None:
    model = CostModel(MACHINE)
    model.add([Row(TASK, Point("nothing", Tile(4, 16)), 1.0)])
    assert len(model) == 0 and not model.ready
    assert not model.predict(TASK, [Point("direct", Tile(4, 16))]).any()


def test_without_xgboost_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "xgboost":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "xgboost", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"gemmify\[tune\]"):
        CostModel(MACHINE)


# Budget.


def _spend(budget: Budget, speeds: list[list[float]], batch: float = 2.0, most: int = 500) -> list[int]:
    """Run a budget over tasks whose best time after each batch is given (the last one stays); the turns."""
    turns: list[int] = []
    while (task := budget.next()) is not None and len(turns) < most:
        seen = turns.count(task)
        budget.spent(task, batch, trials=8)
        budget.observe(task, speeds[task][min(seen, len(speeds[task]) - 1)])
        turns.append(task)
    return turns


def test_every_task_gets_a_batch_the_heaviest_first() -> None:
    budget = Budget([1, 1, 10], 100.0, priors=[1e-3, 4e-3, 1e-3])
    assert _spend(budget, [[1e-3], [4e-3], [1e-3]])[:3] == [2, 1, 0]


def test_the_layer_that_saves_more_of_the_network_gets_more() -> None:
    gains = [[1e-3 * 0.97**i for i in range(40)]] * 2
    turns = _spend(Budget([6, 1], 80.0, bounds=[2e-4, 2e-4]), gains)
    assert turns.count(0) > 2 * turns.count(1) > 0


def test_a_task_without_gain_yields_to_one_that_gains() -> None:
    gains = [[1e-3], [1e-3 * 0.95**i for i in range(60)]]
    turns = _spend(Budget([1, 1], 120.0, bounds=[5e-4, 5e-5]), gains)
    assert turns.count(1) > 3 * turns.count(0)


def test_a_task_at_its_bound_gets_no_more_than_it_must() -> None:
    turns = _spend(Budget([5, 1], 60.0, bounds=[1e-3, 1e-4]), [[1e-3], [1e-3]])
    assert turns.count(0) == 1


def test_time_for_the_finals_is_kept() -> None:
    budget = Budget([1, 1], 100.0)
    _spend(budget, [[1e-3], [1e-3]])
    assert 10.0 <= budget.left <= 12.0
    assert budget.reserve == pytest.approx(12.0)
    long = Budget([1, 1], 100.0, finals=10.0)
    _spend(long, [[1e-3], [1e-3]])
    assert 18.0 <= long.left <= 20.0
    endless = Budget([1, 1], 100.0, finals=1000.0)
    assert len(_spend(endless, [[1e-3], [1e-3]])) > 20


def test_time_spent_elsewhere_counts() -> None:
    budget = Budget([1], 100.0)
    budget.spent(None, 80.0)
    assert len(_spend(budget, [[1e-3]])) == 4


def test_stopped_tasks_and_trials() -> None:
    budget = Budget([1, 1], None, trials=24)
    budget.stop(1, "converged")
    assert budget.left == float("inf") and budget.reserve == 0.0
    assert _spend(budget, [[1e-3], [1e-3]]) == [0, 0, 0]
    assert budget.stopped(0) == "24 trials" and budget.stopped(1) == "converged"
    assert budget.trials_left(0) == 0


def test_a_task_where_everything_fails_does_not_take_all_the_time() -> None:
    budget = Budget([1, 1], 100.0, bounds=[1e-5, 1e-5], priors=[1e-3, 1e-3])
    turns: list[int] = []
    while (task := budget.next()) is not None:
        budget.spent(task, 2.0, 8)
        budget.observe(task, None if task == 0 else 1e-3 * 0.97 ** turns.count(1))
        turns.append(task)
    assert turns.count(1) > turns.count(0) > 0


def test_a_budget_needs_an_end() -> None:
    with pytest.raises(ValueError, match="seconds or trials"):
        Budget([1], None)
