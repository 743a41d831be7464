"""`gemmify report`: what the page shows, that it loads nothing from elsewhere, and that no text of a log is markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gemmify.cli import main
from gemmify.tuning.line import encode
from gemmify.tuning.page import collect, page
from gemmify.tuning.page.charts import latency, log_ticks, short, thin, ticks
from gemmify.tuning.page.data import Trial
from gemmify.tuning.page.html import POINTS
from gemmify.tuning.point import Point, knobs
from gemmify.tuning.record import MachineId, Record, Versions
from gemmify.tuning.stats import untuned
from gemmify.tuning.task import Task
from lowering import Tile, conv2d
from lowering.epilogue import EpilogueOp

HERE = MachineId("llvm", "sapphirerapids", "0123456789ab", "A <b>CPU</b> & co", 2, 2)
VERSIONS = Versions("0.1.0", "0.27.0")
EVIL = "<script>alert('x')</script>\"&\x00\n</title>"


def task(index: int = 0) -> Task:
    return Task(conv2d(16, 14 + index, 14, 32, 3), (EpilogueOp("bias", 0), EpilogueOp("relu")))


def point(row_block: int = 0, lowering: str = "implicit-gemm") -> Point:
    return Point(lowering, Tile(8, 32), (), knobs({"row_block": row_block}) if row_block else ())


def record(which: Task, chosen: Point, seconds: float | None, second: float = 0.0, **fields: object) -> Record:
    minute, rest = divmod(second, 60)
    fields.setdefault("when", f"2026-11-21T10:{int(minute):02d}:{rest:06.3f}Z")
    times = () if seconds is None else (seconds, seconds * 1.01, seconds * 0.99)
    outcome = "ok" if seconds is not None else "crash"
    return Record(which, chosen, HERE, VERSIONS, outcome=outcome, cold=times, **{"session": "one", **fields})  # type: ignore[arg-type]


def tuned() -> list[Record]:
    """Two layers: one that gained, measured again in turns, and one whose candidates were slower."""
    a, b = task(0), task(1)
    found = [record(a, point(), 2e-3, 0), record(a, point(4), 1e-3, 6), record(a, point(8), None, 12, why=EVIL)]
    found += [record(b, point(), 4e-3, 30), record(b, point(4), 5e-3, 60)]
    found += [record(a, p, s, 90, stage="final", group="g") for p, s in ((point(), 2.2e-3), (point(4), 1.1e-3))]
    return found


class Checker(HTMLParser):
    """Every element that is opened is closed in its order; keeps what is loaded from elsewhere, and all identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert tag in ("path", "circle", "rect") and self.open.pop() == tag, f"{tag} is closed at once"

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"{tag} is closed out of order"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(link.startswith("#") and link[1:] in checker.ids for link in checker.links)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", html)
    return checker


def test_before_and_after_come_from_the_finals_and_a_slower_candidate_is_not_taken() -> None:
    counts = {task(0): 3, task(1): 1}
    (part,) = collect(tuned(), counts).machines
    layers = {layer.title: layer for layer in part.layers}
    gained, kept = layers[task(0).title], layers[task(1).title]
    assert (gained.count, gained.before, gained.after) == (3, 2.2e-3, 1.1e-3)
    assert gained.verdict.point == point(4)
    assert (kept.before, kept.after) == (4e-3, 4e-3)
    assert part.total("before") == pytest.approx(3 * 2.2e-3 + 4e-3)
    assert part.total("after") == pytest.approx(3 * 1.1e-3 + 4e-3)
    assert [t.best for t in gained.trials] == [True, True, False]  # finals are no trials
    assert gained.failures == (("crash", EVIL, 1),)


def test_before_is_the_time_of_the_default_whatever_trial_ended_first() -> None:
    """Candidates of a batch are built side by side: the default need not be the first in the log."""
    default = untuned(task(0), HERE)
    assert default is not None and default != point(4)
    ended = [record(task(0), point(4), 3e-3, 0), record(task(0), point(8), None, 1), record(task(0), default, 2e-3, 2)]
    (layer,) = collect(ended).machines[0].layers
    assert layer.before == layer.after == 2e-3 and layer.verdict.kept


def test_a_session_is_a_staircase_of_the_whole_network_and_the_next_goes_on_from_it() -> None:
    second = [
        record(task(1), point(16), 1e-3, 300, session="two"),
        record(task(1), point(17), 3e-3, 306, session="two"),
    ]
    first, then = collect([*second, *tuned()], {task(0): 2, task(1): 1}).machines[0].sessions
    assert first.steps[0] == (0.0, pytest.approx(8e-3))  # both layers with their first times
    assert first.steps[1] == (pytest.approx(0.1), pytest.approx(6e-3))
    assert first.trials == 5 and first.minutes == pytest.approx(1.0)
    # a: 1 ms twice; b: 4 ms, then 1 ms at once; 3 ms after that is no better
    assert [seconds for _, seconds in then.steps] == pytest.approx([6e-3, 3e-3, 3e-3])
    assert [minutes for minutes, _ in then.steps] == pytest.approx([0, 0, 0.1])


def test_machines_are_apart_and_layers_of_the_model_without_a_record_are_named() -> None:
    other = MachineId("llvm", "znver4", "ffff", "Another CPU", 8, 8)
    foreign = [Record(r.task, r.point, other, r.versions, cold=r.cold, when=r.when) for r in tuned()[:2]]
    data = collect([*tuned(), *foreign], {task(0): 1, task(1): 1, task(2): 5}, counted="net")
    assert [p.machine for p in data.machines] == [HERE, other]
    assert data.untouched == (task(2).title,)
    html = page(data)
    assert "Another CPU, 8 of 8 cores" in html and "No record is about 1 of its layers" in html


def test_the_page_is_whole_and_nothing_of_a_log_is_markup() -> None:
    evil = [record(task(3), Point(EVIL, Tile(8, 32)), 1e-3, session=EVIL)]
    html = page(collect([*tuned(), *evil], counted=EVIL, commands=[EVIL], sources=[EVIL], notes=[EVIL]))
    checker = checked(html)
    assert checker.scripts == 1  # ours
    assert "<script>alert" not in html and "<b>CPU" not in html
    assert "A <b>CPU</b> & co" in "".join(checker.text)


def test_the_page_tells_its_numbers_to_those_who_see_no_drawing() -> None:
    html = page(collect(tuned(), bounds={(HERE, task(0)): 0.55e-3}))
    assert 'role="img" tabindex="0" aria-label="Latency of all layers' in html
    assert f'aria-label="Trials of {task(0).title.replace(">", "&gt;")}: 3, 1 failed; best 1 ms"' in html
    assert "2.00 x" in html and "50 %" in html and "2: implicit-gemm 8x32 row_block=4: 1 ms" in html
    assert html.count("<caption") >= 4 and 'lang="en"' in html and 'name="viewport"' in html


def test_twenty_thousand_trials_fit_into_two_megabytes_and_the_page_says_what_it_left_out() -> None:
    found = []
    for index in range(20_000):
        which, number = index % 60, index // 60
        bad = index % 17 == 0
        why = f"the kernel died {index} " + "x" * 500 if bad else ""
        seconds = None if bad else (1 + which) * 1e-4 * (1 + (index * 7919 % 101) / 100)
        found.append(record(task(which), point(number + 1), seconds, index * 0.04, why=why))
    html = page(collect(found))
    checked(html)
    assert len(html.encode()) < 2_000_000
    assert "trials are drawn" in html and "more reasons" in html
    assert html.count("<title>") < 1.5 * POINTS


def test_thinning_keeps_every_new_best_and_the_share_of_failures() -> None:
    trials = [
        Trial(i, "a", "p", "crash" if i % 5 == 0 else "ok", "", None if i % 5 == 0 else 1.0, i % 100 == 1)
        for i in range(1, 2001)
    ]
    kept = thin(trials, 200)
    assert len(kept) <= 200 and [t.number for t in kept] == sorted({t.number for t in kept})
    assert {t.number for t in trials if t.best} <= {t.number for t in kept}
    assert sum(t.outcome == "crash" for t in kept) == pytest.approx(40, abs=10)
    assert thin(trials[:50], 200) == trials[:50]
    falling = [Trial(i, "a", "p", "ok", "", 1 / i, True) for i in range(1, 1001)]
    assert len(thin(falling, 100)) <= 100 and thin(falling, 100)[-1] == falling[-1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1e-6, 3e-6), (0.5, 700), (2, 2)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 12 and all(low - 1e-12 <= t <= high * (1 + 1e-9) for t in found)


def test_a_logarithmic_axis_has_marks_even_within_one_step() -> None:
    assert log_ticks(1e-3, 1e-1) == pytest.approx([1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1])
    assert len(log_ticks(1.21e-3, 1.29e-3)) >= 2


def test_records_without_times_or_dates_make_a_page_without_curves() -> None:
    failed = [record(task(0), point(), None, why="no memory", when="")]
    data = collect(failed)
    assert latency(data.machines[0].sessions, None, None) == ""
    html = page(data)
    checked(html)
    assert "no memory" in html and "Layers without a time before or after, in no sum: 1." in html
    assert short("a\n b" + "c" * 300) == "a b" + "c" * 236 + "…"


def write_log(folder: Path, records: list[Record]) -> Path:
    folder.mkdir()
    (folder / "net.jsonl").write_bytes(b"".join(encode(r) for r in records))
    return folder


def test_the_command_writes_one_file_and_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = write_log(tmp_path / "logs", tuned())
    out = tmp_path / "r.html"
    assert main(["report", str(logs), "-o", str(out), "--no-bounds"]) == 0
    said = capsys.readouterr().out
    assert "2 different layers, untuned 6.2 ms, tuned 5.1 ms, 1.22 x" in said and "7 records" in said
    html = out.read_text()
    checked(html)
    assert "gemmify tune net --target &#x27;llvm -mcpu=sapphirerapids&#x27; --threads 2" in html
    again = tmp_path / "again.html"
    assert main(["report", str(logs), str(logs / "net.jsonl"), "-o", str(again), "--no-bounds"]) == 0
    assert "7 records" in capsys.readouterr().out  # a record that is read twice counts once


def test_a_damaged_line_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = write_log(tmp_path / "logs", tuned())
    with (logs / "net.jsonl").open("ab") as file:
        file.write(b'{"task": nothing\n')
    out = tmp_path / "r.html"
    with pytest.warns(UserWarning, match="damaged"):
        assert main(["report", str(logs), "-o", str(out), "--no-bounds"]) == 0
    assert "1 damaged text" in out.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "there is no nowhere"),
        (["empty"], "holds no record; run `gemmify tune MODEL` first"),
        (["logs", "--model", "squeezenet"], "none of the 7 records is about a layer of squeezenet"),
        (["logs", "--shape", "data=1,3,8,8"], "name the model or leave it out"),
        (["logs", "-o", "missing/r.html"], "missing"),
    ],
)
def test_what_cannot_be_reported_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_log(tmp_path / "logs", tuned())
    assert main(["report", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))
