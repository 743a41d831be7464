"""`gemmify.bench.suites`: which lowering is timed, how often, and what counts as bound by memory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest

from gemmify.bench import header, render, render_markdown, run_suite, shapes, suites, turns
from gemmify.errors import InputError
from lowering import DenseProblem, Problem, conv2d
from schedules import parse_target


def _text(renderable: object) -> str:
    from rich.console import Console

    console = Console(width=300, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("threads", [1, 2])
def test_suite_result_is_json_with_its_schema(threads: int) -> None:
    said: list[str] = []
    found = run_suite("gemm", layer="odd:31x37x41", threads=threads, repeat=2, progress=said.append)
    assert found["schema"] == header.SCHEMA and found["kind"] == "suite"
    assert {"date", "command", "machine", "versions", "peak", "bandwidth", "rows", "geomean"} <= set(found)
    assert found["machine"]["threads"] == threads and found["peak"]["gflops"] > 0
    (row,) = found["rows"]
    assert row["macs"] == 31 * 37 * 41 and row["runs"] >= 2 and 0 < row["best"] <= row["median"]
    assert row["lowering"] == "dense" and row["asked"] == "plain"
    assert row["calls"] > 1, "a layer of microseconds is called several times in one measurement"
    assert row["gflops"] == pytest.approx(2 * row["macs"] / row["best"] / 1e9)
    assert row["bytes"] == 4 * (31 * 41 + 41 * 37 + 31 * 37)
    assert "odd:31x37x41" in _text(render(json.loads(json.dumps(found, allow_nan=False))))
    row["peak"] = 0.7 * found["peak"]["gflops"]
    assert "warning: beside 1 of 1 rows the peak was below 80 %" in _text(render(found))
    assert said[0].startswith("peak ") and said[-1].startswith("1/1 odd:31x37x41: dense ")


def test_suite_tells_why_a_lowering_does_not_apply() -> None:
    found = run_suite("layers", layer="alexnet:conv1", lowerings=["pointwise"], threads=1)
    assert "best" not in found["rows"][0] and found["rows"][0]["reason"]
    assert found["geomean"] == {"pointwise": None}
    assert "needs a 1x1 kernel" in _text(render(found))
    with pytest.raises(InputError, match="unknown lowering 'magic'; choose from auto, plain, dense"):
        run_suite("layers", lowerings=["magic"])


def test_a_depthwise_layer_is_listed_with_its_bytes_and_not_in_the_mean() -> None:
    layer = "mobilenet_v2:block15_depthwise"
    problem = shapes.layers_suite()[layer]
    found = run_suite("layers", layer=layer, lowerings=["plain", "implicit-gemm"], threads=1, repeat=1)
    plain, other = found["rows"]
    assert (plain["lowering"], other["lowering"]) == ("depthwise", "implicit-gemm")
    assert plain["bound"] == other["bound"] == "depthwise"
    moved = 4 * (problem.c * 7 * 7 + problem.c * 9 + problem.c * 7 * 7)
    assert plain["bytes"] == moved
    assert plain["bandwidth_share"] == pytest.approx(moved / plain["best"] / 1e9 / found["bandwidth"]["read"])
    assert found["geomean"] == {"plain": None, "implicit-gemm": None}
    assert found["geomean_bandwidth"]["plain"] == pytest.approx(plain["bandwidth_share"])
    shown = render_markdown(found)
    assert "| bound by |" in shown and "of multiply-adds" in shown and "geometric mean of the peak" not in shown


def test_keys_that_come_to_the_same_lowering_share_their_times() -> None:
    found = run_suite("gemm", layer="odd:97x101x103", lowerings=["plain", "auto", "dense"], threads=1, repeat=1)
    assert [row["asked"] for row in found["rows"]] == ["plain", "auto", "dense"]
    assert len({(row["lowering"], row["best"]) for row in found["rows"]}) == 1
    assert _text(render(found)).count("odd:97x101x103") == 1


@pytest.mark.parametrize(
    ("problem", "key"),
    [
        (conv2d(8, 9, 9, 16, 3), "implicit-gemm"),
        (conv2d(8, 9, 9, 16, 3, g=2), "implicit-gemm"),
        (conv2d(8, 9, 9, 16, 1, 2), "pointwise"),
        (conv2d(8, 9, 9, 8, 3, g=8), "depthwise"),
        (conv2d(8, 9, 9, 16, 3, g=8), "implicit-gemm"),  # two outputs a channel
        (conv2d(8, 6, 6, 16, 6, p=0), "dense"),
        (DenseProblem(4, 5, 6), "dense"),
    ],
)
def test_plain_takes_the_gemm_form_of_the_definition(problem: Problem, key: str) -> None:
    assert suites.resolve_key("plain", "x", problem, parse_target("llvm")).key == key


@pytest.mark.parametrize(
    ("suite", "problem", "bound"),
    [
        ("layers", conv2d(64, 56, 56, 64, 3), None),
        ("layers", conv2d(1, 9, 9, 1, 1), None),  # of a suite of layers only depthwise and matrix-vector rows
        ("layers", conv2d(8, 9, 9, 8, 3, g=8), "depthwise"),
        ("layers", conv2d(8, 6, 6, 16, 6, p=0), "matrix-vector"),
        ("gemm", DenseProblem(1, 512, 512), "matrix-vector"),
        ("gemm", DenseProblem(512, 512, 1), "matrix-vector"),
        ("gemm", DenseProblem(512, 512, 512), None),
        ("gemm", DenseProblem(8, 512, 512), "3.9 flop/byte, below 7.5"),
    ],
)
def test_what_is_bound_by_memory(suite: str, problem: Problem, bound: str | None) -> None:
    assert suites.memory_bound(suite, problem, 7.5) == bound


def test_burst_makes_measurements_long_enough_and_few_enough() -> None:
    for once in (1e-7, 1e-6, 4e-5, 6e-5, 1e-3, 0.5, 5.0):
        runs, calls = turns.burst(once, 15)
        assert (calls > 1) == (once < turns.SMALL_SECONDS)
        assert runs >= 1 and runs * calls * once * turns.ROUNDS <= turns.ROUNDS * max(once, turns.MAX_SECONDS)
        if once < 1e-2:
            assert runs * turns.ROUNDS >= 15 and runs * calls * once * turns.ROUNDS >= turns.MIN_SECONDS


def test_lowerings_of_a_layer_take_turns() -> None:
    log: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def time(self, repeat: int, warmup: int, number: int = 1) -> list[float]:
            log.append(self.name)
            return [1e-3] * repeat

    kernels: dict[str, Callable[[], object]] = {name: Kernel(name) for name in "ab"}
    found = turns.measure_in_turn(kernels, 10)
    assert "".join(log) == "aabb" + "abbaabbaab"
    assert found["a"]["runs"] == found["b"]["runs"] >= 10 and found["a"]["calls"] == 1


def test_quick_takes_a_spread_of_the_shapes() -> None:
    everything = {str(i): DenseProblem(1, 1, i + 1) for i in range(100)}
    found = list(suites.spread(everything, 12))
    assert len(found) == 12 and found == sorted(found, key=int) and found[0] == "0" and int(found[-1]) > 90
    assert list(suites.spread(everything, 1000)) == list(everything)
