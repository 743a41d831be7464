"""The log of all trials: JSON lines in `tuning_logs/<folder of the target>/*.jsonl`.

`read` takes what is good from any bytes, `Writer` appends so that neither a kill nor another writer can spoil a line,
`fits` says whether a record may be used here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import GemmifyWarning
from .folder import fits, folder_of, other_machine, other_versions, this_machine, this_versions
from .line import now, short
from .locks import read_whole
from .record import Record
from .scan import Piece, scan
from .writer import Writer

__all__ = [
    "DEFAULT_FOLDER",
    "Damage",
    "Loaded",
    "Writer",
    "fits",
    "folder_of",
    "log_files",
    "now",
    "other_machine",
    "other_versions",
    "read",
    "this_machine",
    "this_versions",
    "warn_damage",
]

DEFAULT_FOLDER = "tuning_logs"
_SHOWN = 3


@dataclass(frozen=True)
class Damage:
    """A text in a log that is no record: from line `line` of `path` (0: the file as a whole could not be read).

    `text` holds the bytes as UTF-8 with surrogate escapes: `text.encode("utf-8", "surrogateescape")` gives them back.
    """

    path: Path
    line: int
    text: str
    why: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else str(self.path)
        return f"{place}: {self.why}"


@dataclass(frozen=True)
class Loaded:
    """What was read: the records in the order of the files and lines, the damage, and the files."""

    records: list[Record] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def read(path: str | os.PathLike[str]) -> Loaded:
    """All records in the file `path`, or in every *.jsonl below the folder `path`, sorted by name.

    What is missing is empty. No content raises: text that is no record, and a file that cannot be read, is `damaged`.
    """
    loaded = Loaded()
    for file in log_files(path, loaded.damaged):
        loaded.files.append(file)
        for piece in pieces(file, loaded.damaged):
            if piece.record is not None:
                loaded.records.append(piece.record)
            else:
                loaded.damaged.append(damage(file, piece))
    return loaded


def pieces(file: Path, unreadable: list[Damage]) -> Iterator[Piece]:
    """The records and the damaged texts of one file; that it cannot be read is added to `unreadable`."""
    try:
        if not file.is_file():  # a pipe would be waited for
            raise OSError("it is not a regular file")
        data = read_whole(file)
    except (OSError, MemoryError) as err:
        unreadable.append(Damage(file, 0, "", f"cannot be read: {getattr(err, 'strerror', None) or err}"))
        return
    yield from scan(data)


def damage(file: Path, piece: Piece) -> Damage:
    """A damaged piece of `file`."""
    return Damage(file, piece.line, piece.text.decode("utf-8", "surrogateescape"), piece.why)


def log_files(path: str | os.PathLike[str], unreadable: list[Damage] | None = None) -> list[Path]:
    """The log files that `path` names, sorted: itself, or every *.jsonl below it; none where nothing is there."""
    top = Path(path)
    if not top.is_dir():
        return [top] if os.path.lexists(top) else []
    found: list[Path] = []

    def closed(err: OSError) -> None:
        if unreadable is not None:
            unreadable.append(Damage(Path(err.filename or top), 0, "", f"cannot be read: {err.strerror or err}"))

    for folder, _, names in os.walk(top, onerror=closed):
        found += [Path(folder, name) for name in names if name.endswith(".jsonl")]
    return sorted(found)


def warn_damage(loaded: Loaded, records: int | None = None) -> None:
    """One GemmifyWarning for all damage of `loaded`, naming the first few places; nothing where there is none.
    `records` is how many were read, where `loaded` does not hold them."""
    if not loaded.damaged:
        return
    first = "; ".join(f"{place} ({short(place.text, 40)!r})" for place in loaded.damaged[:_SHOWN])
    count = len(loaded.damaged)
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    read_ = len(loaded.records) if records is None else records
    warnings.warn(
        f"{count} damaged {'text was' if count == 1 else 'texts were'} set aside, {read_} records of the "
        f"log were read: {first}{more}; `gemmify logs check --repair` moves the damage out of the log",
        GemmifyWarning,
        stacklevel=2,
    )
