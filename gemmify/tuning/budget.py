"""Where the next batch of trials goes: to the task that is expected to save the most time of the whole networks for a
second of tuning.

    value = count x max( recent gain a second,  HOPE x (best - bound) x t / (seconds spent + t)^2 )

The second term is what an untouched task promises: a part HOPE of the way to its bound, half of that within the first
`t` seconds (the time of PROMISE batches), and ever less as time is spent without gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FINALS_SHARE = 0.12
"""The part of the time that is kept for measuring the finalists in turns."""
MOST_RESERVE = 0.4
"""However long the finals are said to take, the search gets the rest."""
HOPE = 0.25
"""The part of the way to its bound that a task is thought to go, to begin with."""
PROMISE = 4
UNKNOWN_GAP = 0.3
"""The same where no bound is known: the part of its best time."""
WINDOW = 3
"""How many batches back the recent gain is looked for."""


@dataclass
class _Account:
    """One task: what it weighs, what was spent, and its best time after each batch."""

    count: int
    bound: float | None
    prior: float
    spent: float = 0.0
    trials: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)
    stopped: str = ""

    @property
    def gap(self) -> float:
        """Seconds of one call that may still be saved."""
        best = self.history[-1][1]
        if best == float("inf"):
            return self.prior
        return UNKNOWN_GAP * best if self.bound is None else max(0.0, best - self.bound)

    def value(self, batch: float) -> float:
        """Seconds of network time that a second of tuning is expected to save."""
        now, best = self.history[-1]
        then, before = self.history[max(0, len(self.history) - 1 - WINDOW)]
        recent = (before - best) / (now - then) if now > then and before < float("inf") else 0.0
        half = PROMISE * batch
        return self.count * max(recent, HOPE * self.gap * half / (self.spent + half) ** 2)


class Budget:
    """The time of one session, shared by its tasks.

    `counts` is how many layers each task is, `seconds` the time to spend (None: no limit but `trials`), `bounds` what
    no point of a task can beat (seconds; None where unknown), `priors` a guess of each task's time (seconds; what
    orders the first batches), `trials` the most trials a task gets in all, `finals` how many seconds the finals of one
    task take. Raises ValueError where there is neither a time nor a number of trials to stop at.
    """

    def __init__(
        self,
        counts: Sequence[int],
        seconds: float | None,
        *,
        bounds: Sequence[float | None] | None = None,
        priors: Sequence[float] | None = None,
        trials: int | None = None,
        finals: float = 0.0,
    ) -> None:
        if seconds is None and trials is None:
            raise ValueError("a budget needs seconds or trials")
        guesses = priors or [1.0] * len(counts)
        known = bounds or [None] * len(counts)
        self._tasks = [_Account(*made) for made in zip(counts, known, guesses, strict=True)]
        self.seconds, self.trials = seconds, trials
        self._finals = finals
        self._used = 0.0
        self._batches = 0
        self._batch_seconds = 0.0

    @property
    def reserve(self) -> float:
        """Seconds kept for the finals."""
        if self.seconds is None:
            return 0.0
        wanted = max(FINALS_SHARE * self.seconds, self._finals * sum(bool(t.history) for t in self._tasks))
        return min(wanted, MOST_RESERVE * self.seconds)

    @property
    def left(self) -> float:
        """Seconds left in all, the finals' included."""
        return float("inf") if self.seconds is None else max(0.0, self.seconds - self._used)

    @property
    def batch_seconds(self) -> float:
        """What a batch took so far, on average."""
        return self._batch_seconds / self._batches if self._batches else 1.0

    def next(self) -> int | None:
        """The index of the task whose turn it is, or None: the time but the reserve is spent, or all have stopped."""
        if self.left - self.reserve <= 0.0:
            return None
        open_ = [i for i, task in enumerate(self._tasks) if self.trials_left(i) != 0 and not task.stopped]
        if not open_:
            return None
        untouched = [i for i in open_ if not self._tasks[i].history]
        if untouched:
            return max(untouched, key=lambda i: (self._tasks[i].count * self._tasks[i].prior, -i))
        return max(open_, key=lambda i: (self._tasks[i].value(self.batch_seconds), -i))

    def trials_left(self, task: int) -> int | None:
        """How many trials the task may still have; None where there is no limit."""
        return None if self.trials is None else max(0, self.trials - self._tasks[task].trials)

    def spent(self, task: int | None, seconds: float, trials: int = 0) -> None:
        """Seconds of wall time that a batch of `trials` trials of `task` took, or that went elsewhere (None)."""
        self._used += seconds
        if task is None:
            return
        self._tasks[task].spent += seconds
        self._tasks[task].trials += trials
        self._batches += 1
        self._batch_seconds += seconds

    def observe(self, task: int, best: float | None) -> None:
        """The best time of a task (seconds of one call) after a batch whose time was told to `spent`; None: none
        yet."""
        account = self._tasks[task]
        account.history.append((account.spent, float("inf") if best is None else best))

    def stop(self, task: int, why: str) -> None:
        """No more batches for this task: it converged, or was given up."""
        self._tasks[task].stopped = why

    def reopen(self, task: int) -> None:
        """A task that was stopped may have batches again."""
        self._tasks[task].stopped = ""

    def stopped(self, task: int) -> str:
        """Why a task gets no more batches; nothing where it may."""
        account = self._tasks[task]
        if not account.stopped and self.trials_left(task) == 0:
            return f"{account.trials} trials"
        return account.stopped
