"""What the records of one task say: which point a compilation takes, and whether it is worth leaving the default.

Times measured at different moments differ by more than most points do. So the latest group decides that holds the
default and candidates measured in turns with it (stages `final` and `network`); the score of a point is the median of
its cold times there. The first point in the order of the medians wins that

    is at least 1 % faster than the default by the median, and
    whose third quartile lies below the default's first quartile (the spreads do not overlap).

Where none does, the default is kept. Where no group holds both (a tuner was interrupted before its finals, or a bound
makes another default), each point's times alone count together, and a point must be 10 % faster than the default's own,
which were taken at another moment; times inside a network do not stand beside those. Where the default has no time at
all (it failed, or was never tried) the least median wins, of the latest group with a candidate if there is one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

from .line import moment
from .point import Point
from .record import Record

LEAST_GAIN = 0.01
"""A point that was measured in turns with the default must be faster by at least this share of the default's time."""
LEAST_GAIN_APART = 0.10
"""The same where the two were measured at different moments: neighbours on the machine and its clock come and go."""


@dataclass(frozen=True)
class Sample:
    """The cold times of one point, in seconds: median and quartiles, and the records that hold them."""

    median: float
    low: float
    high: float
    records: tuple[Record, ...]

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Verdict:
    """What to compile: `point`, or None where no record has a time (then all other numbers are None too).

    `seconds` is the median of the point, `default_seconds` of the default where it was measured beside it, `ratio` how
    many times as fast as the default the point is, `spread` the larger of the two's quartile distances as a share of
    the median. `kept` says that the point is the default, because nothing beat it by more than the spread. `why` is one
    clause. `used` are the records that the verdict rests on, in a fixed order.
    """

    point: Point | None
    seconds: float | None
    default_seconds: float | None
    ratio: float | None
    spread: float | None
    why: str
    kept: bool
    used: tuple[Record, ...] = ()


def sample(records: Collection[Record]) -> Sample | None:
    """The cold times of records of one point together; None where there is none."""
    times = [seconds for record in records for seconds in record.cold]
    if not times:
        return None
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    return Sample(median(times), low, high, tuple(sorted(records, key=_order)))


def decide(records: Iterable[Record], default: Point | None) -> Verdict:
    """The verdict of `records` (of one task and one machine, each of which may be used there; those with another
    outcome than "ok" are passed over). The order of the records does not matter; equal medians go by the point's text.
    """
    usable = sorted({r for r in records if r.ok and r.cold}, key=_order)
    timed = any(record.point == default for record in usable)
    for group in _groups(usable):
        found = _samples(group)
        if set(found) - {default} and (default in found or not timed):
            return _judge(found, default, LEAST_GAIN, "")
    found = _samples([record for record in usable if record.stage != "network"] or usable)
    if not found:
        return Verdict(None, None, None, None, None, "no record has a time", False)
    return _judge(found, default, LEAST_GAIN_APART, " measured apart")


def _order(record: Record) -> tuple[float, str, str, str, str, str]:
    """A total order of the records of a task, by time, that does not depend on the order in which they were read."""
    return (
        moment(record.when),
        record.stage,
        record.group,
        record.session,
        record.point.title,
        repr((record.cold, record.warm)),
    )


def _groups(records: list[Record]) -> list[list[Record]]:
    """The groups that were measured in turns, the latest first."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.stage != "trial":
            found.setdefault((record.stage, record.group), []).append(record)
    return [found[key] for key in sorted(found, key=lambda key: (moment(found[key][-1].when), *key), reverse=True)]


def _samples(records: list[Record]) -> dict[Point, Sample]:
    """Point -> its times, the least median first."""
    by_point: dict[Point, list[Record]] = {}
    for record in records:
        by_point.setdefault(record.point, []).append(record)
    found = {point: made for point, group in by_point.items() if (made := sample(group)) is not None}
    return dict(sorted(found.items(), key=lambda item: (item[1].median, item[0].title, repr(item[0]))))


def _judge(found: Mapping[Point, Sample], default: Point | None, least: float, apart: str) -> Verdict:
    base = found.get(default) if default is not None else None
    rivals = {point: times for point, times in found.items() if point != default}
    if base is None:
        point, times = next(iter(rivals.items()))
        why = f"least of {_count(rivals)}{apart}; the default has no time"
        return Verdict(point, times.median, None, None, times.spread, why, False, _used([times]))
    for point, times in rivals.items():
        if times.median <= (1 - least) * base.median and (apart or times.high < base.low):
            ratio = base.median / times.median
            spread = max(times.spread, base.spread)
            why = f"{ratio:.2f} x the default's speed, best of {_count(found)}{apart}"
            used = _used([times, base])
            return Verdict(point, times.median, base.median, ratio, spread, why, False, used)
    assert default is not None
    why = f"nothing of {_count(found)}{apart} beat it by more than {_margin(rivals, base, least, apart)}"
    if not rivals:
        why = "nothing else has a time"
    return Verdict(default, base.median, base.median, 1.0, base.spread, why, True, _used([base, *rivals.values()]))


def _margin(rivals: Mapping[Point, Sample], base: Sample, least: float, apart: str) -> str:
    """What the best rival fell short of, in words."""
    best = next(iter(rivals.values()), base)
    return f"{100 * least:.0f} %" if apart or best.median > (1 - least) * base.median else "the spread"


def _count(found: Mapping[Point, Sample]) -> str:
    return "1 point" if len(found) == 1 else f"{len(found)} points"


def _used(samples: Iterable[Sample]) -> tuple[Record, ...]:
    return tuple(sorted((record for times in samples for record in times.records), key=_order))
