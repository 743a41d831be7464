"""What a log holds: counts by outcome, machine, version and lowering, and what is best for each task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import GemmifyError
from .folder import folder_of, minor, this_machine
from .log import Loaded
from .point import Point
from .record import OUTCOMES, MachineId, Record, feature_hash
from .task import Task
from .verdict import Verdict, decide


def summary(loaded: Loaded) -> dict[str, Any]:
    """Counts over a log: files, records, damaged, tasks, first and last time, and the tables `outcomes`, `machines`,
    `versions`, `lowerings`, each a list of rows."""
    records = loaded.records
    times = sorted(r.when for r in records if r.when)
    outcomes, stages = Counter(r.outcome for r in records), Counter(r.stage for r in records)
    machines, versions = Counter(r.machine for r in records), Counter(r.versions for r in records)
    return {
        "files": len(loaded.files),
        "records": len(records),
        "damaged": len(loaded.damaged),
        "tasks": len({r.task for r in records}),
        "sessions": len({r.session for r in records if r.session}),
        "first": times[0] if times else None,
        "last": times[-1] if times else None,
        "stages": dict(sorted(stages.items())),
        "outcomes": [{"outcome": name, "records": outcomes[name]} for name in OUTCOMES if outcomes[name]],
        "machines": [{"folder": folder_of(m), **m.to_dict(), "records": n} for m, n in machines.most_common()],
        "versions": [{**v.to_dict(), "records": n} for v, n in versions.most_common()],
        "lowerings": _by_lowering(records),
    }


def _by_lowering(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each lowering's records, those that are ok, its tasks, and for how many tasks it holds the best verdict."""
    rows: dict[str, dict[str, Any]] = {}
    tasks: dict[str, set[Task]] = {}
    for record in records:
        key = record.point.lowering
        row = rows.setdefault(key, {"lowering": key, "records": 0, "ok": 0, "tasks": 0, "best": 0})
        row["records"] += 1
        row["ok"] += record.ok
        tasks.setdefault(key, set()).add(record.task)
    for key, found in tasks.items():
        rows[key]["tasks"] = len(found)
    for _, verdict in verdicts(records):
        if verdict.point is not None:
            rows.setdefault(verdict.point.lowering, {"lowering": verdict.point.lowering, "best": 0})["best"] += 1
    return sorted(rows.values(), key=lambda row: (-row["best"], -row.get("records", 0), row["lowering"]))


def verdicts(records: Iterable[Record]) -> list[tuple[Record, Verdict]]:
    """The verdict on each task, machine and versions among `records`: a record of the group, and what it says."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        v = record.versions
        groups.setdefault((record.task, record.machine, v.tvm, minor(v.gemmify), v.space), []).append(record)
    return [(group[-1], decide(group, untuned(group[0].task, group[0].machine))) for group in groups.values()]


def best(records: Iterable[Record], names: Mapping[Task, str] | None = None) -> list[dict[str, Any]]:
    """A row for each task (and machine, and versions): the point that a compilation would take, with its median times
    in seconds, and how many times as fast as the default it is where the two were measured together. With `names`
    only its tasks, called so, in its order."""
    chosen = [r for r in records if names is None or r.task in names]
    rows = []
    for record, verdict in verdicts(chosen):
        point = verdict.point
        of_point = [r for r in verdict.used if r.point == point]
        rows.append(
            {
                "task": record.task.title,
                "layer": None if names is None else names[record.task],
                "lowering": None if point is None else point.lowering,
                "point": None if point is None else point.title,
                "cold": verdict.seconds,
                "warm": _median(t for r in of_point for t in r.warm),
                "default": verdict.default_seconds,
                "ratio": verdict.ratio,
                "spread": verdict.spread,
                "why": verdict.why,
                "machine": record.machine.to_dict(),
                "versions": record.versions.to_dict(),
                "problem": record.task.to_dict(),
                "settings": None if point is None else point.to_dict(),
            }
        )
    if names is None:
        return sorted(rows, key=lambda row: (row["cold"] is None, -(row["cold"] or 0), row["task"]))
    order = {name: place for place, name in enumerate(names.values())}
    return sorted(rows, key=lambda row: order[row["layer"]])


@lru_cache(maxsize=4096)
def untuned(task: Task, machine: MachineId) -> Point | None:
    """What `compile` takes for `task` on `machine` without a log; None where that cannot be told here (a target that
    this version does not know, a problem to which no lowering applies)."""
    from schedules import machine_of

    from ..pipeline import resolve_target
    from ..policy import Policy
    from ..select import consider, pick

    try:
        made = machine_of(resolve_target(_target(machine)))
        return pick(task.title, consider(task.problem, made), made, Policy()).as_point()
    except (GemmifyError, ValueError):
        return None


@lru_cache(maxsize=64)
def _target(machine: MachineId) -> Any:
    """The target that the code of `machine` was made for, as far as the record tells."""
    if machine.target == "cuda":
        plain = {"kind": "cuda", "arch": machine.mcpu}
        archs = set(machine.mcpu.split(","))
        return plain if feature_hash(archs) == machine.features else {**plain, "tf32": True}
    if (here := this_machine()) and (here.mcpu, here.features) == (machine.mcpu, machine.features):
        return "llvm"
    named = {"kind": machine.target, "num-cores": machine.cores}
    return {**named, "mcpu": machine.mcpu} if machine.mcpu else named


def _median(times: Iterable[float]) -> float | None:
    from statistics import median

    found = list(times)
    return median(found) if found else None
