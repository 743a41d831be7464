"""How often a candidate is timed, warm and cold. Times are seconds of one call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

GIVE_UP_FACTOR = 2.5
_SHORTEST = 200e-6  # a warm sample: long against the clock and a call's overhead
_FEW = 2  # samples after which a candidate that is far too slow is given up


@dataclass(frozen=True)
class Amount:
    """At most `cold` and `warm` samples; from `least` on only while the seconds `budget` of each kind last. `drop` cold
    ones come first and do not count: after a pause threads and clocks have to get going."""

    cold: int = 10
    warm: int = 20
    least: int = 5
    cold_budget: float = 0.07
    warm_budget: float = 0.02
    drop: int = 0


TRIAL = Amount()
TURN = Amount(cold=4, warm=4, least=2, drop=1)


@dataclass(frozen=True)
class Subject:
    """What is timed: `call` runs the layer once; `cool` empties the caches and brings back all but the weights."""

    call: Callable[[], None]
    cool: Callable[[], None]


def sample(
    subject: Subject, amount: Amount, limit: float, give_up: float | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(warm, cold) times of a layer that has run before.

    Stops after two cold samples, and takes one warm one, where both are more than GIVE_UP_FACTOR times `give_up`
    seconds. No sample is begun after `limit` seconds, the first of each kind excepted.
    """
    end = time.monotonic() + limit
    for _ in range(amount.drop):
        subject.cool()
        subject.call()
    cold = _cold(subject, amount, end, give_up)
    if _hopeless(cold, give_up):
        return (_timed(subject.call, 1),), cold
    return _warm(subject, amount, end), cold


def _hopeless(cold: tuple[float, ...], give_up: float | None) -> bool:
    return give_up is not None and len(cold) >= _FEW and min(cold) > GIVE_UP_FACTOR * give_up


def _cold(subject: Subject, amount: Amount, end: float, give_up: float | None) -> tuple[float, ...]:
    times: list[float] = []
    enough = time.monotonic() + amount.cold_budget
    while len(times) < amount.cold:
        subject.cool()
        times.append(_timed(subject.call, 1))
        now = time.monotonic()
        if now > end or (now > enough and len(times) >= amount.least) or _hopeless(tuple(times), give_up):
            break
    return tuple(times)


def _warm(subject: Subject, amount: Amount, end: float) -> tuple[float, ...]:
    number = max(1, math.ceil(_SHORTEST / max(_timed(subject.call, 1), 1e-7)))
    times: list[float] = []
    enough = time.monotonic() + amount.warm_budget
    while len(times) < amount.warm:
        times.append(_timed(subject.call, number))
        now = time.monotonic()
        if now > end or (now > enough and len(times) >= amount.least):
            break
    return tuple(times)


def _timed(call: Callable[[], None], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number
