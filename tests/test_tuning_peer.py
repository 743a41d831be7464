"""The peer MetaSchedule: its time, its database, its processes; the tuning itself is marked slow."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gemmify.bench import metaschedule, metaschedule_worker
from gemmify.bench.report import render_markdown
from gemmify.cli import main
from gemmify.errors import GemmifyError, InputError

GOOD, FAILED = [0, [[], [0.002], {}, []]], [0, [[], [1e10], {}, []]]


def database(folder: Path, records: str, workloads: str = '["1", {}]\n["2", {}]\n') -> Path:
    (folder / metaschedule.RECORDS).write_text(records)
    (folder / metaschedule.WORKLOADS).write_text(workloads)
    return folder


def test_a_database_that_was_cut_keeps_what_is_whole(tmp_path: Path) -> None:
    whole = "".join(json.dumps(row) + "\n" for row in (GOOD, FAILED, [1, *GOOD[1:]]))
    work = database(tmp_path, whole + json.dumps(GOOD)[:-4])
    assert metaschedule.clean_database(work) == {"trials": 3, "failed": 1, "tuned": 2}
    assert [json.loads(line) for line in (work / metaschedule.RECORDS).read_text().splitlines()] == [
        GOOD,
        FAILED,
        [1, *GOOD[1:]],
    ]


def test_a_record_whose_workload_was_cut_is_dropped(tmp_path: Path) -> None:
    work = database(tmp_path, f"{json.dumps(GOOD)}\n{json.dumps([1, *GOOD[1:]])}\n", '["1", {}]\n["2", {')
    assert metaschedule.clean_database(work) == {"trials": 1, "failed": 0, "tuned": 1}


@pytest.mark.parametrize("records", ["", json.dumps(FAILED) + "\n", "[0, [["])
def test_without_one_time_there_is_nothing_to_compile(tmp_path: Path, records: str) -> None:
    with pytest.raises(GemmifyError, match="no candidate was measured in its time; give it more"):
        metaschedule.clean_database(database(tmp_path, records))


def test_trials_an_iteration_are_the_default_where_there_is_time() -> None:
    counts = [metaschedule_worker.trials_an_iteration(60 * minutes, 25) for minutes in (0.1, 15, 30, 24 * 60)]
    assert counts[0] == metaschedule_worker.LEAST_TRIALS and counts[-1] == metaschedule_worker.STOCK_TRIALS
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), 1e9])
def test_minutes_that_are_none_are_refused(minutes: float) -> None:
    with pytest.raises(InputError, match="must be above 0"):
        metaschedule.check_minutes(minutes, ["metaschedule"])


def test_minutes_belong_to_the_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert metaschedule.check_minutes(None, []) == metaschedule.DEFAULT_MINUTES
    assert main(["bench", "squeezenet", "--peers", "onnxruntime", "--tuning-minutes", "3"]) == 2
    assert "--tuning-minutes is the time of the peer metaschedule" in capsys.readouterr().err
    assert main(["bench", "--suite", "layers", "--tuning-minutes", "3"]) == 2
    assert "--tuning-minutes belongs to a model" in capsys.readouterr().err


FAKE = """
import json, os, subprocess, sys, time
from pathlib import Path
step, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
work = Path(request["work"])
if step == "tune":
    assert os.environ["TVM_NUM_THREADS"] == "2"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (work / "child").write_text(str(child.pid))
    (work / "tasks.json").write_text(json.dumps({"tasks": 3, "per_iteration": 4}))
    (work / "database_workload.json").write_text('["1", {}]\\n')
    (work / "database_tuning_record.json").write_text('[0, [[], [0.5], {}, []]]\\n[0, [[')
    time.sleep(SLEEP)
else:
    FINISH
    Path(request["library"]).write_text("code")
"""


def fake(folder: Path, sleep: float = 600, finish: str = "pass") -> tuple[str, ...]:
    script = folder / "fake.py"
    script.write_text(FAKE.replace("SLEEP", str(sleep)).replace("FINISH", finish))
    return (sys.executable, str(script))


def gone(pid: int) -> bool:
    """Whether the process ended (it may wait for its parent to hear of it)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def tuned(folder: Path, command: tuple[str, ...]) -> tuple[Path, dict[str, object]]:
    return metaschedule.tuned_library(
        folder / "model.onnx", folder, target={"kind": "llvm"}, threads=2, minutes=1 / 60, command=command
    )


def test_a_tuner_that_does_not_end_is_killed_with_its_children_and_what_it_wrote_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metaschedule, "LATE_SECONDS", 1.0)
    library, found = tuned(tmp_path, fake(tmp_path))
    assert library.read_text() == "code"
    assert {k: found[k] for k in ("trials", "failed", "tasks", "tuned", "per_iteration")} == {
        "trials": 1,
        "failed": 0,
        "tasks": 3,
        "tuned": 1,
        "per_iteration": 4,
    }
    pid, deadline = int((tmp_path / "metaschedule" / "child").read_text()), time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)


def test_a_process_that_fails_says_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(GemmifyError, match=r"metaschedule failed with exit status 3; it said: no such operator"):
        tuned(tmp_path, fake(tmp_path, 0, "print('no such operator'); sys.exit(3)"))


@pytest.mark.slow
def test_a_network_tuned_for_a_minute_computes_what_ours_does(tmp_path: Path) -> None:
    from gemmify.bench import run_model

    result = run_model("squeezenet", peers=("metaschedule",), tuning_minutes=1.0, repeat=3)
    assert result["metaschedule"]["trials"] > 0
    assert result["engines"]["metaschedule"]["agrees"]
    assert np.isfinite(result["engines"]["metaschedule"]["ratio"])
    assert "metaschedule tuned for" in render_markdown(result)
