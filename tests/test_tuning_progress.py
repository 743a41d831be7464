"""What a tuning run shows: the numbers, the table on a terminal, plain lines elsewhere, silence, and no exception."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from gemmify.tuning.progress import LINE_SECONDS, Progress, TaskView
from gemmify.tuning.progress_state import State, span
from gemmify.tuning.progress_view import frame

VIEWS = (
    TaskView("64x56x56 -> 64 3x3 [bias]", 3, 1e-3, 4e-3, macs=10**9),
    TaskView("512 -> 1000 dense", 1, 0.5e-3, None, macs=10**6),
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(*, quiet: bool = False) -> tuple[Progress, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    return Progress(quiet, out, clock), clock, out


def test_the_network_is_the_sum_of_counts_times_the_best_and_never_above_the_default() -> None:
    state = State(0.0, VIEWS, 60.0, peak_flops=2e12)
    assert state.latency is None and "1 of 2 layers measured" in state.network()
    state.default(1, 2e-3)
    assert state.latency == state.untuned == pytest.approx(3 * 4e-3 + 2e-3)
    state.best(0, 2e-3, "winograd-4")
    state.best(1, 3e-3, "im2col")  # slower than its default: not what a compilation takes
    assert state.latency == pytest.approx(3 * 2e-3 + 2e-3)
    assert state.bound == pytest.approx(3.5e-3)
    assert state.peak_share == pytest.approx(2 * (3 * 10**9 + 10**6) / 8e-3 / 2e12)
    assert state.network() == "all layers 8 ms; untuned 14 ms, 1.75 x; 38 % of the peak; the bound is 3.5 ms"
    assert state.rows[0].to_gain == pytest.approx(3e-3)


def test_plain_lines_are_few_and_events_come_at_once() -> None:
    progress, clock, out = lines_of()
    progress.start(VIEWS, 900)
    for index in range(100):
        clock.now += 0.3
        progress.trial(index % 2, "wrong" if index % 10 == 0 else "ok", 2e-3, "im2col 8x48")
    progress.phase("finals")
    progress.stopped(0, "within 3 % of its bound")
    progress.note("a [note]")
    progress.finish("tuned")
    progress.note("late")
    found = out.getvalue().splitlines()
    assert found[0] == "tuning 4 layers (2 different), 15:00 at most"
    assert found[-4:] == ["finals", f"{VIEWS[0].title}: no more trials, within 3 % of its bound", "a [note]", "tuned"]
    states = found[1:-4]
    assert 30 / LINE_SECONDS - 1 <= len(states) <= 30 / LINE_SECONDS + 1
    assert re.match(
        r"0:2\d of 15:00 \| 1 of 2 layers measured \| \d+ trials: \d+ ok, \d+ wrong \| .*: 2 ms$", states[-1]
    )


def test_quiet_prints_nothing_and_still_counts() -> None:
    progress, _, out = lines_of(quiet=True)
    with progress:
        progress.start(VIEWS, 10)
        progress.trial(0, "crash", None, "fft 8x48")
        progress.note("note")
        progress.finish("done")
    assert out.getvalue() == "" and progress.state.outcomes == {"crash": 1}


def drawn(state: State, now: float, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(frame(state, now, height))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_table_fits_the_terminal_and_shows_most_to_gain_first() -> None:
    views = [TaskView(f"layer [{i}]", 1, 1e-4, 1e-3 * (i + 1)) for i in range(60)]
    state = State(0.0, views, 120.0)
    state.stopped(59, "converged")
    for height in (1, 5, 10, 24, 100):
        assert len(drawn(state, 30.0, 100, height)) <= height
    found = "\n".join(drawn(state, 30.0, 100, 24))
    assert "1:30 left of 2:00" in found and "layer [58]" in found and "layer [59]" not in found
    assert "and 44 layers with less to gain" in found
    narrow = drawn(state, 500.0, 40, 24)
    assert all(len(line) <= 40 for line in narrow) and "0:00 left" in narrow[0]


class Closed(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stream_that_is_gone_stops_nothing(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with Progress(stream=Closed(terminal)) as progress:
        progress.start(VIEWS, 10)
        progress.trial(0, "ok", 1e-3, "im2col")
        progress.best(0, 1e-3, "im2col")
        progress.finish("done")
    assert progress.state.trials == 1


def test_a_table_that_cannot_be_drawn_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemmify.tuning.progress_view.frame", lambda *_: 1 / 0)
    assert "cannot be drawn" in str(Progress(stream=io.StringIO())._frame())


def test_times_are_those_of_a_clock() -> None:
    assert [span(s) for s in (-3, 7.9, 900, 7200)] == ["0:00", "0:07", "15:00", "2:00:00"]


ON_TERMINAL = """
import sys, time
from gemmify.tuning.progress import Progress, TaskView
with Progress() as progress:
    progress.start([TaskView("the layer", 2, 1e-3, 4e-3)], 60)
    progress.trial(0, "ok", 2e-3, "im2col 8x48")
    progress.best(0, 2e-3, "im2col")
    progress.note("a note")
    time.sleep(1.2)
    if sys.argv[1] == "interrupt":
        raise KeyboardInterrupt
    progress.finish("the end")
"""


@pytest.mark.parametrize("how", ["finish", "interrupt"])
def test_on_a_terminal_the_table_is_drawn_and_the_cursor_comes_back(how: str) -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, how], stdin=child, stdout=child, stderr=child, env=environment
    )
    os.close(child)
    text, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([parent], [], [], 0.2)[0]:
            try:
                chunk = os.read(parent, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            text += chunk
    os.close(parent)
    assert (process.wait(10) == 0) == (how == "finish")
    shown = re.sub(rb"\x1b\[[0-9;]*m", b"", text)
    assert b"the layer" in shown and b"left of 1:00" in shown and b"2.00" in shown and b"a note" in shown
    assert text.rindex(b"\x1b[?25h") > text.rindex(b"\x1b[?25l")  # the cursor is visible again
    assert (b"the end" in shown) == (how == "finish")
