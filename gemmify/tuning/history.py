"""What earlier runs found: trials that need not be repeated, and points that are worth trying first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log2
from statistics import median

from .folder import fits, other_machine
from .point import Point
from .record import MachineId, Record, Versions
from .task import Task

MOST_SEEDS = 6
"""Points from other layers that are tried first on one task."""
SIMILAR = 3
"""How many similar layers give seeds."""
FAR = 6.0
"""Layers whose sizes differ by more doublings than this have nothing to say to one another."""


@dataclass
class History:
    """Records of this machine and these versions by task (`known`: their times count), and the points of all others
    that were measured on the same machine by other versions (`seeds`: worth a trial)."""

    known: dict[Task, list[Record]] = field(default_factory=dict)
    seeds: dict[Task, list[tuple[float, Point]]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record], machine: MachineId, versions: Versions) -> History:
        """Sort `records`; those of another machine are left out, and counted by their reason."""
        made = cls()
        for record in records:
            if (why := other_machine(record, machine)) is not None:
                made.left_out[why] = made.left_out.get(why, 0) + 1
            elif fits(record, machine, versions) is None:
                made.known.setdefault(record.task, []).append(record)
            elif record.ok and record.cold:
                made.seeds.setdefault(record.task, []).append((median(record.cold), record.point))
        return made

    def seeds_for(self, task: Task) -> list[Point]:
        """The points to try first on `task`: what other versions found for it, then what won on similar layers."""
        found = fastest_first(self.seeds.get(task, []))[:MOST_SEEDS]
        near = [(d, other) for other in self._tasks() if (d := distance(task, other)) is not None]
        # A title does not tell all of a task (its padding, say): tasks that share one are told apart by all of them.
        for _, other in sorted(near, key=lambda item: (item[0], item[1].title, repr(item[1])))[:SIMILAR]:
            found += self._best(other)[:2]
        return list(dict.fromkeys(found))[:MOST_SEEDS]

    def add(self, record: Record) -> None:
        """A record of this run."""
        self.known.setdefault(record.task, []).append(record)

    def _tasks(self) -> set[Task]:
        return self.known.keys() | self.seeds.keys()

    def _best(self, task: Task) -> list[Point]:
        times = [(median(r.cold), r.point) for r in self.known.get(task, ()) if r.ok and r.cold]
        return fastest_first(times + self.seeds.get(task, []))


def fastest_first(times: Iterable[tuple[float, Point]]) -> list[Point]:
    """The points of (seconds, point), the least time in front; equal times go by the point's text."""
    return [point for _, point in sorted(times, key=lambda item: (item[0], item[1].title))]


def distance(task: Task, other: Task) -> float | None:
    """Doublings between the sizes of two layers of one kind, or None where they are too far apart, or the same."""
    a, b = task.problem, other.problem
    if type(a) is not type(b) or a.dtype != b.dtype or task == other:
        return None
    names = [("n", "c", "m"), ("n", "c", "m", "groups", "size", "kernel", "stride")][hasattr(a, "kernel")]
    total = 0.0
    for name in names:
        left, right = _sizes(getattr(a, name)), _sizes(getattr(b, name))
        if len(left) != len(right):
            return None
        weight = 3.0 if name in ("kernel", "stride", "groups") else 1.0
        total += weight * sum(abs(log2(x / y)) for x, y in zip(left, right, strict=True)) / len(left)
    return total if total <= FAR else None


def _sizes(value: int | tuple[int, ...]) -> Sequence[int]:
    return value if isinstance(value, tuple) else (value,)
