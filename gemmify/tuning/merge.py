"""Rewriting logs: the damage moved out of one, several put together. The new file stands beside and is renamed."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, TypeVar

from ..errors import GemmifyError
from ..export import check_destination, write_file
from .line import moment
from .locks import append, held, open_log, read_fd
from .log import Damage, damage, pieces
from .record import MachineId, Record, Versions
from .scan import Piece, scan
from .stats import untuned
from .task import Task

_T = TypeVar("_T")


@dataclass(frozen=True)
class Repaired:
    """What a repair left: the records that stayed, the damaged texts that went to `moved_to`."""

    path: Path
    records: int
    damaged: int
    moved_to: Path | None


@dataclass(frozen=True)
class Merged:
    """What a merge wrote: records, how many it dropped because they were there already and how many because they were
    not among the fastest, and the damage set aside."""

    path: Path
    records: int
    duplicates: int
    thinned: int
    damaged: list[Damage]
    moved_to: Path | None


def repair(path: str | os.PathLike[str]) -> Repaired:
    """Move what is damaged in the log `path` to `path`.damaged (added at its end), and keep every record as it stands.

    A log without damage is not touched. Writers wait meanwhile, and go on in the new file. Raises GemmifyError where a
    file cannot be written; the log is then as it was.
    """
    place = Path(os.path.realpath(path))

    def work(fd: int) -> Repaired:
        found = list(scan(read_fd(fd)))
        bad = [piece for piece in found if piece.record is None]
        if not bad:
            return Repaired(Path(path), len(found), 0, None)
        aside = _set_aside(place, bad)
        _replace(place, [_line(piece) for piece in found if piece.record is not None], fd)
        return Repaired(Path(path), len(found) - len(bad), len(bad), aside)

    return _locked(place, work)


def thinned(records: Sequence[Record], top: int) -> list[Record]:
    """The records that a compilation and the next tuning run need, in their order: of those that were measured in turns
    the latest group of each task and stage, and for each task and machine the trial of its default (the first of all
    where there is none: candidates of a batch end in any order) and its `top` fastest; slow and failed trials go."""
    trials: dict[tuple[Task, MachineId, Versions], list[Record]] = {}
    for record in records:
        if record.stage == "trial":
            trials.setdefault((record.task, record.machine, record.versions), []).append(record)
    groups: dict[tuple[Task, MachineId, Versions, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: moment(record.when)):
        if record.stage != "trial":
            groups.setdefault((record.task, record.machine, record.versions, record.stage), []).append(record)
    kept = {id(record) for group in groups.values() for record in group if record.group == group[-1].group}
    for group in trials.values():
        fast = sorted((r for r in group if r.ok and r.cold), key=lambda r: (median(r.cold), r.point.title))
        untuned_point = untuned(group[0].task, group[0].machine)
        default = [r for r in group if r.point == untuned_point] or group[:1]
        kept |= {id(record) for record in [*default, *fast[:top]]}
    return [record for record in records if id(record) in kept]


def merge(sources: Sequence[Path], output: str | os.PathLike[str], top: int | None = None) -> Merged:
    """Write every record of the log files `sources` once to `output`, in the order of their times (with `top` only
    those of `thinned`); damaged texts go to `output`.damaged. `output` may be one of the sources. Raises GemmifyError
    where a source cannot be read or a file cannot be written; `output` is then as it was."""
    place = check_destination(os.path.realpath(output))

    def work(fd: int) -> Merged:
        seen: dict[Record, Piece] = {}
        count, bad, broken = 0, list[Piece](), list[Damage]()
        for source in sources:
            same = os.path.realpath(source) == str(place)
            for piece in scan(read_fd(fd)) if same else pieces(source, broken):
                if piece.record is None:
                    broken.append(damage(source, piece))
                    bad.append(piece)
                else:
                    count += 1
                    seen.setdefault(piece.record, piece)
        unread = next((place for place in broken if place.line == 0), None)
        if unread is not None:
            raise GemmifyError(f"{unread}; a merge needs all its logs: leave this one out or make it readable")
        records = sorted(seen, key=lambda record: moment(record.when))
        unique = len(records)
        if top is not None:
            records = thinned(records, top)
        aside = _set_aside(place, bad) if bad else None
        _replace(place, [_line(seen[record]) for record in records], fd)
        return Merged(Path(output), len(records), count - unique, unique - len(records), broken, aside)

    fresh = not place.exists()
    try:
        return _locked(place, work)
    except BaseException:
        if fresh and place.exists() and place.stat().st_size == 0:
            place.unlink()  # the lock made it
        raise


def _locked(place: Path, work: Callable[[int], _T]) -> _T:
    """`work` on a descriptor of the log at `place`, with all writers kept out; GemmifyError where that cannot be."""
    try:
        with held(place) as fd:
            return work(fd)
    except OSError as err:
        raise GemmifyError(
            f"cannot rewrite the log {place}: {err.strerror or err}; free space there or take another folder"
        ) from err


def _line(piece: Piece) -> bytes:
    """A record's text as one line. Its own text, so that fields of a newer version and a missing sum stay as they are:
    no newline can stand inside a JSON text, and outside of texts any space will do."""
    return re.sub(rb"[\r\n]+", b" ", piece.text) + b"\n"


def _set_aside(place: Path, bad: Sequence[Piece]) -> Path:
    """Add damaged texts to the file beside `place`, each on lines of its own, before they leave the log."""
    aside = place.with_name(place.name + ".damaged")
    fd = open_log(aside)
    try:
        append(fd, b"".join(piece.text + b"\n" for piece in bad))
        os.fsync(fd)
    finally:
        os.close(fd)
    return aside


def _replace(place: Path, lines: Sequence[bytes], old: int) -> None:
    """Put a file of `lines` at `place`, complete or not at all, with the permissions of the descriptor `old`."""

    def write(file: IO[bytes]) -> None:
        os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(old).st_mode))
        file.writelines(lines)

    write_file(place, write)
