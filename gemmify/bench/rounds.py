"""Engines measured in turn: each in its own process, a short burst of inferences at a time, everybody else asleep."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gemmify.bench.process import WorkerProcess
from gemmify.errors import GemmifyError, InputError
from gemmify.measure import summarize

SETTLE_SECONDS = 0.05  # between bursts, for the threads of the one before to fall asleep or be stopped
BURST_SECONDS = 0.15
MIN_ROUNDS = 5
IDLE_LIMIT = 0.2  # a worker that burns more of a core than this while others are measured disturbs them

Start = Callable[[str], WorkerProcess]


def measure_engines(
    files: Mapping[str, Path],
    inputs: Mapping[str, np.ndarray],
    threads: int,
    *,
    repeat: int = 40,
    profile: str | None = None,
    start: Start = WorkerProcess,
    between: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure each engine `{name: model file}` on the same inputs, alternately, `repeat` inferences each.

    A round gives every engine one burst, beginning with another engine each time; the first inference of a burst is not
    counted. `between` is called before the first round, in the middle and after the last; `progress` is told a line an
    engine that is ready, and a line a round. Returns `{"engines": {name:
    {version, load, times (seconds), best, median, p90, runs, idle}}, "outputs": {name: [arrays]}, "kernels": [...]}`;
    `idle` is the share of a core that the engine used while others were measured, `kernels` the (name, seconds) of the
    engine `profile`. Raises GemmifyError, naming the engine, where one fails, dies or does not answer.
    """
    if repeat < 1:
        raise InputError(f"asked for {repeat} inferences an engine; at least 1 is required")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemmify-bench-")))
        np.savez(folder / "inputs.npz", **dict(inputs))  # type: ignore[arg-type]
        workers = {name: stack.enter_context(start(name)) for name in files}
        engines: dict[str, dict[str, Any]] = {}
        for name, worker in workers.items():
            reply = worker.ask(
                "load", engine=name, model=str(files[name]), threads=threads, inputs=str(folder / "inputs.npz")
            )
            engines[name] = {"version": reply["version"], "load": reply["seconds"]}
            progress(f"{name} {reply['version']} loaded in {reply['seconds']:.2f} s")
        outputs = {name: outputs_of(worker, folder / f"{name}.npz") for name, worker in workers.items()}
        times, idle = _rounds(workers, repeat, between, progress)
        for name, engine in engines.items():
            engine.update(times=times[name], idle=idle[name], **summarize(times[name]))
        kernels = workers[profile].ask("profile", repeat=min(repeat, 10))["kernels"] if profile else []
    return {"engines": engines, "outputs": outputs, "kernels": kernels}


def outputs_of(worker: WorkerProcess, path: Path) -> list[np.ndarray]:
    """The outputs of one run of the worker's engine, in order; they pass through the file `path`."""
    worker.ask("outputs", path=str(path))
    with np.load(path) as data:
        return [data[key] for key in data.files]


def _rounds(
    workers: Mapping[str, WorkerProcess], repeat: int, between: Callable[[], None], progress: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Counted times of each engine, and the share of a core that each used while it was not its turn."""
    names = list(workers)
    sizes = {}
    for name in names:
        probe = min(workers[name].ask("burst", runs=2, drop=1)["seconds"])
        sizes[name] = burst_size(probe, repeat)
        workers[name].pause()
    rounds = max(math.ceil(repeat / size) for size in sizes.values())
    times: dict[str, list[float]] = {name: [] for name in names}
    idle = {name: [0.0, 0.0] for name in names}  # seconds of CPU, seconds
    between()
    for index in range(rounds):
        if index == rounds // 2 and rounds > 1:
            between()
        turn, said = index % len(names), []
        for name in names[turn:] + names[:turn]:
            left = repeat - len(times[name])
            if left == 0:
                continue
            time.sleep(SETTLE_SECONDS)
            reply = workers[name].ask("burst", runs=min(sizes[name], left), drop=1)
            workers[name].pause()
            times[name] += reply["seconds"]
            said.append(f"{name} {1e3 * statistics.median(reply['seconds']):.2f} ms")
            idle[name][0] += reply["idle_cpu"]
            idle[name][1] += reply["idle"]
        progress(f"round {index + 1}/{rounds}: {', '.join(said)}")
    time.sleep(SETTLE_SECONDS)
    between()
    return times, {name: cpu / max(wall, 1e-9) for name, (cpu, wall) in idle.items()}


def burst_size(seconds: float, repeat: int) -> int:
    """Inferences in a burst: about `BURST_SECONDS` long, and few enough that `repeat` takes `MIN_ROUNDS` rounds."""
    return max(1, min(math.ceil(BURST_SECONDS / max(seconds, 1e-6)), math.ceil(repeat / MIN_ROUNDS)))


def agreement(reference: list[np.ndarray], found: list[np.ndarray], engine: str) -> dict[str, Any]:
    """`{max_abs, relative}`: the largest difference between two engines' outputs, and that over the largest output.

    Both are None where an output is not finite in one and finite in the other. Raises GemmifyError where the engines do
    not return outputs of the same number and shapes.
    """
    shapes, other = [o.shape for o in reference], [o.shape for o in found]
    if shapes != other:
        raise GemmifyError(f"engine {engine} returns outputs of shapes {other}, the reference returns {shapes}")
    difference = largest = 0.0
    for a, b in zip(reference, found, strict=True):
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        if not np.array_equal(np.isfinite(a64), np.isfinite(b64)):
            return {"max_abs": None, "relative": None}
        finite = np.isfinite(a64)
        difference = max(difference, float(np.max(np.abs(a64 - b64)[finite], initial=0.0)))
        largest = max(largest, float(np.max(np.abs(a64)[finite], initial=0.0)))
    return {"max_abs": difference, "relative": difference / largest if largest else difference}
