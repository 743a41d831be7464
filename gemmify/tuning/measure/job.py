"""What a measurer is asked and what it answers: a candidate, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lowering import Lowering, Tile

from ..point import Point
from ..record import OUTCOMES
from ..task import Task


@dataclass(frozen=True)
class Measured:
    """What became of one candidate: `outcome` is one of `record.OUTCOMES`, `why` says in words what failed.

    Times are seconds of one call of the whole layer, one entry a sample, `warm` with all operands in the caches and
    `cold` after they were flushed (see `Record`); both are empty unless the outcome is "ok". `error` is
    the largest deviation from float64 relative to the largest output, None where nothing was compared. `seconds_build`
    and `seconds_measure` are the wall time that the candidate took.
    """

    outcome: str
    why: str = ""
    warm: tuple[float, ...] = ()
    cold: tuple[float, ...] = ()
    error: float | None = None
    seconds_build: float = 0.0
    seconds_measure: float = 0.0

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"an outcome must be one of {', '.join(OUTCOMES)}, found {self.outcome!r}")

    @property
    def ok(self) -> bool:
        """Whether the numbers were right and times were taken."""
        return self.outcome == "ok"


@dataclass(frozen=True)
class Job:
    """One process's work, as it is sent there: the candidate, or where there is no `lowering` the task's arrays that
    are to be made in `folder`. `memory` is how many bytes the process may allocate on top of what it starts with."""

    task: Task
    folder: str
    memory: int
    seed: int = 0
    lowering: Lowering | None = None
    tile: Tile | None = None
    schedule: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, task: Task, point: Point, folder: str, memory: int) -> Job:
        """The job of a candidate; ValueError as `Point.configured`."""
        return cls(task, folder, memory, 0, point.configured(), point.tile, point.schedule)


@dataclass(frozen=True)
class Reply:
    """What a process answers: `what` was done ("prepared", "built", "checked", "sampled"), or "failed" with the outcome
    and the reason among `values`."""

    what: Literal["prepared", "built", "checked", "sampled", "failed"]
    values: Mapping[str, Any]


MEMORY_WORDS = ("bad_alloc", "out of memory", "cannot allocate", "can't allocate", "unable to allocate", "memoryerror")
"""What an allocation that fails leaves in an error's text, in lower case."""


def about_memory(text: str) -> bool:
    """Whether an error's text says that memory ran out."""
    return any(word in text.lower() for word in MEMORY_WORDS)
