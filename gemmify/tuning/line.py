"""One record as one line of JSON, and back.

    {"when": "2026-11-21T10:00:00Z", "outcome": "ok", ..., "task": {...}, "point": {...}, "machine": {...},
     "versions": {...}, "sum": "1c291ca3"}

`sum` is the CRC-32 of the other fields in canonical form (keys sorted, no spaces), so that a tool may reorder or indent
a record, but no value can change unseen. A record without `sum` is taken as it stands: that is how a person edits one.
Every line starts with `when` and is plain ASCII: the bytes `{"when"` occur nowhere else, because a quote inside a text
is escaped, and so a reader finds the next record behind any damage. The texts come before the nested fields that a
record cannot be without: what is cut out between a text and the sum takes one of those along, and is noticed.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from .point import Point
from .record import OUTCOMES, STAGES, MachineId, Record, Versions
from .task import Task

_TEXTS = ("when", "stage", "why", "group", "session")
_NEEDED = ("outcome", "task", "point", "machine", "versions")
FIELDS = (
    "when",
    "outcome",
    "stage",
    "why",
    "group",
    "session",
    "cold",
    "warm",
    "error",
    "task",
    "point",
    "machine",
    "versions",
)
"""The fields of a line, `sum` apart, in the order in which they are written."""


def encode(record: Record) -> bytes:
    """The line of `record`, with its checksum and a newline at the end.

    Times are seconds of 9 significant digits. An `error` that is no finite number (a result of NaNs) is written as
    null, and half of a surrogate pair in a text as "?". Raises ValueError for a record that `decode` would refuse.
    """
    data: dict[str, Any] = {
        "when": _clean(record.when),
        "outcome": record.outcome,
        "stage": record.stage,
        "why": _clean(record.why),
        "group": _clean(record.group),
        "session": _clean(record.session),
        "cold": [_digits(t) for t in record.cold],
        "warm": [_digits(t) for t in record.warm],
        "error": None if record.error is None or not math.isfinite(record.error) else _digits(record.error),
        "task": record.task.to_dict(),
        "point": record.point.to_dict(),
        "machine": record.machine.to_dict(),
        "versions": record.versions.to_dict(),
    }
    try:
        text = json.dumps(data, allow_nan=False)
    except TypeError as err:
        raise ValueError(f"the record holds what JSON cannot: {err}") from err
    data = json.loads(text)  # a tuple of the caller's is a list from here on, as it will be when it is read
    _record(data)
    return f'{text[:-1]}, "sum": "{checksum(data)}"}}\n'.encode("ascii")


def decode(text: bytes | str) -> Record:
    """The record of a line. ValueError, and nothing else, says what is wrong with a text that is none."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    record, end = decode_at(text.lstrip("\ufeff \t\r\n"))
    if end.strip():
        raise ValueError(f"text follows the record: {short(end)}")
    return record


def decode_at(text: str) -> tuple[Record, str]:
    """The record that `text` starts with, and the rest of the text. ValueError as `decode`."""
    try:
        data, end = _DECODER.raw_decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply to be a record") from None
    except json.JSONDecodeError as err:
        raise ValueError(f"it is not JSON: {err.msg} at character {err.pos}") from err
    if not isinstance(data, dict):
        raise ValueError(f"a record is a JSON object, found {short(json.dumps(data))}")
    written = data.pop("sum", None)
    if written is None:
        _check_edited(text[:end], data)
    elif written != (found := checksum(data)):
        raise ValueError(
            f"its checksum is {found}, the line says {short(json.dumps(written))} (who edited it removes the sum)"
        )
    return _record(data), text[end:]


def checksum(data: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits over the fields of a record, whatever their order and spacing."""
    try:
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return f"{zlib.crc32(text.encode()):08x}"
    except UnicodeEncodeError:
        raise ValueError("it holds bytes that are not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply to be a record") from None


def short(text: str, most: int = 60) -> str:
    """`text` for a message: printable, at most `most` characters."""
    shown = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def now() -> str:
    """The time for a record's `when`: UTC, to the millisecond, "2026-11-21T10:00:00.123Z"."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(when: str) -> float:
    """Seconds since 1970 of a record's `when`; 0 where it has none. ValueError where it is no time."""
    if not when:
        return 0.0
    try:
        found = datetime.fromisoformat(when.replace("Z", "+00:00"))
        return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError) as err:
        raise ValueError(f"when must be an ISO 8601 time such as {now()}, found {short(when)!r}") from err


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number that a record may hold")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _check_edited(text: str, data: Mapping[str, Any]) -> None:
    """A line without a sum has only its form to be judged by: no unknown field, and none twice."""

    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                raise ValueError(f"{short(name)!r} stands twice")
            made[name] = value
        return made

    unknown = [name for name in data if name not in FIELDS]
    if unknown:
        raise ValueError(f"it has no checksum, and {short(unknown[0])!r} is no field of a record")
    json.loads(text, object_pairs_hook=once)


def _record(data: Mapping[str, Any]) -> Record:
    """The record of its fields, every one of them checked. Fields that are not known are a newer version's."""
    for name in _NEEDED:
        if name not in data:
            raise ValueError(f"a record needs {name!r}")
    outcome, stage = data["outcome"], data.get("stage", "trial")
    if outcome not in OUTCOMES:
        raise ValueError(f"an outcome must be one of {', '.join(OUTCOMES)}, found {short(json.dumps(outcome))}")
    if stage not in STAGES:
        raise ValueError(f"a stage must be one of {', '.join(STAGES)}, found {short(json.dumps(stage))}")
    texts = {name: data.get(name, "") for name in _TEXTS if name != "stage"}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text, found {short(json.dumps(value))}")
    moment(texts["when"])
    cold, warm = _times(data, "cold"), _times(data, "warm")
    if outcome == "ok" and not (cold or warm):
        raise ValueError("a record whose outcome is ok needs times")
    task, machine = _part(Task, data["task"], "task"), _part(MachineId, data["machine"], "machine")
    versions, point = _part(Versions, data["versions"], "versions"), _point(data["point"])
    error = None if data.get("error") is None else _number(data["error"], "error")
    if error is not None and error < 0:
        raise ValueError(f"an error must not be negative, found {error!r}")
    return Record(task, point, machine, versions, outcome, cold=cold, warm=warm, error=error, stage=stage, **texts)


def _times(data: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = data.get(name, [])
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of seconds, found {short(json.dumps(values))}")
    times = tuple(_number(v, f"a {name} time") for v in values)
    if times and min(times) <= 0:
        raise ValueError(f"a {name} time must be greater than 0 seconds, found {min(times)!r}")
    return times


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, found {short(json.dumps(value))}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, found {number!r}")
    return _digits(number)  # as it would be written


def _part(kind: type, data: Any, name: str) -> Any:
    """A part of a record from its JSON object. The same few occur in thousands of records, and are made once."""
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be a JSON object, found {short(json.dumps(data))}")
    return _made(kind, json.dumps(data))


@lru_cache(maxsize=4096)
def _made(kind: Any, text: str) -> Any:
    return _guarded(kind.from_dict, json.loads(text))


def _point(data: Any) -> Point:
    if not isinstance(data, dict):
        raise ValueError(f"point must be a JSON object, found {short(json.dumps(data))}")
    point = _guarded(Point.from_dict, data)
    assert isinstance(point, Point)
    return point


def _guarded(make: Any, data: Any) -> Any:
    """`make(data)`; whatever it stumbles over in data of any shape is a ValueError: a log must never stop a program."""
    try:
        made = make(data)
        hash(made)
    except ValueError:
        raise
    except Exception as err:
        raise ValueError(f"{type(err).__name__}: {short(str(err), 200)}") from err
    return made


def _digits(seconds: float) -> float:
    return float(f"{float(seconds):.9g}")


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
