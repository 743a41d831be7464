"""The tuning log: a line and back, edits by hand, damage, several writers, kills, a full disk."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning_damage import damage_at_random
from tuning_records import MACHINE, TASKS, VERSIONS, record

from gemmify.errors import GemmifyError, GemmifyWarning
from gemmify.tuning import line, log
from gemmify.tuning.merge import repair
from gemmify.tuning.point import Point, knobs
from gemmify.tuning.record import OUTCOMES, STAGES, Record, Versions
from gemmify.tuning.scan import scan
from lowering import Tile

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
TIMES = st.lists(st.floats(1e-8, 1e3).map(lambda t: float(f"{t:.9g}")), min_size=1, max_size=4).map(tuple)
VALUES = st.integers(-5, 2**40) | TEXT | st.lists(st.integers(0, 99), max_size=3).map(tuple)
KNOBS = st.dictionaries(TEXT, VALUES, max_size=3).map(knobs)
RECORDS = st.builds(
    Record,
    st.sampled_from(TASKS),
    st.builds(Point, TEXT, st.builds(Tile, st.integers(1, 32), st.integers(1, 64)), KNOBS, KNOBS),
    st.just(MACHINE),
    st.builds(Versions, TEXT, TEXT, st.integers(0, 9)),
    st.sampled_from(OUTCOMES),
    TEXT,
    TIMES,
    TIMES,
    st.none() | st.just(0.0) | st.just(1.25e-7),
    st.sampled_from(STAGES),
    TEXT,
    st.sampled_from(("", "2026-11-21T10:00:00Z", "2026-11-21T10:00:00.123456+02:00")),
    TEXT,
)


def fields(number: int = 0) -> dict[str, Any]:
    """The fields of a record's line, without its sum."""
    data: dict[str, Any] = json.loads(line.encode(record(number)))
    del data["sum"]
    return data


# A line and back.


@settings(max_examples=150, deadline=None)
@given(RECORDS)
def test_a_record_comes_back_as_it_was(made: Record) -> None:
    text = line.encode(made)
    assert line.decode(text) == made
    assert line.decode(text.decode()) == made
    assert text.isascii() and text.count(b"\n") == 1 and text.endswith(b"\n")
    assert text.startswith(b'{"when"') and text.count(b'{"when"') == 1  # what a reader finds records by


def test_the_fields_stand_in_the_documented_order() -> None:
    assert list(json.loads(line.encode(record(0)))) == [*line.FIELDS, "sum"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(JUNK, st.randoms(use_true_random=False), st.booleans())
def test_any_value_in_any_field_is_a_record_or_a_value_error(junk: Any, rng: random.Random, drop: bool) -> None:
    data = fields()
    place: Any = data
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], dict | list) and place[key]) or rng.random() < 0.3:
            break
        place = place[key]
    if drop:
        del place[key]
    else:
        place[key] = junk
    try:
        found = line.decode(json.dumps(data))
    except ValueError:
        return
    assert line.decode(line.encode(found)) == found


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_text_is_a_record_or_a_value_error(text: bytes | str) -> None:
    with pytest.raises(ValueError):
        line.decode(text)


REFUSED = {
    "a time that is negative": ({"cold": [-1e-3]}, "greater than 0"),
    "a time of zero": ({"warm": [0]}, "greater than 0"),
    "a time that is true": ({"warm": [True]}, "must be a number"),
    "a time that is a text": ({"cold": ["1 ms"]}, "must be a number"),
    "a time beyond all numbers": ({"cold": [10**400]}, "finite"),
    "times that are no list": ({"cold": 1e-3}, "list of seconds"),
    "no time at all": ({"cold": [], "warm": []}, "needs times"),
    "an unknown outcome": ({"outcome": "fine"}, "ok, wrong, crash"),
    "an outcome that is a list": ({"outcome": ["ok"]}, "ok, wrong, crash"),
    "an unknown stage": ({"stage": "last"}, "trial, final"),
    "a date in words": ({"when": "yesterday"}, "ISO 8601"),
    "a why that is a number": ({"why": 1}, "must be a text"),
    "a negative error": ({"error": -1.0}, "negative"),
    "an unknown field": ({"colour": "red"}, "'colour' is no field"),
    "a task that is a list": ({"task": []}, "task must be a JSON object"),
    "a size that is a text": ({"task": {**fields()["task"], "c": "64"}}, "whole numbers"),
    "a kernel that is too large": ({"task": {**fields()["task"], "kernel": [99, 99]}}, "does not fit"),
    "a tile of three": ({"point": {**fields()["point"], "tile": [1, 2, 3]}}, "too many values"),
    "a machine without cores": ({"machine": {**fields()["machine"], "cores": 0}}, "at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_line_may_not_hold(name: str) -> None:
    change, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        line.decode(json.dumps({**fields(), **change}))


@pytest.mark.parametrize("missing", ["outcome", "task", "point", "machine", "versions"])
def test_what_a_line_must_hold(missing: str) -> None:
    data = fields()
    del data[missing]
    with pytest.raises(ValueError, match=missing):
        line.decode(json.dumps(data))


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(word: str) -> None:
    text = json.dumps({**fields(), "cold": [0.5]})
    assert line.decode(text).cold == (0.5,)
    with pytest.raises(ValueError):
        line.decode(text.replace("[0.5]", f"[{word}]"))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"when":' * 200_000, "1" * 10_000, '{"sum": "', ""])
def test_hostile_texts(text: str) -> None:
    with pytest.raises(ValueError):
        line.decode(text)
    assert [piece.record for piece in scan(text.encode()) if piece.record] == []


def test_a_field_that_stands_twice_is_refused() -> None:
    text = json.dumps(fields())
    with pytest.raises(ValueError, match="twice"):
        line.decode('{"outcome": "crash", ' + text[1:])


@pytest.mark.parametrize("times", [(float("nan"),), (float("inf"),), (-1.0,), ()])
def test_a_record_that_could_not_be_read_back_is_not_written(times: tuple[float, ...], tmp_path: Path) -> None:
    with log.Writer(tmp_path / "a.jsonl") as writer, pytest.raises(ValueError):
        writer.append(replace(record(0), cold=times, warm=()))
    assert (tmp_path / "a.jsonl").read_bytes() == b""


def test_a_result_of_nans_and_a_text_of_no_encoding_can_be_written() -> None:
    found = line.decode(line.encode(replace(record(3), error=float("nan"), why="a\udcff")))
    assert (found.error, found.why) == (None, "a?")


# Edits by hand.


def test_a_line_without_a_sum_is_taken_and_one_with_a_wrong_sum_is_not(tmp_path: Path) -> None:
    data = json.loads(line.encode(record(0)))
    changed = {**data, "cold": [0.5]}
    with pytest.raises(ValueError, match="removes the sum"):
        line.decode(json.dumps(changed))
    del changed["sum"]
    assert line.decode(json.dumps(changed)).cold == (0.5,)
    # Written anew by a tool: other order, other spaces, one field a line, in UTF-8, with a byte order mark.
    forms = [
        json.dumps(data, sort_keys=True),
        json.dumps(data, separators=(",", ":")),
        json.dumps(data, indent=2),
        json.dumps(json.loads(line.encode(record(3))), ensure_ascii=False),
    ]
    for form in forms:
        for end in ("\n", "\r\n", ""):
            (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + (form.replace("\n", "\r\n") + end).encode())
            loaded = log.read(tmp_path)
            assert loaded.records == [record(3) if form is forms[3] else record(0)] and not loaded.damaged


def test_fields_of_a_newer_version_are_passed_over_and_kept(tmp_path: Path) -> None:
    data = {**fields(), "power": {"joule": 3}}
    text = json.dumps({**data, "sum": line.checksum(data)})
    (tmp_path / "a.jsonl").write_text(text + "\ngarbage\n")
    assert log.read(tmp_path).records == [record(0)]
    repair(tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == text + "\n"


# Reading.


def test_what_is_missing_is_empty_and_what_cannot_be_read_is_damage(tmp_path: Path) -> None:
    assert log.read(tmp_path / "none").records == []
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.jsonl").write_bytes(line.encode(record(1)))
    (tmp_path / "a.jsonl").write_bytes(line.encode(record(0)))
    (tmp_path / "a.jsonl.damaged").write_text("old damage")
    (tmp_path / "c.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d.jsonl")
    loaded = log.read(tmp_path)
    assert loaded.records == [record(0), record(1)]
    assert [(place.path.name, place.line) for place in loaded.damaged] == [("c.jsonl", 0), ("d.jsonl", 0)]


def test_damage_is_told_once_with_its_place(tmp_path: Path) -> None:
    lines = [line.encode(record(i)) for i in range(3)]
    (tmp_path / "a.jsonl").write_bytes(lines[0] + b"\x00\x00\n" + lines[1][:80] + lines[2] + b"tail\xff")
    loaded = log.read(tmp_path)
    assert loaded.records == [record(0), record(2)]
    assert [place.line for place in loaded.damaged] == [2, 3, 4]
    assert loaded.damaged[2].text.encode("utf-8", "surrogateescape") == b"tail\xff"
    with pytest.warns(GemmifyWarning) as told:
        log.warn_damage(loaded)
    assert len(told) == 1
    said = str(told[0].message)
    assert "3 damaged texts" in said and "2 records" in said and "a.jsonl:2" in said and "check --repair" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.warn_damage(log.Loaded(loaded.records))  # nothing to tell


def check_damage(rounds: int, folder: Path) -> tuple[int, int]:
    """Read `rounds` damaged logs; (records whose bytes were not touched, those that were)."""
    rng = random.Random(rounds)
    pool = [record(i) for i in range(60)]
    lines = [line.encode(each) for each in pool]
    file, untouched, hurt = folder / "a.jsonl", 0, 0
    for _ in range(rounds):
        chosen = rng.sample(range(len(pool)), rng.randint(1, 12))
        data, kept = damage_at_random(rng, [lines[i] for i in chosen])
        file.write_bytes(data)
        loaded = log.read(folder)
        found = set(loaded.records)
        missing = [chosen[i] for i in kept if pool[chosen[i]] not in found]
        assert not missing, f"{missing} dropped from {data!r}"
        assert found <= {pool[i] for i in chosen}, f"a record that nobody wrote in {data!r}"
        untouched, hurt = untouched + len(kept), hurt + len(chosen) - len(kept)
    return untouched, hurt


def test_random_damage_loses_only_the_records_that_it_touched(tmp_path: Path) -> None:
    untouched, hurt = check_damage(300, tmp_path)
    assert untouched > 300 and hurt > 300  # the damage is neither nothing nor everything


@pytest.mark.slow
def test_random_damage_of_ten_thousand_files(tmp_path: Path) -> None:
    untouched, hurt = check_damage(10_000, tmp_path)
    print(f"10,000 files: {untouched} records untouched and all read, {hurt} touched")


# Writing.


def in_child(work: Callable[[], None]) -> int:
    """The process number of a fork that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "a.jsonl"
    shared = log.Writer(file)
    shared.append(record(0))

    def work(first: int) -> Callable[[], None]:
        def write() -> None:
            with log.Writer(file) if first % 2000 else shared as writer:
                for i in range(first, first + 100):
                    writer.append(record(i))

        return write

    children = [in_child(work(first)) for first in (1000, 2000, 3000, 4000)]
    threads = [
        threading.Thread(target=lambda f=first: [shared.append(record(i)) for i in range(f, f + 50)])
        for first in (100, 200)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared.close()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0, 0]
    loaded = log.read(file)
    numbers = [0, *range(100, 150), *range(200, 250), *(i for f in (1000, 2000, 3000, 4000) for i in range(f, f + 100))]
    assert len(loaded.records) == len(numbers) and set(loaded.records) == {record(i) for i in numbers}
    assert not loaded.damaged


def kill_writers(rounds: int, folder: Path, seed: int) -> int:
    """Kill `rounds` writers at random moments; how many appends had returned, every one of which is in the log."""
    rng = random.Random(seed)
    file, returned, size = folder / "a.jsonl", set[int](), 0
    for turn in range(rounds):
        ours, theirs = os.pipe()

        def write(turn: int = turn, theirs: int = theirs) -> None:
            with log.Writer(file) as writer:
                for i in range(turn * 10_000, (turn + 1) * 10_000):
                    writer.append(record(i))
                    os.write(theirs, i.to_bytes(4, "little"))

        children = [in_child(write)]
        os.close(theirs)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
        with open(ours, "rb") as told:
            said = told.read()
        returned |= {int.from_bytes(said[i : i + 4], "little") for i in range(0, len(said) - 3, 4)}
        loaded = log.read(folder)
        found = set(loaded.records)
        assert {record(i) for i in returned} <= found
        assert len(loaded.records) == len(found) <= len(returned) + turn + 1
        assert len(loaded.damaged) <= turn + 1
        assert file.stat().st_size >= size if file.exists() else not returned
        size = file.stat().st_size if file.exists() else 0
    return len(returned)


def test_a_killed_writer_loses_no_append_that_returned(tmp_path: Path) -> None:
    assert kill_writers(8, tmp_path, 1) > 8


@pytest.mark.slow
def test_fifty_killed_writers(tmp_path: Path) -> None:
    print(f"50 kills: {kill_writers(50, tmp_path, 2)} appends had returned, all read")


def test_a_line_that_was_cut_is_ended_before_the_next(tmp_path: Path) -> None:
    text = line.encode(record(0))
    for cut in (1, 50, len(text) - 2, len(text) - 1):
        file = tmp_path / f"{cut}.jsonl"
        file.write_bytes(text[:cut])
        with log.Writer(file) as writer:
            writer.append(record(1))
        assert file.read_bytes() == text[:cut] + b"\n" + line.encode(record(1))


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    file, text = tmp_path / "a.jsonl", line.encode(record(0))

    def work() -> None:
        with log.Writer(file) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(text) + 100, resource.RLIM_INFINITY))
            writer.append(record(0))
            with pytest.raises(GemmifyError, match="free space there"):
                writer.append(record(1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert file.read_bytes() == text
            writer.append(record(2))

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 0
    assert log.read(file).records == [record(0), record(2)] and not log.read(file).damaged


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "a.jsonl"):
        with pytest.raises(GemmifyError, match="cannot open the log"):
            log.Writer(place)
    writer = log.Writer(tmp_path / "a.jsonl")
    writer.close()
    writer.close()
    with pytest.raises(GemmifyError, match="was closed"):
        writer.append(record(0))


def test_a_writer_follows_a_log_that_was_replaced_or_removed(tmp_path: Path) -> None:
    file = tmp_path / "x" / "a.jsonl"
    with log.Writer(file) as writer:
        writer.append(record(0))
        with file.open("ab") as damaged:
            damaged.write(b"garbage")
        repair(file)
        writer.append(record(1))
        assert log.read(file).records == [record(0), record(1)] and not log.read(file).damaged
        file.unlink()
        shutil.rmtree(file.parent)
        writer.append(record(2))
    assert log.read(file).records == [record(2)]


# Whose a record is.


def test_which_records_fit() -> None:
    ours = record(0)
    assert log.fits(ours, MACHINE, VERSIONS) is None
    for change, said in (
        ({"cpu": "EPYC"}, "another CPU: Xeon (family 6, model 143) instead of EPYC"),
        ({"mcpu": "znver5"}, "another target: llvm -mcpu=sapphirerapids instead of llvm -mcpu=znver5"),
        ({"features": "0"}, "other CPU features"),
        ({"threads": 4}, "2 threads instead of 4"),
    ):
        assert (log.fits(ours, replace(MACHINE, **change), VERSIONS) or "").startswith(said)
        assert log.other_versions(ours, VERSIONS) is None
    for change, said in (
        ({"tvm": "0.28.0"}, "TVM 0.27.0.post1 instead of 0.28.0"),
        ({"gemmify": "0.2.0"}, "gemmify 0.1.0 instead of 0.2.0"),
        ({"space": 2}, "another version of the space: 1 instead of 2"),
    ):
        versions = replace(VERSIONS, **change)
        assert log.fits(ours, MACHINE, versions) == said
        assert log.other_machine(ours, MACHINE) is None  # a seed
    assert log.fits(ours, MACHINE, replace(VERSIONS, gemmify="0.1.7")) is None
    assert log.fits(ours, replace(MACHINE, cores=64), VERSIONS) is None
    assert log.fits(ours, replace(MACHINE, cpu=""), VERSIONS) is None  # cross compilation


def test_this_machine_and_the_folder_of_a_target() -> None:
    here, other = log.this_machine(), log.this_machine({"kind": "llvm", "mcpu": "znver5", "num-cores": 8}, threads=3)
    assert here.cpu and here.threads == here.cores >= 1 and len(here.features) == 12
    assert (other.mcpu, other.cores, other.threads) == ("znver5", 8, 3) and other.features != here.features
    assert log.folder_of(MACHINE) == "llvm-sapphirerapids"
    assert log.folder_of(replace(MACHINE, mcpu="../../etc")) == "llvm-.._.._etc"
    assert log.folder_of(replace(MACHINE, target="", mcpu="..")) == "unknown"
