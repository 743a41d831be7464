"""`gemmify logs`: check and repair, stats, best, merge; good and bad input; rewriting beside writers."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tuning_log import in_child
from tuning_records import MACHINE, TASKS, record

from gemmify.cli import main
from gemmify.errors import GemmifyError, GemmifyWarning
from gemmify.tuning import line, log, stats
from gemmify.tuning.merge import merge, repair
from gemmify.tuning.record import Record

LINES = [line.encode(record(i)) for i in range(6)]


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main(["logs", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def as_json(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    code, out, err = call(capsys, *words, "--json", "-")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_check_finds_damage_and_repair_moves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_bytes(LINES[0])
    bad.write_bytes(LINES[1] + b"gar\xffbage" + LINES[2] + LINES[3][:100] + b"\n")
    bad.chmod(0o640)
    before = good.stat()
    code, out, err = call(capsys, "check", tmp_path)
    assert code == 1 and "2 damaged texts" in err and "check --repair" in err
    assert f"{bad}:2" in out and "3 records in 2 files" in out
    assert bad.read_bytes().startswith(LINES[1] + b"gar")

    assert call(capsys, "check", tmp_path, "--repair")[0] == 0
    assert bad.read_bytes() == LINES[1] + LINES[2]
    assert stat.S_IMODE(bad.stat().st_mode) == 0o640
    aside = tmp_path / "b.jsonl.damaged"
    assert aside.read_bytes() == b"gar\xffbage\n" + LINES[3][:100] + b"\n"
    assert (good.stat().st_ino, good.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl", "b.jsonl.damaged"]

    assert call(capsys, "check", tmp_path)[0] == 0
    bad.write_bytes(LINES[1] + b"more\n")
    assert call(capsys, "check", bad, "--repair")[0] == 0
    assert aside.read_bytes().endswith(b"\nmore\n") and b"gar\xffbage" in aside.read_bytes()


def test_check_tells_a_file_that_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.jsonl").symlink_to("nowhere")
    for words in ((), ("--repair",)):
        code, out, _ = call(capsys, "check", tmp_path, *words)
        assert code == 1 and "c.jsonl: cannot be read" in out
    assert os.listdir(tmp_path) == ["c.jsonl"]


def test_stats_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(LINES) + b"garbage\n")
    with pytest.warns(GemmifyWarning, match="1 damaged text was"):
        found = as_json(capsys, "stats", tmp_path)
    assert (found["records"], found["tasks"], found["files"], found["damaged"]) == (6, 3, 1, 1)
    assert found["outcomes"] == [
        {"outcome": "ok", "records": 4},
        {"outcome": "wrong", "records": 1},
        {"outcome": "timeout", "records": 1},
    ]
    assert found["lowerings"] == [{"lowering": "im2col", "records": 6, "ok": 4, "tasks": 3, "best": 3}]
    assert [row["records"] for row in found["machines"]] == [6] and found["machines"][0]["cpu"] == MACHINE.cpu
    with pytest.warns(GemmifyWarning):
        code, out, _ = call(capsys, "stats", tmp_path / "a.jsonl")
    assert code == 0 and "6 records of 3 tasks in 1 files, 1 damaged" in out and "im2col" in out


def finals(seconds: float) -> list[Record]:
    """The default of the first task at 2 ms and a rival at `seconds`, measured in turns."""
    default = stats.untuned(TASKS[0], MACHINE)
    assert default is not None
    base = replace(record(0), outcome="ok", stage="final", group="g1", warm=(1e-3,))
    times = tuple(2e-3 + i * 1e-6 for i in range(5))
    rival = tuple(seconds + i * 1e-6 for i in range(5))
    return [replace(base, point=default, cold=times), replace(base, cold=rival, session="other")]


def test_best_gives_the_verdict_of_each_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log.Writer(tmp_path / "a.jsonl") as writer:
        for made in [*finals(1e-3), record(1)]:
            writer.append(made)
    rows = as_json(capsys, "best", "--logs", tmp_path)["tasks"]
    assert len(rows) == 2
    (row,) = as_json(capsys, "best", "--logs", tmp_path, "--task", "64X56")["tasks"]
    assert row["lowering"] == "im2col" and row["settings"] == record(0).point.to_dict()
    assert row["ratio"] == pytest.approx(2e-3 / 1e-3, rel=0.01)
    assert (row["cold"], row["warm"]) == (pytest.approx(1.002e-3), 1e-3)
    code, out, _ = call(capsys, "best", "--logs", tmp_path)
    assert code == 0 and TASKS[0].title in out and "im2col 8x48" in out


def test_best_keeps_a_default_that_nothing_beats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log.Writer(tmp_path / "a.jsonl") as writer:
        for made in finals(1.999e-3):
            writer.append(made)
    (row,) = as_json(capsys, "best", "--logs", tmp_path)["tasks"]
    assert row["ratio"] == 1.0 and row["settings"] == finals(1)[0].point.to_dict()


def test_best_of_a_network_names_its_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gemmify.commands.logs import _names

    task, name = next(iter(_names("squeezenet").items()))
    with log.Writer(tmp_path / "a.jsonl") as writer:
        writer.append(replace(record(0), task=task))
        writer.append(record(1))
    found = as_json(capsys, "best", "squeezenet", "--logs", tmp_path)
    assert [row["layer"] for row in found["tasks"]] == [name] and found["covered"]["found"] == 1


def test_merge_is_a_union_by_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    edited = json.dumps({**json.loads(LINES[4]), "why": "two  spaces"}, indent=1)
    edited = edited.replace(f'"sum": "{json.loads(LINES[4])["sum"]}"', "").rstrip("} \n,") + "}}"
    a.write_bytes(LINES[3] + LINES[0] + b"garbage" + LINES[2])
    b.write_bytes(LINES[2] + LINES[1] + edited.encode())
    found = as_json(capsys, "merge", a, b, "-o", out)
    assert (found["records"], found["duplicates"], len(found["damaged"])) == (5, 1, 1)
    assert log.read(out).records == [*(record(i) for i in range(4)), replace(record(4), why="two  spaces")]
    assert out.read_bytes().startswith(b"".join(LINES[:4])) and out.read_bytes().count(b"\n") == 5
    assert (tmp_path / "c.jsonl.damaged").read_bytes() == b"garbage\n"
    # Into one of its sources, and with a folder as the source.
    assert call(capsys, "merge", tmp_path, "-o", out)[0] == 0
    assert len(log.read(out).records) == 5


def test_merge_never_writes_over_a_log_that_it_does_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, out = tmp_path / "a.jsonl", tmp_path / "c.jsonl"
    a.write_bytes(LINES[0])
    out.write_bytes(LINES[1])
    code, _, err = call(capsys, "merge", a, "-o", out)
    assert code == 2 and "is not among the logs" in err and out.read_bytes() == LINES[1]


def test_a_merge_that_fails_writes_nothing(tmp_path: Path) -> None:
    a, out = tmp_path / "a.jsonl", tmp_path / "c.jsonl"
    a.write_bytes(LINES[0])
    with pytest.raises(GemmifyError, match="needs all its logs"):
        merge([a, tmp_path / "none.jsonl"], out)
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("check", "nope"), "no tuning log nope"),
        (("stats", "nope"), "no tuning log nope"),
        (("best", "--logs", "nope"), "no tuning log nope"),
        (("best", "--task", "dense 77", "--logs", "."), "no record of a task with 'dense 77'"),
        (("best", "nonet", "--logs", "."), "nonet"),
        (("merge", "."), "-o"),
        (("merge", ".", "-o", "no/where.jsonl"), "no folder"),
        (("merge", ".", "-o", "."), "folder"),
        (("merge", "nope", "-o", "c.jsonl"), "no tuning log nope"),
        ((), "ACTION"),
        (("prune",), "prune"),
    ],
)
def test_bad_input_is_told(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES[0])
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *words)
    assert code == 2 and said in err and os.listdir(tmp_path) == ["a.jsonl"]


def test_the_default_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "stats")
    assert code == 2 and "no tuning log tuning_logs" in err and "gemmify tune MODEL" in err
    with log.Writer("tuning_logs/llvm-x/a.jsonl") as writer:
        writer.append(record(0))
    assert as_json(capsys, "stats")["records"] == 1


def test_repairs_and_merges_beside_writers_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"

    def write(first: int) -> None:
        with log.Writer(file) as writer:
            for i in range(first, first + 150):
                writer.append(record(i))

    children = [in_child(lambda first=first: write(first)) for first in (0, 1000)]
    with log.Writer(file) as writer:
        for i in range(2000, 2020):
            fd = os.open(file, os.O_WRONLY | os.O_APPEND)
            os.write(fd, b"garbage\n")
            os.close(fd)
            repair(file)
            merge([file], file)
            writer.append(record(i))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    loaded = log.read(file)
    wanted = {record(i) for i in (*range(150), *range(1000, 1150), *range(2000, 2020))}
    assert set(loaded.records) == wanted and len(loaded.records) == len(wanted)
    assert (tmp_path / "a.jsonl.damaged").read_bytes().count(b"garbage") == 20


def test_merge_top_keeps_finals_the_default_and_the_fastest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, out = tmp_path / "a.jsonl", tmp_path / "c.jsonl"
    speed = {0: 9e-3, 3: 3e-3, 6: 1e-3, 12: 2e-3, 15: 8e-3}  # all of the first task; number 0 is its first trial
    trials = [
        replace(record(i), outcome="ok", cold=(s, s), when=f"2026-11-21T10:00:{i:02d}Z") for i, s in speed.items()
    ]
    final = replace(record(18), outcome="ok", cold=(7e-3,), stage="final", group="g", when="2026-11-21T10:00:18Z")
    failed = replace(record(9), outcome="crash", cold=(), warm=(), when="2026-11-21T10:00:09Z")
    other = replace(record(1), when="2026-11-21T10:00:01Z")
    a.write_bytes(b"".join(line.encode(r) for r in [*trials, final, failed, other]))
    found = as_json(capsys, "merge", a, "-o", out, "--top", "2")
    assert (found["records"], found["thinned"]) == (5, 3)
    kept = log.read(out).records
    assert [r.when[17:19] for r in kept] == ["00", "01", "06", "12", "18"]
    assert call(capsys, "merge", a, "-o", tmp_path / "d.jsonl", "--top", "-1")[0] == 2
    default = stats.untuned(TASKS[0], MACHINE)
    assert default is not None and default != trials[0].point
    a.write_bytes(b"".join(line.encode(r) for r in [*trials[:4], replace(trials[4], point=default), failed]))
    assert call(capsys, "merge", a, "-o", tmp_path / "e.jsonl", "--top", "1")[0] == 0
    kept = log.read(tmp_path / "e.jsonl").records
    assert [r.when[17:19] for r in kept] == ["06", "15"], "the default, though others of its batch ended before it"


def test_best_says_what_a_compilation_here_does_not_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(LINES))
    code, out, _ = call(capsys, "best", "--logs", tmp_path)
    assert code == 0 and "6 records are not used by a compilation here: another" in " ".join(out.split())
