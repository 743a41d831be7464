"""The logs that a compilation looks into: the user's own first, then those that the package ships.

Nothing is read before the first layer asks, and of a folder of logs only the part for the target. A record that was
made for another machine, or by other versions, is never used: such records are counted by reason, and told once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GemmifyWarning, InputError
from .line import moment
from .record import MachineId, Record, Versions
from .task import Task

if TYPE_CHECKING:
    from lowering import Problem

    from .log import Damage
    from .point import Point

LOCAL = Path("tuning_logs")
"""Where `gemmify tune` writes, and where a compilation looks, if no other folder is given."""
SHIPPED = Path(__file__).resolve().parents[2] / "tuning_logs"
"""What the package brings: beside the packages, in a checkout as in an installed wheel."""
TOLD = 3
"""Reasons, and invalid points, that a warning names."""


@dataclass(frozen=True)
class Source:
    """The records of one place that may be used, by task, and how many may not, by reason."""

    name: str
    tasks: dict[Task, tuple[Record, ...]] = field(default_factory=dict)
    problems: dict[Problem, tuple[Task, ...]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    total: int = 0
    damaged: tuple[Damage, ...] = ()


@dataclass(frozen=True)
class Found:
    """The records of one task in one place; `exact` False where they were measured with another epilogue."""

    records: tuple[Record, ...]
    place: str
    exact: bool = True


class Tuned:
    """What the logs say for one target and number of threads."""

    def __init__(self, target: Any, threads: int, local: Sequence[Path], shipped: Path | None, given: bool) -> None:
        """`given` says that the user named `local`: what is missing there is told."""
        self._target, self._threads, self._given = target, threads, given
        self._local, self._shipped = tuple(local), shipped
        self._sources: tuple[Source, ...] | None = None
        self._invalid: dict[tuple[str, Point], str] = {}

    @property
    def sources(self) -> tuple[Source, ...]:
        """The places with records of the target, in the order in which they are asked; read at the first call."""
        if self._sources is None:
            self._sources = tuple(self._read())
        return self._sources

    def _read(self) -> Iterator[Source]:
        places = [path for path in self._local if path.exists()]
        shipped = self._shipped
        if shipped is not None and (not shipped.exists() or any(shipped.samefile(path) for path in places)):
            shipped = None
        if not places and shipped is None:
            return
        from .log import folder_of, this_machine, this_versions

        machine = this_machine(self._target, self._threads)
        versions, folder = this_versions(), folder_of(machine)
        if (own := _source(places, folder, machine, versions)) is not None:
            yield own
        elif self._given:
            there = ", ".join(map(str, places))
            _warn(f"{there} holds no log for {folder}: run `gemmify tune MODEL`, or compile with --no-logs")
        if shipped is not None and (brought := _source([shipped], folder, machine, versions)) is not None:
            yield replace(brought, name=f"{brought.name} (shipped)")

    def find(self, task: Task) -> Iterator[Found]:
        """What is known of `task`, the place to ask first in front: records of exactly this task, the user's own then
        the shipped ones, where the user's are trials only (a tuner was interrupted) and the shipped ones were measured
        in turns those first; behind them those of the same problem whose epilogue is the most like it."""
        exact = [source for source in self.sources if task in source.tasks]
        for source in sorted(exact, key=lambda source: not _in_turns(source.tasks[task])):
            yield Found(source.tasks[task], source.name)
        for source in self.sources:
            others = [other for other in source.problems.get(task.problem, ()) if other != task]
            for other in sorted(others, key=lambda other: _unlike(other, task)):
                yield Found(source.tasks[other], source.name, exact=False)

    def reject(self, layer: str, point: Point, why: str) -> None:
        """Remember that the log names a point for `layer` that cannot be compiled; `warn` tells it."""
        self._invalid.setdefault((layer, point), why)

    def unused(self) -> Counter[str]:
        """How many records of the target's logs were made for something else, by reason."""
        return sum((source.unused for source in self._sources or ()), Counter[str]())

    def warn(self) -> None:
        """Tell, in a GemmifyWarning of one line each, what of the logs is damaged, invalid, or made for another machine
        (that of shipped logs is no news: the user did not put them there)."""
        if not self._sources:
            return
        from .log import Loaded, warn_damage

        if damaged := [damage for source in self._sources for damage in source.damaged]:
            warn_damage(Loaded([], damaged), sum(source.total for source in self._sources))
        for source in self._sources:
            if source.unused and not source.name.endswith("(shipped)"):
                count, reasons = sum(source.unused.values()), _reasons(source.unused)
                _warn(f"{source.name}: {count} of {source.total} records are not used here: {reasons}")
        if self._invalid:
            named = [f"{layer}: {point.title}: {why}" for (layer, point), why in self._invalid.items()]
            more = f" and {len(named) - TOLD} more" if len(named) > TOLD else ""
            what = "1 point" if len(named) == 1 else f"{len(named)} points"
            _warn(f"the log holds {what} that cannot be compiled, passed over: {'; '.join(named[:TOLD])}{more}")


def open_logs(target: Any, threads: int, logs: Any = None) -> Tuned | None:
    """The logs for a compilation: `logs` None looks into ./tuning_logs and what is shipped, a path or several (folders
    of logs, or .jsonl files) take the place of ./tuning_logs, False (or True, for the default) is no path.

    Returns None where no log is wanted. Raises InputError for what is none of these, and for a path that is not there.
    """
    if logs is False:
        return None
    if logs is None or logs is True:
        return Tuned(target, threads, (LOCAL,), SHIPPED, given=False)
    several = [logs] if isinstance(logs, str | PathLike) else logs
    if not isinstance(several, Iterable) or not all(isinstance(path, str | PathLike) for path in several):
        raise InputError(f"logs must be a folder of logs, several, or False for none, got {logs!r}")
    paths = tuple(Path(fspath(path)) for path in several)
    for path in paths:
        if not path.exists():
            raise InputError(f"there is no log {path}; give the folder that `gemmify tune` wrote, or a .jsonl file")
    return Tuned(target, threads, paths, SHIPPED, given=True)


def _source(paths: Sequence[Path], folder: str, machine: MachineId, versions: Versions) -> Source | None:
    """The records of `paths` together; None where no file is there for the target."""
    places = [place for path in paths for place in _places(path, folder)]
    if not places:
        return None
    name = ", ".join(dict.fromkeys(str(place if place.is_dir() else place.parent) for place in places))
    return replace(_load(tuple(places), _stamp(places), machine, versions), name=name)


def _places(path: Path, folder: str) -> list[Path]:
    """Where below `path` records of a target lie: a file itself; of a folder the target's part, and loose files."""
    if not path.is_dir():
        return [path]
    own = [path / folder] if any((path / folder).rglob("*.jsonl")) else []
    return own + sorted(path.glob("*.jsonl"))


def _stamp(places: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """What changes whenever one of the files does."""
    files = [file for place in places for file in (sorted(place.rglob("*.jsonl")) if place.is_dir() else [place])]
    found = [(file.resolve(), file.stat()) for file in files if file.exists()]
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in found)


@lru_cache(maxsize=8)
def _load(places: tuple[Path, ...], stamp: Any, machine: MachineId, versions: Versions) -> Source:
    """Read and sort what fits; once for the same files, as `stamp` tells."""
    from .log import fits, read

    loaded = [read(place) for place in places]
    records = list(dict.fromkeys(record for part in loaded for record in part.records))
    why: dict[tuple[MachineId, Versions], str | None] = {}
    tasks: dict[Task, list[Record]] = {}
    unused: Counter[str] = Counter()
    for record in records:
        made = (record.machine, record.versions)
        if made not in why:
            why[made] = fits(record, machine, versions)
        if (reason := why[made]) is not None:
            unused[reason] += 1
        else:
            tasks.setdefault(record.task, []).append(record)
    settled = {task: _of_one_cpu(of_task) for task, of_task in tasks.items()}
    problems: dict[Problem, tuple[Task, ...]] = {}
    for task in tasks:
        problems[task.problem] = (*problems.get(task.problem, ()), task)
    damaged = tuple(damage for part in loaded for damage in part.damaged)
    return Source("", settled, problems, unused, len(records), damaged)


def _of_one_cpu(records: list[Record]) -> tuple[Record, ...]:
    """The records of the CPU model that was measured last: where the CPU that will run the code is not known (cross
    compilation) those of several fit, and their times say nothing of one another."""
    if len({record.machine for record in records}) == 1:
        return tuple(records)
    last = max(records, key=lambda record: (moment(record.when), record.machine.cpu))
    return tuple(record for record in records if record.machine.cpu == last.machine.cpu)


def _in_turns(records: Iterable[Record]) -> bool:
    """Whether some of the records were measured in turns with the default."""
    return any(record.ok and record.cold and record.stage != "trial" for record in records)


def _unlike(other: Task, task: Task) -> tuple[int, str]:
    """How many operations two epilogues do not share; the text settles ties."""
    differ = Counter(op.kind for op in other.epilogue)
    differ.subtract(op.kind for op in task.epilogue)
    return sum(map(abs, differ.values())), repr(other.epilogue)


def _reasons(unused: Counter[str]) -> str:
    said = [f"{count} for {reason}" for reason, count in sorted(unused.items(), key=lambda item: (-item[1], item[0]))]
    return "; ".join(said[:TOLD]) + (f"; and {len(said) - TOLD} more reasons" if len(said) > TOLD else "")


def _warn(text: str) -> None:
    warnings.warn(text, GemmifyWarning, stacklevel=3)
