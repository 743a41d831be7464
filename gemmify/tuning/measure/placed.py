"""A candidate's library where it runs, checked and timed, on a device of a tracker or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...conformance import Expected, tolerance
from ...guarded import poison
from ..task import Task
from . import sampling
from .check import read_arrays
from .library import ENTRY, LibrarySpec

FLUSHED = 2
"""A cold sample on a GPU comes after this many times its L2 cache was written: what was in it is gone."""
_SHORTEST = 200e-6  # seconds of a warm sample


class Place(Protocol):
    """Where libraries run: TVM's device, and what its `time_evaluator` takes to empty the caches before a sample."""

    device: Any
    flush: Mapping[str, Any]

    def load(self, path: str) -> Any:
        """The module of a library of this machine."""

    def tensor(self, array: np.ndarray) -> Any:
        """A copy of `array` on the device."""


@dataclass
class _Placed:
    """A candidate on the device: its module and the arguments of its entry."""

    spec: LibrarySpec
    module: Any
    tensors: dict[str, Any]

    @property
    def arguments(self) -> list[Any]:
        return [self.tensors[name] for name in self.spec.entry]

    def run(self) -> None:
        """Transform the weight and run the layer once."""
        for call in self.spec.weights:
            self.module[call.symbol](*(self.tensors[name] for name in call.arguments))
        self.module[ENTRY](*self.arguments)

    def times(self, place: Place, number: int, repeat: int, flush: bool) -> tuple[float, ...]:
        """Seconds of a call, one entry each of `repeat` samples of `number` calls."""
        cooled = place.flush if flush else {}
        timer = self.module.time_evaluator(ENTRY, place.device, number=number, repeat=repeat, **cooled)
        return tuple(float(t) for t in timer(*self.arguments).results)


def _place(place: Place, path: str, spec: LibrarySpec, given: dict[str, Any]) -> _Placed:
    tensors = dict(given)
    for name in spec.written:
        shape, dtype = spec.tensors[name]
        tensors[name] = place.tensor(np.full(shape, poison(dtype), dtype))
    for name, (shape, source) in spec.views.items():
        tensors[name] = tensors[source]._create_view(shape)
    return _Placed(spec, place.load(path), tensors)


def _given(place: Place, want: Expected, names: set[str]) -> dict[str, Any]:
    arrays = {"data": want.data, "weight": want.weight}
    arrays |= {f"operand {i}": operand for i, operand in enumerate(want.operands)}
    return {name: place.tensor(array) for name, array in arrays.items() if name in names}


def compare(got: np.ndarray, want: Expected, task: Task, growth: float) -> tuple[float, str | None]:
    """The largest deviation of an output relative to the largest result, and what is wrong with it or None."""
    got = got.reshape(want.result.shape)
    largest = float(np.abs(want.result).max()) or 1.0
    worst = float(np.max(np.abs(got - want.result)))
    limit = tolerance(task.problem.dtype, want, growth, task.epilogue)
    if worst <= limit:  # a NaN compares as False: it must fail
        return worst / largest, None
    if not np.isfinite(worst):
        return float("inf"), f"{int((~np.isfinite(got)).sum())} of {got.size} output elements are not finite"
    return worst / largest, f"off by {worst / largest:.1e} of the largest output, {limit / largest:.1e} is allowed"


def run_trial(
    place: Place, task: Task, folder: str, path: str, spec: LibrarySpec, give_up: float | None
) -> dict[str, Any]:
    """Check a candidate and time it: outcome, why, warm, cold, error, as `Measured` has them."""
    want = read_arrays(Path(folder))
    placed = _place(place, path, spec, _given(place, want, set(spec.tensors)))
    placed.run()
    error, wrong = compare(placed.tensors[spec.output].numpy(), want, task, spec.growth)
    if wrong is not None:
        return {"outcome": "wrong", "why": wrong, "error": error}
    warm, cold = _sample(place, placed, give_up)
    return {"outcome": "ok", "warm": warm, "cold": cold, "error": error}


def _sample(place: Place, placed: _Placed, give_up: float | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(warm, cold) times, in the amounts of a trial on this machine."""
    amount = sampling.TRIAL
    first = placed.times(place, 1, 2, flush=True)
    if give_up is not None and min(first) > sampling.GIVE_UP_FACTOR * give_up:
        return placed.times(place, 1, 1, flush=False), first
    more = _fitting(amount.cold_budget, max(first), amount.least, amount.cold) - len(first)
    cold = first + placed.times(place, 1, more, flush=True)
    call = min(placed.times(place, 1, 2, flush=False))
    number = max(1, int(np.ceil(_SHORTEST / max(call, 1e-7))))
    repeat = _fitting(amount.warm_budget, number * call, amount.least, amount.warm)
    return placed.times(place, number, repeat, flush=False), cold


def _fitting(budget: float, seconds: float, least: int, most: int) -> int:
    """How many samples of `seconds` fit into `budget`, between `least` and `most`."""
    return max(least, min(most, int(budget / max(seconds, 1e-7))))


def run_finals(
    place: Place, task: Task, folder: str, libraries: Sequence[tuple[str, LibrarySpec]], rounds: int
) -> list[dict[str, Any]]:
    """All candidates in turns, `rounds` times, every second round backwards; one answer as `run_trial` gives for
    each."""
    want = read_arrays(Path(folder))
    given = _given(place, want, {name for _, spec in libraries for name in spec.tensors})
    placed: list[_Placed] = []
    answers: list[dict[str, Any]] = []
    for path, spec in libraries:
        placed.append(_place(place, path, spec, given))
        placed[-1].run()
        error, wrong = compare(placed[-1].tensors[spec.output].numpy(), want, task, spec.growth)
        answers.append(
            {"outcome": "wrong" if wrong else "ok", "why": wrong or "", "error": error, "warm": (), "cold": ()}
        )
    turn = sampling.TURN
    for number in range(rounds):
        order = range(len(placed)) if number % 2 == 0 else reversed(range(len(placed)))
        for i in (i for i in order if answers[i]["outcome"] == "ok"):
            cold = placed[i].times(place, 1, turn.cold, flush=True)
            calls = max(1, int(np.ceil(_SHORTEST / max(min(cold), 1e-7))))
            answers[i]["cold"] += cold
            answers[i]["warm"] += placed[i].times(place, calls, turn.warm, flush=False)
    return answers
