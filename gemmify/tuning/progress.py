"""What a tuning run shows while it works: a live table on a terminal, plain lines elsewhere, nothing when quiet.

    with Progress() as progress:
        progress.start([TaskView("64x56x56 -> 64 3x3", count=3, bound_seconds=0.2e-3)], budget_seconds=900)
        progress.trial(0, "ok", 0.4e-3, "pointwise 8x48")
        progress.best(0, 0.4e-3, "pointwise")
        progress.finish("1 layer, 1 trial")

All goes to the standard error: the standard output is for the result. A picture that cannot be drawn (a closed stream,
a terminal of no height) is no reason to stop a tuning run: it is given up, and the run goes on without it.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from .progress_state import State, TaskView

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Progress", "TaskView"]

LINE_SECONDS = 5.0
"""Between two plain lines of the state; events (a phase, a note, a layer that stopped) are written at once."""
FRAMES_PER_SECOND = 2


class Progress:
    """The display of one tuning run; a context manager that gives the terminal back whatever ends the block.

    `quiet` prints nothing at all. `stream` (default: the standard error) decides: a terminal gets the table, anything
    else plain lines. `clock` gives seconds that never go back.
    """

    def __init__(
        self, quiet: bool = False, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quiet, self._stream, self._clock = quiet, stream, clock
        self._lock = threading.RLock()
        self._live: Any = None
        self._last_line = float("-inf")
        self._finished = False
        self.state = State(began=clock())

    def start(
        self,
        tasks: Sequence[TaskView],
        budget_seconds: float | None = None,
        peak_flops: float | None = None,
        began: float | None = None,
    ) -> None:
        """Begin: the layers that are tuned, seconds that may be spent (None: no end by time), and the multiply-add
        peak of the machine in operations a second, for the share of it that the network reaches. `began` is the
        clock's time from which the budget counts, where that was before this call."""
        with self._lock:
            self.state = State(self._clock() if began is None else began, tuple(tasks), budget_seconds, peak_flops)
        self._open()
        self._event(self.state.opening())

    def default(self, index: int, seconds: float) -> None:
        """The time of layer `index` as it is compiled untuned, in seconds of one call."""
        with self._lock:
            self.state.default(index, seconds)

    def trial(self, index: int, outcome: str, seconds: float | None, title: str) -> None:
        """One trial of layer `index` ended: its outcome (`record.OUTCOMES`), seconds of one call, what was tried."""
        with self._lock:
            self.state.trial(index, outcome, seconds, title)
        self._line()

    def best(self, index: int, seconds: float, lowering: str) -> None:
        """The best of layer `index` from now on."""
        with self._lock:
            self.state.best(index, seconds, lowering)

    def stopped(self, index: int, why: str) -> None:
        """Layer `index` gets no more trials."""
        with self._lock:
            self.state.stopped(index, why)
            title = self.state.rows[index].view.title
        self._event(f"{title}: no more trials, {why}", live=False)

    def phase(self, text: str) -> None:
        """What the run does from now on: "measuring the defaults", "finals"."""
        with self._lock:
            self.state.phase = text
        self._event(text, live=False)

    def note(self, text: str) -> None:
        """Something the user should read: it stays on the screen above the table."""
        self._event(text)

    def finish(self, summary: str) -> None:
        """Take the table away and write `summary` in its place. What comes after it is not shown."""
        self._close()
        if not self._finished:
            self._event(summary)
        self._finished = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def _to(self) -> IO[str] | None:
        return self._stream if self._stream is not None else sys.stderr

    def _open(self) -> None:
        """The live table, where the stream is a terminal that can move its cursor."""
        if self._quiet or self._live is not None or self._to is None:
            return
        with self._forgiving():
            if not self._to.isatty():
                return
            from rich.console import Console
            from rich.live import Live

            class Terminal(Console):
                def on_broken_pipe(self) -> None:
                    self.quiet = True  # rich would end the process

            console = Terminal(file=self._to)
            if console.is_dumb_terminal:
                return
            live = Live(
                get_renderable=self._frame,
                console=console,
                refresh_per_second=FRAMES_PER_SECOND,
                transient=True,
                redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
            )
            live.start()
            self._live = live
            atexit.register(self._close)  # the cursor comes back even where nobody closes us

    def _frame(self) -> Any:
        """What the table shows now; called by a thread of rich's, which an exception would end."""
        try:
            from .progress_view import frame

            with self._lock:
                size = self._live.console.size if self._live is not None else None
                return frame(self.state, self._clock(), size.height if size else 24)
        except Exception as error:
            return f"the table cannot be drawn ({type(error).__name__}); the tuning goes on"

    def _close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            atexit.unregister(self._close)
            with self._forgiving():
                live.stop()

    def _line(self) -> None:
        """A line of the state, at most one every `LINE_SECONDS`; the table needs none."""
        now = self._clock()
        if self._live is None and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            with self._lock:
                text = self.state.line(now)
            self._event(text)

    def _event(self, text: str, live: bool = True) -> None:
        """Write `text`; with `live` False only where there is no table, which shows the same."""
        if self._quiet or self._finished or not text or (self._live is not None and not live):
            return
        with self._forgiving():
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False)
            elif self._to is not None:
                print(text, file=self._to, flush=True)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """A stream that cannot be written to any more (a closed pipe, a full disk) makes the rest of the run quiet."""
        try:
            yield
        except Exception:
            self._quiet = True
