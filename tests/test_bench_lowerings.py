"""`gemmify bench --suite lowerings`: what is measured, what counts as a failure, what the summary claims."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gemmify import cli
from gemmify.bench import exact, lowerings, lowerings_summary, render, render_markdown, run_lowerings, shapes, turns
from gemmify.errors import CheckError, InputError
from gemmify.layer import compile_layer
from lowering import LOWERINGS, Problem, conv2d
from lowering.epilogue import EpilogueOp
from schedules import Machine, parse_target

SMALL: dict[str, Problem] = {"net:a": conv2d(8, 15, 17, 24, 3), "net:b": conv2d(3, 33, 33, 16, 7, 2, 3)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerings, "select_shapes", lambda suite, layer=None: dict(SMALL))


def _text(renderable: object) -> str:
    from rich.console import Console

    console = Console(width=400, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_each_lowering_is_timed_checked_and_weighed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, int]] = []

    def spy(problem: Problem, key: str, target: Any, **options: Any) -> Any:
        compiled.append((key, Machine.from_target(target).cores))
        return compile_layer(problem, key, target, **options)

    monkeypatch.setattr(lowerings, "compile_layer", spy)
    said: list[str] = []
    keys = ["im2row", "im2col", "winograd-2", "pointwise"]
    found = run_lowerings(layer="*", lowerings=keys, threads=2, repeat=3, seed=5, progress=said.append)
    assert found["kind"] == "lowerings" and found["threads"] == [1, 2] and found["failures"] == []
    rows = {(row["name"], row["lowering"], row["threads"]): row for row in found["rows"]}
    assert {key[:2] for key in rows} == {
        *(("net:a", key) for key in ("im2row", "im2col", "winograd-2")),
        *(("net:b", key) for key in ("im2row", "im2col")),
    }
    assert sorted(compiled) == sorted((key, threads) for _, key, threads in rows), "scheduled for as many cores"
    patches = 4 * 9 * 8 * 15 * 17
    assert rows["net:a", "im2row", 1]["workspace_bytes"] == patches
    for row in rows.values():
        assert row["right"] and 0 < row["error"] < 1e-5 and row["error_after"] <= row["error"] + 1e-7
        assert row["workspace_bytes"] == row["tensor_bytes"] + row["scratch_bytes"] == row["workspace_formula_bytes"]
        assert len(row["times"]) == row["runs"] >= 3 and min(row["times"]) == row["best"] <= row["median"]
        macs = SMALL[row["name"]].macs
        assert row["peak_share"] == pytest.approx(2 * macs / row["best"] / 1e9 / row["peak"])
    one, two = (rows["net:a", "winograd-2", threads]["scratch_bytes"] for threads in (1, 2))
    assert 0 < one <= two, "scratch inside the kernel, once a thread"
    a, b = found["layers"]
    assert "needs a 1x1 kernel" in a["inapplicable"]["pointwise"] and "stride 1" in b["inapplicable"]["winograd-2"]
    assert set(a["auto"]) == {"1", "2"} and found["claim"] is None
    assert said[-1].startswith("2/2 net:b: 2 lowerings; fastest on 1: ")
    shown = _text(render(json.loads(json.dumps(found, allow_nan=False))))
    assert shown.count("winograd-2") >= 2 and "FAILED" not in shown and "seed 5" in shown
    assert "| lowering | ms on 1 thread |" in render_markdown(found)


def test_what_fails_is_listed_and_the_others_go_on(
    small: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(problem: Problem, key: str, target: Any, **options: Any) -> Any:
        if key == "direct":
            raise RuntimeError("no such instruction")
        if key == "im2row":  # a result without its ReLU
            options["epilogue"] = (EpilogueOp("bias", 0),)
        kernel = compile_layer(problem, key, target, **options)
        if key == "im2col":
            cost = replace(kernel.kernels.cost, workspace_bytes=kernel.workspace_bytes - 1)
            kernel.kernels = replace(kernel.kernels, cost=cost)
        return kernel

    monkeypatch.setattr(lowerings, "compile_layer", broken)
    words = "bench --suite lowerings --layer * --lowering im2row,im2col,direct,implicit-gemm --threads 1 --repeat 1"
    assert cli.main([*words.split(), "--json", "-"]) == 1
    out, err = capfd.readouterr()
    found = json.loads(out)
    what = {(failure["name"], failure["lowering"]): failure["what"] for failure in found["failures"]}
    assert set(what) == {(name, key) for name in SMALL for key in ("im2row", "im2col", "direct")}
    assert "differs from float64" in what["net:a", "im2row"]
    assert what["net:a", "direct"] == "RuntimeError: no such instruction"
    assert "bytes of workspace, its formula says" in what["net:a", "im2col"]
    assert "gemmify: error: " in err and "on net:a" in err and "FAILED: " in err
    assert {row["lowering"] for row in found["rows"]} == {"im2row", "im2col", "implicit-gemm"}
    wrong = {row["lowering"] for row in found["rows"] if not row["right"]}
    assert wrong == {"im2row"}, "bytes that disagree make no wrong numbers"
    assert "im2row" not in [entry["lowering"] for entry in found["by_lowering"]], "a wrong result is no result"
    assert "no such instruction" in _text(render(found))


class _Computed:
    """A stand-in for a compiled layer with bias and ReLU: it computes in NumPy."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.kernels = type("Built", (), {"lowering": LOWERINGS["implicit-gemm"]})()

    def bind(self, data: np.ndarray, weight: np.ndarray, operands: list[np.ndarray]) -> None:
        self.value = exact.reference(self.problem, data, weight) + operands[0]

    def __call__(self) -> None:
        self.out = np.maximum(self.value, 0)

    def output(self) -> np.ndarray:
        return self.out


def test_an_error_under_the_relu_is_seen() -> None:
    problem = conv2d(16, 5, 5, 8, 3)
    drawn = exact.Exact.draw(problem, np.random.default_rng(1))
    assert drawn.error(_Computed(problem)) < 1e-12  # type: ignore[arg-type]

    class Unwritten(_Computed):
        def __call__(self) -> None:
            super().__call__()
            self.out[..., 3] = np.nan

    kernel = Unwritten(problem)
    assert np.isnan(drawn.error(kernel)) and lowerings.finite(drawn.error(kernel)) is None  # type: ignore[arg-type]
    # Where the output is negative, the ReLU would hide the fault.
    negative = np.argwhere(drawn.want < 0)[0]

    class Hidden(_Computed):
        def bind(self, data: np.ndarray, weight: np.ndarray, operands: list[np.ndarray]) -> None:
            super().bind(data, weight, operands)
            self.value[tuple(negative)] *= 1.5

    assert drawn.error(Hidden(problem)) > 1e-3  # type: ignore[arg-type]


def _row(name: str, key: str, threads: int, best: float, workspace: int, right: bool = True) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "lowering": key, "threads": threads, "best": best, "median": 2 * best}
    return {**row, "workspace_bytes": workspace, "right": right, "peak_share": 1.0 / best, "error": 1e-7}


def _layer(name: str, kernel: int = 3, stride: int = 1, auto: str = "im2row") -> dict[str, Any]:
    problem = {"kernel": (kernel, kernel), "stride": (stride, stride)}
    return {"name": name, "problem": problem, "auto": {"1": auto, "2": auto}}


def test_the_low_memory_claim_is_a_ratio_to_the_faster_patch_form() -> None:
    rows = [
        *(_row("x", "kn2row-aa", t, 3.0 / t, 10) for t in (1, 2)),
        *(_row("x", "im2row", t, 2.0 / t, 400) for t in (1, 2)),
        *(_row("x", "im2col", t, 1.5 * t, 500) for t in (1, 2)),
        *(_row("y", key, 1, best, 100) for key, best in (("kn2row-aa", 1.0), ("im2row", 2.0), ("im2col", 4.0))),
        *(_row(n, key, 1, 1.0, 100) for n in ("strided", "small") for key in ("kn2row-aa", "im2row", "im2col")),
        *(_row("wrong", key, 1, 1.0, 100, key != "im2row") for key in ("kn2row-aa", "im2row", "im2col")),
    ]
    layers = [_layer("x"), _layer("y"), _layer("strided", stride=2), _layer("small", kernel=1), _layer("wrong")]
    found = lowerings_summary.summarize_lowerings(rows, layers, [1, 2])["claim"]
    one, two = found["threads"]
    assert {entry["name"]: entry["patches"] for entry in one["layers"]} == {"x": "im2col", "y": "im2row"}
    assert [entry["ratio"] for entry in one["layers"]] == [2.0, 0.5] and one["geomean"] == pytest.approx(1.0)
    assert one["holds"] and (one["workspace"], one["workspace_patches"]) == (110, 600)
    assert [entry["patches"] for entry in two["layers"]] == ["im2row"] and two["geomean"] == pytest.approx(1.5)
    assert not two["holds"]
    without = [row for row in rows if row["lowering"] != "kn2row-aa"]
    assert lowerings_summary.summarize_lowerings(without, layers, [1, 2])["claim"] is None


def test_the_summary_says_how_far_auto_is_behind() -> None:
    rows = [_row("x", "im2row", 1, 3.0, 10), _row("x", "mec", 1, 2.0, 5), _row("y", "im2row", 1, 1.0, 10)]
    rows.append(_row("y", "direct", 1, 0.1, 0, right=False))
    found = lowerings_summary.summarize_lowerings(rows, [_layer("x"), _layer("y"), _layer("none")], [1])
    (auto,) = found["auto"]
    assert (auto["layers"], auto["fastest_on"]) == (2, 1) and auto["behind_fastest"] == pytest.approx(1.5**0.5)
    assert auto["worst"] == {"name": "x", "auto": "im2row", "fastest": "mec", "auto_ratio": 1.5}
    by_key: Mapping[str, Any] = {entry["lowering"]: entry for entry in found["by_lowering"]}
    assert set(by_key) == {"im2row", "mec"} and by_key["im2row"]["layers"] == 2
    assert by_key["im2row"]["threads"][0]["fastest_on"] == 1
    assert found["by_layer"][2]["threads"] == []


def test_representatives_hold_the_layers_that_the_sources_name() -> None:
    everything = shapes.select_shapes("lowerings")
    assert {name.split(":")[0] for name in everything} == {*shapes.LOWERING_NETWORKS, "large"}
    suite = shapes.select_shapes("layers")
    named = {name: problem for name, problem in everything.items() if not name.startswith("large")}
    assert all(suite[name] == problem for name, problem in named.items()), "the names of the suite `layers`"
    chosen = shapes.representatives(everything)
    for problem in (
        conv2d(3, 224, 224, 96, 11, 4, 0),
        conv2d(64, 224, 224, 64, 3),  # VGG conv1.2
        conv2d(256, 56, 56, 256, 3),  # VGG conv3.2
        conv2d(128, 28, 28, 128, 3),  # ResNet-50
        conv2d(512, 7, 7, 512, 3),
    ):
        assert problem in chosen.values()
    assert len(chosen) < len(everything) / 2
    for name, problem in everything.items():
        kind = (name.split(":")[0], problem.kernel, problem.stride, problem.out_size)  # type: ignore[union-attr]
        alike = [p for n, p in chosen.items() if (n.split(":")[0], p.kernel, p.stride, p.out_size) == kind]  # type: ignore[union-attr]
        assert len(alike) == 1 and alike[0].macs >= problem.macs
    quick = lowerings.choose_shapes(everything, None, quick=True)
    assert 0 < len(quick) <= lowerings.QUICK_SHAPES and set(quick) <= set(chosen)
    assert lowerings.choose_shapes(everything, "*", quick=False) == everything


def test_a_hopeless_lowering_is_timed_once() -> None:
    calls: dict[str, int] = {"slow": 0, "fast": 0}

    class Kernel:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def time(self, repeat: int, warmup: int, number: int = 1) -> list[float]:
            calls[self.name] += (repeat + warmup) * number
            return [self.seconds] * repeat

    kernels: Any = {"slow": Kernel("slow", 4.0), "fast": Kernel("fast", 1e-3)}
    found = turns.measure_in_turn(kernels, 15, seconds=1.0)
    assert calls["slow"] == 2 and found["slow"]["runs"] == 1, "one to find out, one to time"
    assert found["fast"]["runs"] >= 15 and found["fast"]["times"] == [1e-3] * found["fast"]["runs"]


def test_wrong_calls_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerings, "compile_layer", lambda *_a, **_k: pytest.fail("something was compiled"))
    with pytest.raises(InputError, match="unknown lowering 'magic'; choose from dense, "):
        run_lowerings(lowerings=["im2row", "magic"])
    with pytest.raises(InputError, match=r"no layer 'vgg16:conv9'; close ones are .*vgg16:conv"):
        run_lowerings(layer="vgg16:conv9")
    with pytest.raises(InputError, match="bogus"):
        run_lowerings(target="bogus")
    with pytest.raises(InputError, match=r"is for a CPU \(llvm\), got cuda; for a GPU use --suite gpu"):
        run_lowerings(target="cuda -arch=sm_90")
    assert lowerings.check_keys(["direct", "im2row"]) == ["im2row", "direct"], "in the catalogue's order"


def test_one_core_of_the_same_machine() -> None:
    target = parse_target("llvm -mcpu=x86-64-v3")
    one = Machine.from_target(lowerings.with_cores(target, 1))
    assert one.cores == 1 and replace(one, cores=7) == replace(Machine.from_target(target), cores=7)


def test_the_command_fails_where_a_lowering_failed() -> None:
    from gemmify.commands import bench

    failures = [{"name": f"l{i}", "lowering": "mec", "threads": 1, "what": "it broke"} for i in range(6)]
    with pytest.raises(CheckError, match="mec on l0, mec on l1, mec on l2, mec on l3 and 2 more: it broke"):
        bench.check({"failures": failures})
    bench.check({"failures": []})
    bench.check({"rows": []})


def test_keys_that_do_not_apply_are_listed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_lowerings(layer="*", lowerings=["im2row", "winograd-2"], threads=1, repeat=1)
    assert found["asked"] == ["winograd-2", "im2row"]
    shown = _text(render(found))
    assert "winograd-2 does not apply: needs stride 1, got 2x2" in shown and "im2row does not apply" not in shown
    assert shown.count("multiply-adds; *N: what auto takes") == sum(
        any(key == layer["auto"]["1"] for key in ("im2row", "winograd-2")) for layer in found["layers"]
    )
    only = run_lowerings(layer="*", lowerings=["winograd-2"], threads=1, repeat=1)
    assert "net:b: 1x3x33x33" in _text(render(only)) and "|  |" not in render_markdown(only)
    monkeypatch.setattr(lowerings, "compile_layer", lambda *_a, **_k: pytest.fail("something was compiled"))
    monkeypatch.setattr(lowerings, "_limit", lambda *_a, **_k: pytest.fail("something was measured"))
    with pytest.raises(InputError, match=r"any of the 2 layers: pointwise needs a 1x1 kernel, got 3x3 \(net:a\)"):
        run_lowerings(layer="*", lowerings=["pointwise"], threads=1)
    with pytest.raises(InputError, match="unknown lowering 'im2ro'; did you mean im2row"):
        run_lowerings(lowerings=["im2ro"])
