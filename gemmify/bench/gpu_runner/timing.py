"""Contestants timed in turns: each is a CUDA graph of many calls, replayed between two events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cuda import Cuda

ROUNDS = 6
GRAPH_SECONDS = 1e-3
"""What a replay takes at least, as far as MOST_CALLS calls do: launching it then costs nothing that is seen."""
MOST_CALLS = 100
TURN_SECONDS = 0.02
"""What a contestant is replayed for in one round."""
LEAST = 3
"""Replays in a round."""


@dataclass
class Contestant:
    """`launch` puts a graph of `calls` calls on `stream`; `close` drops it."""

    launch: Callable[[], object]
    stream: int
    calls: int = 1
    close: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)


def calls_for(seconds: float) -> int:
    """How many calls of so many seconds a graph holds."""
    return max(1, min(MOST_CALLS, int(GRAPH_SECONDS / max(seconds, 1e-7)) + 1))


def in_turns(cuda: Cuda, contestants: Mapping[str, Contestant], share: float = 1.0) -> dict[str, dict[str, Any]]:
    """`{name: {median, best, low, high, runs, calls, times}}`, seconds a call; `share` shortens or lengthens it all.

    Every second round goes backwards, so that a drift of the clock falls on all alike; the first replay of a round is
    not counted.
    """
    plans = {name: _replays(cuda, c, share) for name, c in contestants.items()}
    for number in range(ROUNDS):
        for name in list(contestants) if number % 2 == 0 else reversed(list(contestants)):
            contestant = contestants[name]
            contestant.launch()
            for _ in range(plans[name]):
                took = cuda.seconds(contestant.launch, contestant.stream)
                contestant.seconds.append(took / contestant.calls)
    return {name: summary(c.seconds) | {"calls": c.calls} for name, c in contestants.items()}


def _replays(cuda: Cuda, contestant: Contestant, share: float) -> int:
    """Replays in a round, from a first one that is not counted."""
    contestant.launch()
    once = cuda.seconds(contestant.launch, contestant.stream)
    return max(LEAST, min(200, int(share * TURN_SECONDS / max(once, 1e-7))))


def median(values: Sequence[float]) -> float:
    """The middle of the values."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, least, and the tenths at both ends."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    found = {"median": median(ordered), "best": ordered[0], "low": ordered[tenth], "high": ordered[-1 - tenth]}
    return {**found, "runs": len(ordered), "times": [float(f"{t:.4g}") for t in times]}
