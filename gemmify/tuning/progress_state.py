"""What is known about a tuning run at a moment: layers, their best times, trials by outcome. Draws nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..durations import show_duration
from ..report import duration


@dataclass(frozen=True)
class TaskView:
    """One layer: its title, how often the network has it, seconds that no candidate can beat and of the untuned
    default (None: not known yet), and the multiply-adds of its definition (0: not told)."""

    title: str
    count: int = 1
    bound_seconds: float | None = None
    default_seconds: float | None = None
    macs: int = 0


@dataclass
class Row:
    """A layer during the run; seconds of one call."""

    view: TaskView
    default: float | None = None
    best: float | None = None
    lowering: str = ""
    trials: int = 0
    why: str = ""  # it got no more trials: the reason

    @property
    def now(self) -> float | None:
        """The time that a compilation would get now: the best found, at most the default."""
        known = [seconds for seconds in (self.best, self.default) if seconds is not None]
        return min(known, default=None)

    @property
    def to_gain(self) -> float:
        """Seconds of the network that this layer could still lose; 0 where it is not known."""
        if self.now is None:
            return 0.0
        return self.view.count * max(0.0, self.now - (self.view.bound_seconds or 0.0))

    @property
    def ratio(self) -> float | None:
        """Untuned time over the time now."""
        return self.default / self.now if self.default is not None and self.now else None


@dataclass
class State:
    """Everything the display shows. `began` is the clock's time at which the budget (seconds) began to run."""

    began: float
    views: Sequence[TaskView] = ()
    budget: float | None = None
    peak_flops: float | None = None
    phase: str = ""
    trying: str = ""
    outcomes: Counter[str] = field(default_factory=Counter)
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [Row(view, view.default_seconds) for view in self.views]

    def default(self, index: int, seconds: float) -> None:
        self.rows[index].default = seconds

    def trial(self, index: int, outcome: str, seconds: float | None, title: str) -> None:
        row = self.rows[index]
        row.trials += 1
        self.outcomes[outcome] += 1
        result = duration(seconds) if outcome == "ok" and seconds is not None else outcome
        self.trying = f"{row.view.title}: {title}: {result}"

    def best(self, index: int, seconds: float, lowering: str) -> None:
        self.rows[index].best, self.rows[index].lowering = seconds, lowering

    def stopped(self, index: int, why: str) -> None:
        self.rows[index].why = why

    @property
    def trials(self) -> int:
        return self.outcomes.total()

    @property
    def measured(self) -> list[Row]:
        """The layers that have a time."""
        return [row for row in self.rows if row.now is not None]

    @property
    def latency(self) -> float | None:
        """Seconds of all layers of the network, each as often as it has it; None while a layer has no time."""
        return _sum((row.now, row.view.count) for row in self.rows)

    @property
    def untuned(self) -> float | None:
        """The same of the defaults."""
        return _sum((row.default, row.view.count) for row in self.rows)

    @property
    def bound(self) -> float | None:
        return _sum((row.view.bound_seconds, row.view.count) for row in self.rows)

    @property
    def peak_share(self) -> float | None:
        """Operations of the network's definition a second now, over the machine's peak."""
        flops = sum(2 * row.view.macs * row.view.count for row in self.rows)
        return flops / self.latency / self.peak_flops if flops and self.latency and self.peak_flops else None

    def elapsed(self, now: float) -> float:
        return max(0.0, now - self.began)

    def opening(self) -> str:
        layers = sum(row.view.count for row in self.rows)
        limit = "" if self.budget is None else f", {span(self.budget)} at most"
        kinds = "" if layers == len(self.rows) else f" ({len(self.rows)} different)"
        return f"tuning {layers} layer{'s' * (layers != 1)}{kinds}{limit}" if self.rows else ""

    def time(self, now: float) -> str:
        """`2:10 of 15:00` or the time that passed."""
        passed = span(self.elapsed(now))
        return passed if self.budget is None else f"{passed} of {span(self.budget)}"

    def network(self) -> str:
        """The network's latency against the untuned one, with the share of the peak and of the bound."""
        if self.latency is None:
            return f"{len(self.measured)} of {len(self.rows)} layers measured"
        parts = [f"all layers {duration(self.latency)}"]
        if self.untuned is not None:
            parts.append(f"untuned {duration(self.untuned)}, {self.untuned / self.latency:.2f} x")
        if self.peak_share is not None:
            parts.append(f"{100 * self.peak_share:.0f} % of the peak")
        if self.bound:
            parts.append(f"the bound is {duration(self.bound)}")
        return "; ".join(parts)

    def counts(self) -> str:
        """`340 trials: 330 ok, 6 wrong, 4 build`."""
        kinds = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        return f"{self.trials} trial{'s' * (self.trials != 1)}" + (f": {kinds}" if kinds else "")

    def line(self, now: float) -> str:
        """The state in one line."""
        return " | ".join(part for part in (self.time(now), self.network(), self.counts(), self.trying) if part)


def _sum(parts: Iterable[tuple[float | None, int]]) -> float | None:
    total = 0.0
    known = False
    for seconds, count in parts:
        if seconds is None:
            return None
        total, known = total + seconds * count, True
    return total if known else None


def span(seconds: float) -> str:
    """Whole seconds that have passed, as a clock shows them: `0:07`, `15:00`, `2:00:00`."""
    return show_duration(int(seconds))
