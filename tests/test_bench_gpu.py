"""The GPU suite, as far as it can be seen without a GPU: its problems, the runner's arithmetic, tables, refusals; what
runs on a device is in tests/gpu/test_bench_gpu.py."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gemmify import cli, layer_reference
from gemmify.bench import gpu_networks, gpu_problems, gpu_report, gpu_suite, report
from gemmify.bench.gpu_runner import arrays, parent, reference, torch_graph, weights
from gemmify.bench.gpu_runner.script import RESULTS_FORMAT, run_sections, summary
from gemmify.errors import InputError
from gemmify.random_layers import random_layers
from gemmify.zoo import ZOO
from lowering import LOWERINGS
from lowering.epilogue import EpilogueOp
from lowering.staged import as_staged

PROBLEMS = gpu_problems.check_problems()


def test_problems_cover_every_lowering_and_precision() -> None:
    layers = random_layers(3)
    random = [as_staged(next(layers)) for _ in range(300)]
    usable = {key for key, low in LOWERINGS.items() if any(low.applicable(p) is None for p in random)}
    assert len(usable) > len(LOWERINGS) / 2
    found = gpu_problems.wanted_checks()
    assert {(w.lowering, w.precision) for w in found} >= {(k, p) for k in usable for p in gpu_problems.PRECISIONS}
    assert {(w.name, w.precision) for w in found} == {(n, p) for n in PROBLEMS for p in gpu_problems.PRECISIONS}
    assert len({w.id for w in found}) == len(found) and 35 <= len(PROBLEMS) <= 45


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_runner_knows_what_a_layer_is(name: str) -> None:
    problem = PROBLEMS[name]
    data, weight = layer_reference.random_arrays(problem, 1)
    want = layer_reference.reference(problem, data, weight)
    described = json.loads(json.dumps(gpu_problems.described(problem)))
    got = reference.layer(described, data.astype("float64"), weight.astype("float64"))
    assert np.abs(got - want).max() < 1e-12 * np.abs(want).max()


def test_the_runner_knows_the_epilogues() -> None:
    rng = np.random.default_rng(2)
    value, bias, other = rng.standard_normal((2, 3, 4)), rng.standard_normal(4), rng.standard_normal((2, 3, 4))
    for ops in (*gpu_problems._EPILOGUES, gpu_problems.EPILOGUE):
        operands = {op.operand: bias if op.kind == "bias" else other for op in ops if op.operand is not None}
        want = layer_reference.apply_epilogue(value, ops, [operands[i] for i in sorted(operands)])
        steps = [[op.kind, op.kind if op.operand is not None else None, list(op.params)] for op in ops]
        got = reference.epilogue(value, steps, {"bias": bias, "add": other})
        assert np.array_equal(got, want)
    assert EpilogueOp("relu") in gpu_problems.EPILOGUE


def test_bfloat16_is_rounded_as_it_should_be() -> None:
    values = np.random.default_rng(3).standard_normal(5000).astype(np.float32) * np.float32(1e3)
    values[:4] = [0.0, 1.00390625, 1.01171875, -2.0]  # two of them half way between neighbours
    want = values.astype(ml_dtypes.bfloat16)
    stored = arrays.narrow(values, "bfloat16")
    assert np.array_equal(stored, want.view(np.uint16))
    assert np.array_equal(arrays.widen(stored, "bfloat16"), want.astype(np.float64))
    for dtype in arrays.STORED:
        poisoned = arrays.widen(arrays.poison((3,), dtype), dtype)
        assert (np.isnan(poisoned) if "float" in dtype else poisoned == np.iinfo(dtype).max).all()


def test_a_network_is_described_with_its_batch_norms_folded() -> None:
    """Of 53 convolutions 33 have a ReLU behind them and 16 an addition and a ReLU; each of the others, a shortcut, is
    read by an addition."""
    builder = gpu_networks.FoldedBuilder("resnet50")
    model = builder.finish(ZOO["resnet50"](builder, builder.input("data", (1, 3, 224, 224))))
    graph = json.loads(json.dumps(gpu_networks.graph_of(model, builder.weights)))
    assert {w["name"] for w in graph["weights"]} == set(builder.weights) and not model.graph.initializer
    assert "BatchNormalization" not in {node["op"] for node in graph["nodes"]}
    assert torch_graph.unknown_operators(graph["nodes"]) == []
    fused = torch_graph.fuse(graph["nodes"], graph["outputs"])
    count = [sum(node.get("then") == kind for node in fused) for kind in ("relu", "add", None)]
    assert count == [33, 16, len(fused) - 49] and sum(node["op"] == "Conv" for node in fused) == 53
    assert not any(node["op"] == "Relu" for node in fused)
    written = {name for node in fused for name in node["outputs"]} | set(builder.weights) | {"data"}
    assert all(name in written for node in fused for name in node["inputs"])
    small = {"name": "w", "shape": [4, 5], "low": -2.0, "high": 1.0}
    drawn = weights.draw(small, 1)
    assert drawn.shape == (4, 5) and -2 <= drawn.min() < -1 and 0 < drawn.max() < 1
    assert np.array_equal(drawn, weights.draw(small, 1)) and not np.array_equal(drawn, weights.draw(small, 2))


# --- the parent of the processes ------------------------------------------------------------------------------------

CHILD = """
import json, os, signal, sys, time
request = json.load(sys.stdin)
def answer(**line): print(json.dumps(line), flush=True)
if request["entries"][0]["id"] == "refused":
    answer(refused="no GPU")
    sys.exit(2)
answer(machine={"gpu": "none"})
for entry in request["entries"]:
    answer(begin=entry["id"])
    what = entry["what"]
    if what == "die":
        print("illegal address", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(60)
    if what == "fatal":
        answer(end=entry["id"], failed="CudaFailure: 700")
        sys.exit(3)
    answer(end=entry["id"], result={"right": True, "process": os.getpid()})
"""


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Section whose child is CHILD, and what it kept."""
    folder = tmp_path / "sub" / "fakerunner"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    shutil.copyfile(parent.__file__, folder / "parent.py")
    (folder / "child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(folder.parent))
    made = importlib.import_module("fakerunner.parent")
    kept: list[tuple[str, dict[str, Any]]] = []
    yield made, made.Section("", {}, lambda e, line: kept.append((e["id"], line)), lambda found: None), kept
    for name in [n for n in sys.modules if n.startswith("fakerunner")]:
        del sys.modules[name]


def test_a_crash_takes_one_entry_and_no_other(section: Any) -> None:
    _, made, kept = section
    plan = ["ok", "die", "ok", "fatal", "ok", "hang", "ok"]
    entries = [{"id": str(i), "what": what} for i, what in enumerate(plan)]
    assert made.run(entries, 1.5, time.monotonic() + 60) == []
    assert [name for name, _ in kept] == [e["id"] for e in entries]
    lines = [line for _, line in kept]
    assert "SIGKILL: illegal address" in lines[1]["failed"] and lines[3]["failed"] == "CudaFailure: 700"
    assert lines[5]["failed"] == "it took more than 1.5 s"
    pids = [line["result"]["process"] for line in lines if "result" in line]
    assert len(pids) == 4 == len(set(pids)), "each of the three that failed ended its process"


def test_time_that_is_up_and_a_machine_that_cannot(section: Any) -> None:
    module, made, kept = section
    entries = [{"id": "1", "what": "ok"}, {"id": "2", "what": "hang"}, {"id": "3", "what": "ok"}]
    begin = time.monotonic()
    left = made.run(entries, 30.0, begin + 1.5)
    assert [e["id"] for e in left] == ["2", "3"] and [name for name, _ in kept] == ["1"]
    assert made.run(entries, 30.0, begin) == entries
    with pytest.raises(module.Refused, match="no GPU"):
        made.run([{"id": "refused"}], 1.0, time.monotonic() + 20)


def test_sections_share_the_time() -> None:
    class Run:
        def __init__(self) -> None:
            self.bundle = {"entries": [{"section": s, "id": f"{s}/a"} for s in ("check", "layer", "network")]}
            self.shares: list[tuple[str, float]] = []

        def section(self, name: str, entries: Any, share: float) -> None:
            self.shares.append((name, share))

    run: Any = Run()
    assert run_sections(run, ["peak", "check", "layer"], "*") and not run_sections(run, ["peak"], "*")
    assert [name for name, _ in run.shares] == ["check", "layer"]
    assert 0 < run.shares[0][1] < 1 and run.shares[1][1] == pytest.approx(1.0)


# --- results ---------------------------------------------------------------------------------------------------------


def times(median: float) -> dict[str, Any]:
    return {"median": median, "best": median, "low": 0.9 * median, "high": 1.1 * median, "runs": 9}


def layer(name: str, batch: int, ours: float, eager: float, fused: float, **more: Any) -> dict[str, Any]:
    found = {"ours": times(ours), "eager": times(eager), "fused": times(fused)}
    ratio = min(eager, fused) / ours
    entry = {"id": f"layer/{name}/{batch}", "section": "layer", "name": name, "batch": batch, "precision": "float16"}
    return {**entry, "lowering": "direct", "times": found, "ratio": ratio, "gflops": 2e5, "right": True, **more}


def result() -> dict[str, Any]:
    check = {"section": "check", "lowering": "im2col", "precision": "tf32"}
    entries: list[dict[str, Any]] = [
        {"id": "peak/matrix", "section": "peak", "kind": "matrix", "precision": "float16", "tflops": 800.0},
        {"id": "peak/read", "section": "peak", "kind": "read", "precision": "", "gbytes": 4000.0},
        {"id": "a", "right": True, "error": 1e-4, **check},
        {"id": "b", "right": False, "error": 1.0, "why": "off by much", **check},
        layer("conv", 32, 1e-4, 3e-4, 2e-4),
        layer("conv", 1, 1e-5, 1e-5, 5e-6, ratio_alone=0.25),
        layer("wrong", 1, 1e-9, 1.0, 1.0, right=False, why="off"),
        {"id": "layer/dead", "section": "layer", "name": "dead", "batch": 1, "precision": "float16", "crashed": "700"},
    ]
    bundle = {"archs": ["sm_90"], "target": "cuda -arch=sm_90", "failures": [["check/x", "no schedule"]]}
    machine = {"gpu": "NVIDIA H200", "torch": "2.11"}
    rest = {"seed": 1, "date": "2026", "minutes": 8, "not_run": ["network/y"], "seconds": {}}
    return {"format": RESULTS_FORMAT, "bundle": bundle, "machine": machine, "entries": entries, **rest}


def test_means_are_of_right_results_alone() -> None:
    found = gpu_report.summarize(result())
    assert (found["checks"]["right"], found["checks"]["of"]) == (1, 2)
    assert found["peaks"] == {"float16": 800.0, "read": 4000.0}
    rows = {row["batch"]: row for row in found["layers"]}
    assert rows[32]["geomean"] == pytest.approx(2.0) and rows[1]["geomean"] == pytest.approx(0.5)
    assert rows["all"]["geomean"] == pytest.approx(1.0) and rows["all"]["count"] == 2
    assert rows["all"]["least"] == pytest.approx(0.5) and rows[1]["geomean_alone"] == pytest.approx(0.25)
    assert "geometric mean 1.00" in " ".join(summary(result()["entries"]))


def test_a_result_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, again = tmp_path / "result.json", tmp_path / "again.json"
    place.write_text(json.dumps(result()))
    assert cli.main(["bench", "--import", str(place), "--markdown", "--json", str(again)]) == 1
    told = capsys.readouterr()
    assert "im2col on b, dead" not in told.err and "off by much" in told.err
    for piece in ("1 of 2 right", "NVIDIA H200", "25.0 %", "| wrong WRONG |", "failed or wrong: 3", "not built: 1"):
        assert piece in told.out, told.out
    assert "1 entries were not reached within 8 minutes" in told.out
    report.render(gpu_suite.import_result(again))
    assert gpu_suite.import_result(again)["build_failures"] == [["check/x", "no schedule"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is no JSON"),
        ("[]", "found none"),
        ('{"format": "gemmify-gpu-results/0"}', "found 'gemmify-gpu-results/0'"),
        (json.dumps({"format": RESULTS_FORMAT}), "has no bundle; it is damaged"),
        (json.dumps({**result(), "entries": [{"id": 1}]}), "holds entries that are none"),
    ],
)
def test_files_that_are_no_results(text: str, said: str, tmp_path: Path) -> None:
    place = tmp_path / "x.json"
    place.write_text(text)
    with pytest.raises(InputError, match=said):
        gpu_suite.import_result(place)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--suite", "gpu", "--target", "llvm"), "needs a GPU as its target, got llvm"),
        (("--suite", "gpu", "--bundle", "x.tar"), "a bundle needs the GPU that it is for"),
        (("--suite", "gpu", "--bundle", "none/x.tar", "--target", "cuda -arch=sm_90"), "there is no folder none"),
        (
            ("--suite", "gpu", "--bundle", "x.tar", "--minutes", "3", "--target", "cuda -arch=sm_90"),
            "run.py of the bundle",
        ),
        (("--suite", "gpu", "--lowering", "direct", "--target", "cuda -arch=sm_90"), "--lowering does not belong"),
        (("--suite", "layers", "--bundle", "x.tar"), "--bundle belongs to --suite gpu"),
        (("--import", "x.json", "alexnet"), "--import shows a file of results"),
        (("--import", "x.json"), "cannot read x.json: No such file"),
    ],
)
def test_calls_that_are_wrong(
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *words]) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []
