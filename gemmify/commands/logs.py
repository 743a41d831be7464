"""`gemmify logs check | stats | best | merge | import`: what the tuning logs hold, and keeping them whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import report
from ..cli_logs import DEFAULT
from ..errors import CheckError, InputError
from ..export import check_destination

if TYPE_CHECKING:
    from ..tuning.log import Damage, Loaded
    from ..tuning.record import Record
    from ..tuning.task import Task

_SHOWN = 20


def execute(action: str, **options: Any) -> dict[str, Any]:
    """Do one action with its options; the result holds "action" and what `show` prints."""
    from ..threads import import_tvm

    import_tvm(compiler=True)
    return {"action": action, **_ACTIONS[action](**options)}


def show(result: dict[str, Any]) -> None:
    _SHOW[result["action"]](result)


def check(result: dict[str, Any]) -> None:
    """CheckError where `logs check` found damage and left it there."""
    if result["action"] == "check" and (left := result["left"]):
        raise CheckError(
            f"{left} damaged {'text' if left == 1 else 'texts'} in the log; every other record was read; "
            "`gemmify logs check --repair` moves the damage to FILE.damaged"
        )


def _files(paths: Sequence[str]) -> list[Path]:
    """Every log file of `paths` once; InputError for a path that does not exist."""
    from ..tuning.log import log_files

    found: dict[Path, None] = {}
    for path in paths or (DEFAULT,):
        if not Path(path).exists():
            made = "; `gemmify tune MODEL` makes one" if not paths else ""
            raise InputError(f"there is no tuning log {path}; give a .jsonl file or a folder of them{made}")
        found.update(dict.fromkeys(log_files(path)))
    return list(found)


def _load(paths: Sequence[str]) -> Loaded:
    from ..tuning.log import Loaded, read

    whole = Loaded()
    for file in _files(paths):
        part = read(file)
        for kind in ("records", "damaged", "files"):
            getattr(whole, kind).extend(getattr(part, kind))
    return whole


def _check(paths: Sequence[str], repair: bool) -> dict[str, Any]:
    from ..tuning.log import read
    from ..tuning.merge import repair as repair_file

    rows, damaged, left = [], [], 0
    for file in _files(paths):
        found = read(file)
        row: dict[str, Any] = {"file": str(file), "records": len(found.records), "damaged": len(found.damaged)}
        readable = all(place.line for place in found.damaged)
        if found.damaged and repair and readable:
            done = repair_file(file)
            row["moved_to"] = None if done.moved_to is None else str(done.moved_to)
        else:
            left += len(found.damaged)
        rows.append(row)
        damaged += [_place(place) for place in found.damaged]
    return {"files": rows, "damaged": damaged, "repair": repair, "left": left}


def _place(place: Damage) -> dict[str, Any]:
    from ..tuning.line import short

    return {"file": str(place.path), "line": place.line, "text": short(place.text, 80), "why": place.why}


def _show_check(result: dict[str, Any]) -> None:
    places = result["damaged"]
    for place in places[:_SHOWN]:
        line = f":{place['line']}" if place["line"] else ""
        print(f"{place['file']}{line}: {place['why']}" + (f": {place['text']}" if place["text"] else ""))
    if len(places) > _SHOWN:
        print(f"and {len(places) - _SHOWN} more")
    columns: list[report.Column] = [
        ("file", "file", report.text),
        ("records", "records", report.text),
        ("damaged", "damaged", report.text),
    ]
    if any(row.get("moved_to") for row in result["files"]):
        columns.append(("moved to", "moved_to", report.text))
    report.table("", columns, result["files"])
    print(f"{sum(row['records'] for row in result['files'])} records in {len(result['files'])} files")


def _stats(paths: Sequence[str]) -> dict[str, Any]:
    from ..tuning.log import warn_damage
    from ..tuning.stats import summary

    loaded = _load(paths)
    warn_damage(loaded)
    return summary(loaded)


def _show_stats(result: dict[str, Any]) -> None:
    times = f", {result['first']} to {result['last']}" if result["first"] else ""
    damaged = f", {result['damaged']} damaged" if result["damaged"] else ""
    print(f"{result['records']} records of {result['tasks']} tasks in {result['files']} files{damaged}{times}")
    for title, names in _STATS.items():
        print()
        report.table("", [(name, name, report.text) for name in names], result[title])


_STATS = {
    "outcomes": ("outcome", "records"),
    "lowerings": ("lowering", "records", "ok", "tasks", "best"),
    "machines": ("cpu", "target", "mcpu", "cores", "threads", "records"),
    "versions": ("gemmify", "tvm", "space", "records"),
}


def _best(model: str | None, task: str | None, logs: Sequence[str] | None) -> dict[str, Any]:
    from ..tuning.log import warn_damage
    from ..tuning.stats import best

    loaded = _load(logs or ())
    warn_damage(loaded)
    names = None if model is None else _names(model)
    records = [r for r in loaded.records if task is None or task.lower() in r.task.title.lower()]
    rows = best(records, names)
    if not rows:
        asked = " and ".join(
            [f"of {model}"] * (model is not None) + [f"with {task!r} in its title"] * (task is not None)
        )
        raise InputError(
            f"no record of a task {asked or 'at all'} in the {len(loaded.records)} records of the log; see `gemmify "
            "logs stats`, or tune it: `gemmify tune MODEL`"
        )
    covered = None if names is None else {"layers": len(names), "found": len({row["layer"] for row in rows})}
    return {"model": model, "tasks": rows, "covered": covered, "unused": _unused(records)}


def _unused(records: Sequence[Record]) -> dict[str, int]:
    """How many records a compilation on this machine does not use, by reason."""
    from ..threads import default_threads
    from ..tuning.folder import fits, this_machine, this_versions

    machine, versions = this_machine("llvm", default_threads()), this_versions()
    return dict(Counter(why for record in records if (why := fits(record, machine, versions)) is not None))


def _names(model: str) -> dict[Task, str]:
    """The tasks of a network, named by their layers, in the order in which they run."""
    from schedules import Machine

    from ..pipeline import resolve_target
    from ..tuning.layers import gather, network

    machine = Machine.from_target(resolve_target("llvm"))
    uses = gather([network(model, None, machine)])
    return {use.task: use.places[0][1] + (f" x{use.count}" if use.count > 1 else "") for use in uses}


def _show_best(result: dict[str, Any]) -> None:
    rows = result["tasks"]
    columns: list[report.Column] = [("task", "task", report.text)]
    if result["model"] is not None:
        columns.insert(0, ("layer", "layer", report.text))
    columns += [
        ("best", "point", report.text),
        ("cold", "cold", _seconds),
        ("warm", "warm", _seconds),
        ("default", "default", _seconds),
        ("ratio", "ratio", lambda value: "" if value is None else report.ratio(value)),
        ("why", "why", report.text),
    ]
    for name in ("machine", "versions"):
        if len({tuple(row[name].values()) for row in rows}) > 1:
            columns.append((name, name, lambda value: " ".join(map(str, value.values()))))
    report.table("", columns, rows)
    for why, count in result["unused"].items():
        print(f"{count} records are not used by a compilation here: {why}")
    if result["covered"]:
        print(
            f"{result['covered']['found']} of {result['covered']['layers']} tasks of {result['model']} are in the log"
        )


def _seconds(value: Any) -> str:
    return "" if value is None else report.duration(value)


def _merge(paths: Sequence[str], output: str, top: int | None = None) -> dict[str, Any]:
    from ..tuning.merge import merge

    if top is not None and top < 0:
        raise InputError(f"--top keeps a number of trials a task, 0 or more, got {top}")
    files = _files(paths)
    here = check_destination(output)
    if here.exists() and here.resolve() not in {file.resolve() for file in files}:
        raise InputError(f"{output} exists and is not among the logs to merge; name it too, or take another place")
    done = merge(files, output, top)
    return {
        "output": str(done.path),
        "sources": [str(file) for file in files],
        "records": done.records,
        "duplicates": done.duplicates,
        "thinned": done.thinned,
        "damaged": [_place(place) for place in done.damaged],
        "moved_to": None if done.moved_to is None else str(done.moved_to),
    }


def _show_merge(result: dict[str, Any]) -> None:
    print(
        f"wrote {result['output']}: {result['records']} records of {len(result['sources'])} files, "
        f"{result['duplicates']} duplicates dropped"
        + (f", {result['thinned']} slower trials left out" if result["thinned"] else "")
    )
    if result["moved_to"]:
        print(f"{len(result['damaged'])} damaged texts set aside in {result['moved_to']}")


def _import(results: str, logs: str) -> dict[str, Any]:
    from ..tuning.measure.bundle import import_results

    found: dict[str, Any] = import_results(results, logs)
    return found


def _show_import(result: dict[str, Any]) -> None:
    print(result.get("said") or f"imported {result.get('records', 0)} records into {result.get('logs')}")


_ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "check": _check,
    "stats": _stats,
    "best": _best,
    "merge": _merge,
    "import": _import,
}
_SHOW: dict[str, Callable[[dict[str, Any]], None]] = {
    "check": _show_check,
    "stats": _show_stats,
    "best": _show_best,
    "merge": _show_merge,
    "import": _show_import,
}
