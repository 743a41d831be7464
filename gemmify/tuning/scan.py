"""The records in the bytes of a log, and the damage between them.

1. Cut the bytes before each record's beginning, `{"when"`: it occurs nowhere else (see `line`).
2. A piece starts with its record, whatever was glued to its ends, and even where it spans several lines.
3. What is left of a piece is read line by line: a record whose keys somebody sorted starts otherwise.
4. What then is neither a record nor blank is damage.

So damage loses the records whose bytes it touched and no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from .line import decode_at
from .record import Record

_BEGINNING = re.compile(rb'\{\s*"when"\s*:')
_BLANK = " \t\r\n"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """`text` is the bytes as they stand in the file, from line `line` (the first is 1): of `record`, or of damage where
    that is None, for the reason `why`."""

    line: int
    text: bytes
    record: Record | None = None
    why: str = ""


def scan(data: bytes) -> Iterator[Piece]:
    """Every record and every damaged text of `data`, in their order. Raises nothing for any content."""
    begin = len(_BOM) if data.startswith(_BOM) else 0
    cuts = [begin, *(found.start() for found in _BEGINNING.finditer(data, begin)), len(data)]
    line = 1
    for start, end in pairwise(cuts):
        piece = data[start:end]
        yield from _pieces(piece, line)
        line += piece.count(b"\n")


def _pieces(piece: bytes, line: int) -> Iterator[Piece]:
    """The records and the damage of bytes that hold at most one record's beginning, at their start."""
    rest = piece.decode("utf-8", "surrogateescape")
    why = ""
    if rest.startswith("{"):
        try:
            record, tail = decode_at(rest)
            text = rest[: len(rest) - len(tail)] if tail else rest
            yield Piece(line, text.encode("utf-8", "surrogateescape"), record)
            line, rest = line + text.count("\n"), tail
        except ValueError as err:
            why = str(err)
    for number, text in enumerate(rest.split("\n"), line):
        if text.strip(_BLANK):
            yield _line(number, text.strip(_BLANK), why)
        why = ""


def _line(number: int, text: str, why: str) -> Piece:
    """A line that does not start as a record does; `why` is what is wrong with it where that is known already."""
    raw = text.encode("utf-8", "surrogateescape")
    if why:
        return Piece(number, raw, None, why)
    try:
        record, tail = decode_at(text)
    except ValueError as err:
        return Piece(number, raw, None, str(err))
    if tail.strip(_BLANK):
        return Piece(number, raw, None, "text follows the record")
    return Piece(number, raw, record)
