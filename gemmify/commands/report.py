"""`gemmify report [LOG...]`: one offline HTML page of what tuning found, made from the log."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..export import check_destination, write_text
from ..report import duration, ratio

if TYPE_CHECKING:
    from ..tuning.record import MachineId, Record
    from ..tuning.task import Task

DEFAULT_OUTPUT = "report.html"


def execute(
    logs: Sequence[str] = (),
    model: str | None = None,
    output: str | None = None,
    *,
    shapes: dict[str, tuple[int, ...]] | None = None,
    limits: bool = True,
) -> dict[str, Any]:
    """Write the page of the records in `logs` (folders or files; default: ./tuning_logs) to `output`.

    With `model` only its layers, each as often as it has them. `limits`: measure this machine's peak and bandwidth for
    the bounds, where the log was made on one like it. Returns `{"output", "bytes", "records", "damaged", "machines":
    [{"machine", "layers", "untuned", "tuned", "bound" (seconds)}]}`. Raises InputError where a log is missing, holds no
    record (of the model), or the page cannot be written.
    """
    place = check_destination(output or DEFAULT_OUTPUT)
    from ..threads import import_tvm

    import_tvm(compiler=True)
    from ..tuning import log
    from ..tuning.page import collect, page

    paths = [Path(name) for name in logs] or [Path(log.DEFAULT_FOLDER)]
    records, damaged, files = _records(paths)
    name, counts = _counts(model, shapes)
    found = [r for r in records if counts is None or r.task in counts]
    if not found:
        raise InputError(f"none of the {len(records)} records is about a layer of {name}; run: gemmify tune {model}")
    bounds, notes = _bounds(found) if limits else ({}, ["Bounds were not asked for."])
    if damaged:
        notes.append(f"{damaged} damaged texts in the log were left out; `gemmify logs check` names them.")
    data = collect(
        found,
        counts,
        bounds=bounds,
        counted=name,
        commands=_commands(found, model, files),
        sources=[os.fspath(file) for file in files],
        notes=notes,
    )
    text = page(data)
    write_text(place, text)
    machines = [
        {
            "machine": part.machine.to_dict(),
            "layers": len(part.layers),
            "untuned": part.total("before"),
            "tuned": part.total("after"),
            "bound": part.total("bound"),
        }
        for part in data.machines
    ]
    size = len(text.encode())
    return {"output": str(place), "bytes": size, "records": len(found), "damaged": damaged, "machines": machines}


def _records(paths: Sequence[Path]) -> tuple[list[Record], int, list[Path]]:
    """(records without repetition, damaged texts, files) of all paths; InputError where there is no record."""
    from ..tuning import log

    records: dict[Record, None] = {}
    damaged, files = 0, []
    for path in paths:
        if not path.exists():
            hint = "run `gemmify tune MODEL` first, or name the folder or file of a log"
            raise InputError(f"a report needs a tuning log, and there is no {path}; {hint}")
        loaded = log.read(path)
        log.warn_damage(loaded)
        records.update(dict.fromkeys(loaded.records))
        damaged += len(loaded.damaged)
        files += [file for file in loaded.files if file not in files]
    if not records:
        what = f"{damaged} damaged texts and no record" if damaged else "no record"
        raise InputError(
            f"a report needs at least one record, and {', '.join(map(str, paths))} holds {what}; "
            "run `gemmify tune MODEL` first, or name another folder or .jsonl file"
        )
    return list(records), damaged, files


def _counts(model: str | None, shapes: Mapping[str, Sequence[int]] | None) -> tuple[str, dict[Task, int] | None]:
    """(name, how often each task occurs) of `model`; ("", None) without one."""
    if model is None:
        if shapes:
            raise InputError("--shape fixes an input of --model; name the model or leave it out")
        return "", None
    from schedules import Machine, host_target

    from ..tuning.layers import gather, network

    net = network(model, shapes, Machine.from_target(host_target()))
    return net.name, {use.task: use.count for use in gather([net])}


def _bounds(records: Sequence[Record]) -> tuple[dict[tuple[MachineId, Task], float], list[str]]:
    """Seconds that a layer cannot beat, for the records that were measured on a machine like this one with as many
    threads as this process may use; and what the reader should know about them."""
    from lowering.problem import accumulator
    from schedules import Machine

    from ..pipeline import resolve_target
    from ..threads import most_threads
    from ..tuning import log
    from ..tuning.bound import Limits

    here = log.this_machine(resolve_target("llvm"))
    found: dict[tuple[MachineId, Task], float] = {}
    notes = []
    for machine in dict.fromkeys(r.machine for r in records):
        same = (machine.cpu, machine.mcpu, machine.features) == (here.cpu, here.mcpu, here.features)
        if not same or machine.threads > most_threads():
            notes.append(
                f"No bounds for {machine.cpu}, {machine.threads} threads: they are measured on such a machine."
            )
            continue
        target = Machine.from_target(resolve_target("llvm"))
        tasks = list(dict.fromkeys(r.task for r in records if r.machine == machine))
        for dtype in sorted({accumulator(task.problem.dtype) for task in tasks}):
            limits = Limits.measure(machine.threads, dtype)
            for task in tasks:
                if accumulator(task.problem.dtype) == dtype and (least := _bound(task, target, limits)) is not None:
                    found[machine, task] = least
            notes.append(
                f"Bounds for {machine.threads} threads: the least over all lowerings of multiply-adds in {dtype} at "
                f"{limits.flops_per_s / 1e9:.0f} GFLOP/s and weights at {limits.read_bytes_per_s / 1e9:.1f} GB/s, "
                "both measured when this page was made."
            )
    return found, notes


def _bound(task: Task, machine: Any, limits: Any) -> float | None:
    from lowering import catalogue

    from ..tuning.bound import lower_bound

    least = math.inf
    for lowering in catalogue().values():
        if lowering.applicable(task.problem) is None:
            least = min(least, lower_bound(lowering, task.problem, None, machine, limits))
    return least if math.isfinite(least) else None


def _commands(records: Sequence[Record], model: str | None, files: Sequence[Path]) -> list[str]:
    """How the log and this page are made: the model's name where it is known, else that of each log file."""
    from ..tuning.folder import code_of

    models = [model] if model else sorted({file.stem for file in files}) or ["MODEL"]
    lines = []
    for machine in dict.fromkeys(r.machine for r in records):
        target = shlex.quote(code_of(machine))
        names = " ".join(map(shlex.quote, models))
        lines.append(f"gemmify tune {names} --target {target} --threads {machine.threads}")
    program = Path(sys.argv[0]).name.replace("__main__.py", "gemmify") or "gemmify"
    return [*lines, shlex.join([program, *sys.argv[1:]])]


def show(result: dict[str, Any]) -> None:
    for row in result["machines"]:
        machine, parts = row["machine"], [f"{row['layers']} different layer{'s' * (row['layers'] != 1)}"]
        if row["untuned"] and row["tuned"]:
            parts.append(f"untuned {duration(row['untuned'])}, tuned {duration(row['tuned'])}")
            parts.append(f"{ratio(row['untuned'] / row['tuned'])} x")
        print(f"{machine['cpu']}, {machine['threads']} threads: {', '.join(parts)}")
    print(f"wrote {result['output']} ({result['bytes'] / 1024:.0f} KiB, {result['records']} records)")
