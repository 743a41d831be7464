"""Bundles: packed here, measured by a plain interpreter that knows nothing of gemmify, imported again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemmify.errors import GemmifyWarning, InputError
from gemmify.tuning.log import read
from gemmify.tuning.measure.bundle import import_results, write_bundle
from gemmify.tuning.measure.library import LibrarySpec, build_library
from gemmify.tuning.measure.runner.apart import apart
from gemmify.tuning.measure.runner.machine import cpu_model, cpuinfo
from gemmify.tuning.measure.runner.results import append, read_results, sealed
from gemmify.tuning.point import Point
from gemmify.tuning.task import Task
from lowering import Tile, conv2d
from lowering.epilogue import EpilogueOp
from lowering.problem import DenseProblem

CONV = Task(conv2d(16, 14, 14, 32, 3), (EpilogueOp("bias", 0), EpilogueOp("add", 1), EpilogueOp("relu")))
DENSE = Task(DenseProblem(1, 64, 48), (EpilogueOp("bias", 0),))
KEYS = ("direct", "im2col", "kn2row", "precomp-gemm", "indirect-gemm")  # the last two fill tables on the machine
POINTS = {CONV: [Point(key, Tile(2, 16)) for key in KEYS], DENSE: []}
UNBUILDABLE = Point("winograd-4", Tile(5, 16))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked folder of a bundle of two tasks."""
    folder = tmp_path_factory.mktemp("bundle")
    asked = {CONV: [UNBUILDABLE, *POINTS[CONV]], DENSE: []}
    with pytest.warns(GemmifyWarning, match=r"1 candidates could not be built .*winograd-4"):
        made = write_bundle(folder / "out.tar", [CONV, DENSE], asked, "llvm", 1, 5)
    assert (made.path, str(made), os.fspath(made)) == (folder / "out.tar", *2 * [str(folder / "out.tar")])
    with tarfile.open(made.path) as tar:
        assert all(name.startswith("gemmify-bundle/") for name in tar.getnames())
        assert made.left_out == 1 and made.candidates == sum(name.endswith(".so") for name in tar.getnames())
        tar.extractall(folder, filter="data")
    return folder / "gemmify-bundle"


def test_every_candidate_has_a_library_of_its_own(bundle: Path) -> None:
    """The first layer lacks one that could not be built: the next layer's must not take the place of its last one."""
    candidates = json.loads((bundle / "bundle.json").read_text())["candidates"]
    assert {c["task"] for c in candidates} == {0, 1}
    libraries = [c["library"] for c in candidates]
    assert len({c["id"] for c in candidates}) == len(set(libraries)) == len(libraries)
    assert sorted(libraries) == sorted(f"libraries/{p.name}" for p in (bundle / "libraries").iterdir())


@pytest.mark.parametrize("key", ["precomp-gemm", "indirect-gemm"])
def test_a_table_is_filled_once(key: str, tmp_path: Path) -> None:
    task = Task(conv2d(8, 9, 9, 16, 3, 2, 1), (EpilogueOp("relu"),))
    spec = build_library(task, Point(key, Tile(2, 16)), "llvm", str(tmp_path / "a.so"))
    assert LibrarySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    tables = [call for call in spec.weights if not call.reads]
    assert "offsets" in {call.writes for call in tables} and spec.given == ("data", "weight")
    assert not {call.symbol for call in tables} & {call.symbol for call in spec.calls}


def run(bundle: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The runner, from a folder that is no checkout, so that gemmify, lowering and schedules cannot be imported."""
    line = [sys.executable, "-P", "-c", _WITHOUT, str(bundle / "run.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=bundle.parent, timeout=120, **options)


_WITHOUT = """
import runpy, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("gemmify", "lowering", "schedules", "onnx", "scipy", "xgboost"):
            raise ImportError(name + " must not be imported")
sys.meta_path.insert(0, Nothing())
sys.argv = sys.argv[1:]
import os
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
import tvm
assert tvm.base._RUNTIME_ONLY, "the compiler was loaded"
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_bundle_is_measured_and_comes_back(bundle: Path, tmp_path: Path) -> None:
    results, logs = tmp_path / "results.jsonl", tmp_path / "logs"
    done = run(bundle, "--results", str(results))
    assert done.returncode == 0, done.stderr
    found = lines(results)
    trials = [r for r in found if r["stage"] == "trial"]
    assert [r["outcome"] for r in trials] == ["ok"] * len(trials), trials
    points = {json.dumps(r["point"]) for r in trials if r["task"] == CONV.to_dict()}
    assert {json.dumps(p.to_dict()) for p in POINTS[CONV]} <= points
    assert all(min(r["cold"] + r["warm"]) > 0 and 0 < r["error"] < 1e-4 for r in found)
    finals = [r for r in found if r["stage"] == "final"]
    assert len({r["group"] for r in finals}) == 1 and all(len(r["cold"]) == 20 for r in finals)

    told = import_results(results, logs)
    records = read(logs).records
    assert told["records"] == len(found) == len(records)
    assert {r.task for r in records} == {CONV, DENSE}
    assert {r.machine.cpu for r in records} == {cpu_model(cpuinfo()[0])}
    assert {(r.machine.threads, r.stage) for r in records} == {(1, "trial"), (1, "final")}
    again = import_results(results, logs)
    assert (again["records"], again["known"]) == (0, len(found))


def test_a_killed_runner_goes_on_where_it_stopped(bundle: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    line = [sys.executable, str(bundle / "run.py"), "--results", str(results)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()  # the first result is told after it was written
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = lines(results)
    with results.open("ab") as file:
        file.write(b'{"format": "gemmify-resu')  # what a kill in the middle of a write leaves
    assert run(bundle, "--results", str(results)).returncode == 0
    text = results.read_text().splitlines()
    after = [json.loads(row) for row in text if row.endswith("}")]
    assert after[: len(before)] == before
    trials = [r["candidate"] for r in after if r["stage"] == "trial"]
    described = json.loads((bundle / "bundle.json").read_text())
    assert sorted(trials) == sorted(c["id"] for c in described["candidates"])
    with pytest.warns(GemmifyWarning, match="1 damaged lines"):
        assert import_results(results, tmp_path / "logs")["records"] == len(after)


def changed(bundle: Path, tmp_path: Path, **values: Any) -> Path:
    """A copy of the bundle whose description says something else."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for place in bundle.iterdir():
        if place.name not in ("bundle.json", "results.jsonl"):
            (copy / place.name).symlink_to(place)
    (copy / "runner").unlink()
    (copy / "runner").mkdir()
    for place in (bundle / "runner").glob("*.py"):
        (copy / "runner" / place.name).write_bytes(place.read_bytes())
    described = json.loads((bundle / "bundle.json").read_text()) | values
    (copy / "bundle.json").write_text(json.dumps(described))
    return copy


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"needs": ["avx_of_the_future"]}, "needs CPU features that this machine lacks: avx_of_the_future"),
        ({"arch": "riscv64"}, "holds code for riscv64, this machine is"),
        ({"tvm": "9.1.0"}, "was made with apache-tvm 9.1.0, here is"),
        ({"format": "gemmify-bundle/9"}, "the bundle is gemmify-bundle/9"),
        ({"threads": 9999}, "runs 9999 threads, this process may use"),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused(
    bundle: Path, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    done = run(changed(bundle, tmp_path, **values))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert not list(tmp_path.rglob("results.jsonl"))


def test_wrong_numbers_cost_one_trial(bundle: Path, tmp_path: Path) -> None:
    described = json.loads((bundle / "bundle.json").read_text())
    described["candidates"][0]["tolerance"] = 1e-30
    described["candidates"][1]["library"] = "libraries/none.so"
    results = tmp_path / "results.jsonl"
    done = run(changed(bundle, tmp_path, candidates=described["candidates"]), "--results", str(results))
    assert done.returncode == 0
    outcomes = [r["outcome"] for r in lines(results) if r["stage"] == "trial"]
    assert outcomes[:2] == ["wrong", "crash"] and set(outcomes[2:]) == {"ok"}
    why = [r["why"] for r in lines(results)]
    assert "of the largest output" in why[0] and "none.so" in why[1]


def test_apart_survives_what_its_work_does() -> None:
    assert apart(lambda: 7, 10) == ("value", 7)
    assert apart(lambda: os.kill(os.getpid(), signal.SIGUSR1), 10) == ("crash", "its process was ended by SIGUSR1")
    assert apart(lambda: time.sleep(60), 0.2) == ("timeout", "running took more than 0.2 s")
    assert apart(lambda: 1 // 0, 10)[0] == "crash"
    assert apart(lambda: np.zeros(1 << 20), 10)[0] == "value"  # more than a pipe holds


def test_results_of_another_bundle_are_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    result: dict[str, Any] = {"bundle": "a", "stage": "trial"}
    append(str(path), [{**result, "sum": sealed(result)}])
    assert len(read_results(str(path), {"id": "a"})) == 1
    with pytest.raises(SystemExit):
        read_results(str(path), {"id": "b"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no results"),
        ('{"format": "other/3"}\n', "line 1: expected results of the format gemmify-results/1, found 'other/3'"),
        ('{"when": "2026-01-01T00:00:00Z"}\n', "found none"),
        ("[1]\n", "found none"),
        ('{"format": "gemmify-results/1", "sum": "0"}\n', "the checksum does not agree"),
        ("\x00\x01 garbage\n", "no result that can be used"),
    ],
)
def test_what_no_runner_wrote_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="results") as raised:
        import_results(path, tmp_path / "logs")
    assert said in str(raised.value)
    assert not (tmp_path / "logs").exists()


def test_a_result_that_is_no_record_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    result: dict[str, Any] = {"format": "gemmify-results/1", "bundle": "../../etc", "task": {}, "point": {}}
    path.write_text(json.dumps({**result, "sum": sealed(result)}) + "\n")
    with pytest.raises(InputError, match="are missing"):
        import_results(path, tmp_path / "logs")
    with pytest.raises(InputError, match="cannot read"):
        import_results(tmp_path / "none.jsonl", tmp_path / "logs")
