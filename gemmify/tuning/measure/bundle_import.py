"""Results that a bundle's runner brought back, into the log."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import GemmifyWarning, InputError
from ..folder import folder_of
from ..line import decode, encode
from ..log import Writer, read
from ..point import Point
from ..record import MachineId, Record, Versions
from ..task import Task
from .runner.results import RESULTS_FORMAT, sealed

_SHOWN = 3


def import_results(results: str | os.PathLike[str], logs: str | os.PathLike[str] = "tuning_logs") -> dict[str, Any]:
    """Add what a bundle's runner measured to the log; `{"records", "known", "damaged", "logs", "said"}`.

    Results that the log holds already are not added again, so that a file may be imported while it still grows. A
    damaged line is left out with a warning. Raises InputError for a file that no runner of a known format wrote, and
    GemmifyError where the log cannot be written.
    """
    place = Path(results)
    found, damaged = _read_results(place)
    if damaged:
        warnings.warn(
            f"{len(damaged)} damaged lines of {place} were left out: {'; '.join(damaged[:_SHOWN])}",
            GemmifyWarning,
            stacklevel=2,
        )
    added, known, files = 0, 0, set()
    by_file: dict[Path, list[Record]] = {}
    for bundle, record in found:
        by_file.setdefault(Path(logs, folder_of(record.machine), f"bundle-{bundle}.jsonl"), []).append(record)
    for file, records in by_file.items():
        have = {_key(record) for record in read(file).records}
        fresh = [record for record in records if _key(record) not in have]
        known += len(records) - len(fresh)
        added += len(fresh)
        files.add(str(file))
        if fresh:
            with Writer(file) as writer:
                for record in fresh:
                    writer.append(record)
    said = f"{added} records added to {', '.join(sorted(files))}"
    said += f", {known} were there already" if known else ""
    said += f", {len(damaged)} damaged lines left out" if damaged else ""
    return {"records": added, "known": known, "damaged": damaged, "logs": sorted(files), "said": said}


def _key(record: Record) -> tuple[Any, ...]:
    return record.task, record.point, record.stage, record.group, record.when, record.machine


def _read_results(place: Path) -> tuple[list[tuple[str, Record]], list[str]]:
    """(bundle, record) of each good line, and what is wrong with the others."""
    try:
        lines = place.read_bytes().split(b"\n")
    except OSError as err:
        said = err.strerror or err
        raise InputError(f"cannot read {place}: {said}; give the results.jsonl that run.py of a bundle wrote") from err
    found, damaged = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError:
            damaged.append(f"line {number} is no JSON")
            continue
        if not isinstance(data, dict) or data.get("format") != RESULTS_FORMAT:
            says = data.get("format") if isinstance(data, dict) else None
            raise InputError(
                f"{place}, line {number}: expected results of the format {RESULTS_FORMAT}, found "
                f"{'none' if says is None else repr(says)}; give the results.jsonl that run.py of a bundle wrote"
            )
        try:
            if sealed(data) != data.get("sum"):
                raise ValueError("the checksum does not agree")
            found.append(_record(data))
        except (ValueError, TypeError, AttributeError) as err:
            damaged.append(f"line {number}: {err}")
    if not found and not damaged:
        raise InputError(f"{place} holds no results; run run.py of the bundle first")
    if not found:
        raise InputError(f"{place} holds no result that can be used: {'; '.join(damaged[:_SHOWN])}")
    return found, damaged


def _record(data: Mapping[str, Any]) -> tuple[str, Record]:
    """The record of one result; ValueError or TypeError where it is none."""
    bundle = data.get("bundle")
    parts = {name: data.get(name) for name in ("task", "point", "machine", "versions")}
    if not isinstance(bundle, str) or not bundle.isalnum() or not all(isinstance(p, dict) for p in parts.values()):
        raise ValueError("the bundle, task, point, machine or versions are missing")
    task, point = Task.from_dict(parts["task"] or {}), Point.from_dict(parts["point"] or {})
    machine, versions = MachineId.from_dict(parts["machine"] or {}), Versions.from_dict(parts["versions"] or {})
    error = data.get("error")
    record = Record(
        task,
        point,
        machine,
        versions,
        str(data.get("outcome")),
        str(data.get("why", "")),
        tuple(float(t) for t in data.get("warm", ())),
        tuple(float(t) for t in data.get("cold", ())),
        None if error is None else float(error),
        str(data.get("stage")),
        str(data.get("group", "")),
        str(data.get("when", "")),
        f"bundle-{bundle}",
    )
    decode(encode(record))  # what the log would refuse is damage here
    return bundle, record
