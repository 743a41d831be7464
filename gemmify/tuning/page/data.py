"""What the report shows, worked out of the records: plain numbers and texts, no markup."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..line import moment
from ..point import Point
from ..record import MachineId, Record
from ..stats import untuned
from ..task import Task
from ..verdict import Verdict, decide


@dataclass(frozen=True)
class Trial:
    """One trial of a layer for the scatter: `number` counts from 1 in the order of time; `seconds` is the median of
    its cold times, None where it failed."""

    number: int
    lowering: str
    point: str
    outcome: str
    why: str
    seconds: float | None
    best: bool  # less than every trial before it


@dataclass(frozen=True)
class Layer:
    """A task and what was found for it. `before` and `after` are seconds of one call, the untuned default and what a
    compilation takes; None where no record has that time. `bound` are seconds that nothing beats, where it is known.
    `quick` is by lowering the least time and how many trials it got."""

    title: str
    count: int
    before: float | None
    after: float | None
    bound: float | None
    verdict: Verdict
    trials: tuple[Trial, ...]
    outcomes: Mapping[str, int]
    failures: tuple[tuple[str, str, int], ...]  # outcome, why, how often
    quick: tuple[tuple[str, float | None, int], ...]

    @property
    def complete(self) -> bool:
        """Whether it has a time before and after."""
        return self.before is not None and self.after is not None


@dataclass(frozen=True)
class Session:
    """One run of the tuner: minutes since its first trial, and seconds of all layers with the best known then.

    A layer counts with its first measured time until it was measured, so that the sum is of all layers throughout."""

    name: str
    began: str
    minutes: float
    trials: int
    steps: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class MachinePart:
    """What was measured on one machine with one number of threads."""

    machine: MachineId
    versions: Mapping[str, int]  # text -> records
    records: int
    outcomes: Mapping[str, int]
    layers: tuple[Layer, ...]
    sessions: tuple[Session, ...]
    first: str
    last: str

    def total(self, name: str) -> float | None:
        """Seconds "before", "after" or "bound" of the complete layers together; None where one has no such time."""
        seconds = [(getattr(layer, name), layer.count) for layer in self.layers if layer.complete]
        return None if not seconds or any(s is None for s, _ in seconds) else sum(s * count for s, count in seconds)


@dataclass(frozen=True)
class Page:
    """The whole report. `counted` is the model whose layers the counts are of, "" where each task counts once;
    `untouched` are titles of its layers that no record is about; `notes` are sentences for the reader."""

    machines: tuple[MachinePart, ...]
    counted: str = ""
    untouched: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def collect(
    records: Sequence[Record],
    counts: Mapping[Task, int] | None = None,
    *,
    bounds: Mapping[tuple[MachineId, Task], float] | None = None,
    counted: str = "",
    commands: Sequence[str] = (),
    sources: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Page:
    """The page of `records`: with `counts` only the tasks that it names, each as often as it says; `bounds` are the
    seconds that a layer cannot beat on a machine."""
    wanted = [r for r in records if counts is None or r.task in counts]
    by_machine: dict[MachineId, list[Record]] = defaultdict(list)
    for record in wanted:
        by_machine[record.machine].append(record)
    parts = [_part(m, found, counts or {}, bounds or {}) for m, found in by_machine.items()]
    parts.sort(key=lambda part: (-part.records, str(part.machine)))
    seen = {record.task for record in wanted}
    untouched = tuple(task.title for task in counts or () if task not in seen)
    return Page(tuple(parts), counted, untouched, tuple(commands), tuple(sources), tuple(notes))


def _part(
    machine: MachineId,
    records: list[Record],
    counts: Mapping[Task, int],
    bounds: Mapping[tuple[MachineId, Task], float],
) -> MachinePart:
    records = sorted(records, key=lambda r: moment(r.when))  # stable: equal times keep the order of the log
    by_task: dict[Task, list[Record]] = defaultdict(list)
    for record in records:
        by_task[record.task].append(record)
    layers = [_layer(t, found, counts.get(t, 1), bounds.get((machine, t))) for t, found in by_task.items()]
    layers.sort(key=lambda layer: -layer.count * (layer.after or layer.before or 0.0))
    versions = Counter(f"gemmify {r.versions.gemmify}, TVM {r.versions.tvm}, space {r.versions.space}" for r in records)
    whens = [r.when for r in records if r.when]
    return MachinePart(
        machine,
        dict(versions.most_common()),
        len(records),
        dict(Counter(r.outcome for r in records).most_common()),
        tuple(layers),
        _sessions(records, by_task, counts),
        min(whens, default=""),
        max(whens, default=""),
    )


def score(record: Record) -> float | None:
    """The median of the cold times, seconds; of the warm ones where there is no cold one; None where it failed."""
    times = record.cold or record.warm
    return median(times) if record.ok and times else None


def default_point(records: Sequence[Record]) -> Point | None:
    """The untuned default of the task that `records` are about, as `compile` picks it; where it was not measured (an
    older version picked another) the earliest trial, which a session begins with."""
    known = untuned(records[0].task, records[0].machine)
    if any(record.point == known for record in records):
        return known
    return next((record.point for record in records if record.stage == "trial"), None)


def _layer(task: Task, records: list[Record], count: int, bound: float | None) -> Layer:
    default = default_point(records)
    verdict = decide(records, default)
    own = [s for r in records if r.point == default and (s := score(r)) is not None]
    before = verdict.default_seconds if verdict.default_seconds is not None else (own[0] if own else None)
    after = before if verdict.kept and before is not None else verdict.seconds
    trials: list[Trial] = []
    least = float("inf")
    quick: dict[str, list[float | None]] = defaultdict(list)
    for record in records:
        if record.stage != "trial":
            continue
        seconds = score(record)
        best = seconds is not None and seconds < least
        least = min(least, seconds if seconds is not None else least)
        point = record.point
        number = len(trials) + 1
        trials.append(Trial(number, point.lowering, point.title, record.outcome, record.why, seconds, best))
        quick[point.lowering].append(seconds)
    failures = Counter((r.outcome, r.why) for r in records if not r.ok)
    rows = [(key, min((s for s in found if s is not None), default=None), len(found)) for key, found in quick.items()]
    rows.sort(key=lambda row: (row[1] is None, row[1] or 0.0, row[0]))
    return Layer(
        task.title,
        count,
        before,
        after,
        bound,
        verdict,
        tuple(trials),
        dict(Counter(r.outcome for r in records).most_common()),
        tuple((outcome, why, times) for (outcome, why), times in failures.most_common()),
        tuple(rows),
    )


def _sessions(
    records: Sequence[Record], by_task: Mapping[Task, Sequence[Record]], counts: Mapping[Task, int]
) -> tuple[Session, ...]:
    """The sessions in the order of their first record; each goes on from the best times of those before it."""
    best: dict[Task, float] = {}
    for task, found in by_task.items():
        first = next((s for r in found if (s := score(r)) is not None), None)
        if first is not None:
            best[task] = first
    by_session: dict[str, list[tuple[float, Record]]] = defaultdict(list)
    for record in records:
        if record.stage == "trial" and record.when:
            by_session[record.session].append((moment(record.when), record))
    sessions = []
    for name, timed in sorted(by_session.items(), key=lambda item: item[1][0][0]):
        begin = timed[0][0]
        total = sum(seconds * counts.get(task, 1) for task, seconds in best.items())
        steps = [(0.0, total)] if best else []
        for at, record in timed:
            seconds = score(record)
            if seconds is not None and seconds < best[record.task]:
                total += (seconds - best[record.task]) * counts.get(record.task, 1)
                best[record.task] = seconds
                steps.append(((at - begin) / 60, total))
        length = (timed[-1][0] - begin) / 60
        if steps:
            steps.append((length, total))
        sessions.append(Session(name, timed[0][1].when, length, len(timed), tuple(steps)))
    return tuple(sessions)
