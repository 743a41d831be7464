"""The whole of a tuning run: tasks of the networks, trials while the budget lasts, finals, and what came of it.

1. the layers of all networks as tasks; what earlier runs found becomes the start of each search
2. batch after batch goes to the task that promises most; every trial is in the log before the next begins
3. finals: the best of each task and the default, in turns, alone and then inside their network
4. the result: what a compilation will take for every layer now
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lowering.problem import accumulator
from schedules import Gpu, machine_of

from ..errors import InputError
from ..pipeline import resolve_target
from ..threads import default_threads
from .bound import Limits
from .budget import Budget
from .cost_model import CostModel, Row
from .finals import Finals
from .folder import folder_of, this_machine, this_versions
from .history import History
from .layers import Network, TaskUse, gather, network
from .line import now
from .log import read, warn_damage
from .measure.job import Measured
from .point import Point
from .progress import Progress, TaskView
from .record import MachineId, Record
from .result import summarize
from .search import Search
from .settings import BATCH, Settings
from .space import Space
from .task import Task
from .use import SHIPPED
from .writer import Writer

FINAL_SECONDS = 2.5
"""What the finals of one task take, about, alone."""


@dataclass
class Layer:
    """A task of this run: where it occurs, its search, its log file."""

    use: TaskUse
    search: Search
    default: Point
    file: Path
    fresh: int = 0
    """Trials of this run."""

    @property
    def task(self) -> Task:
        return self.use.task


class Session:
    """One tuning run; `begun` is the time (monotonic) from which its budget counts. A context manager that owns what
    measures."""

    def __init__(self, models: Sequence[Any], settings: Settings, progress: Progress, begun: float) -> None:
        if not models:
            raise InputError("give at least one model to tune")
        self.settings, self.progress, self.begun = settings, progress, begun
        self.target = resolve_target(settings.target)
        self.machine = machine_of(self.target)
        elsewhere = settings.tracker is not None or settings.bundle is not None
        self.threads = self._threads(elsewhere)
        self.id = secrets.token_hex(4)
        self.versions = this_versions()
        chosen = (settings.shapes, self.machine, settings.layers, settings.dtype)
        self.networks = [network(model, *chosen) for model in models]
        self.uses = gather(self.networks)
        self.where: MachineId = this_machine(self.target, self.threads)
        self.limits = {} if elsewhere else self._limits()
        """Of this machine, by the dtype of the layers; none where the code runs elsewhere."""
        self._stack = ExitStack()
        try:
            self.measurer = self._measurer()
            self.history = self._history()
            self.model = CostModel(self.machine, settings.seed)
            self._learn()
            self.layers = [self._layer(use) for use in self.uses]
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- 1 ---

    def _threads(self, elsewhere: bool) -> int:
        """How many threads run a layer; a GPU's kernels are launched by one."""
        if isinstance(self.machine, Gpu):
            return 1
        return self.settings.threads or (self.machine.cores if elsewhere else default_threads())

    def _limits(self) -> dict[str, Limits]:
        dtypes = dict.fromkeys(use.task.problem.dtype for use in self.uses)
        if isinstance(self.machine, Gpu):
            return {dtype: Limits.of_gpu(self.machine, dtype) for dtype in dtypes}
        measured = {
            made: Limits.measure(self.threads, made, self.target) for made in dict.fromkeys(map(accumulator, dtypes))
        }
        return {dtype: measured[accumulator(dtype)] for dtype in dtypes}

    def _history(self) -> History:
        if self.settings.from_nothing:
            return History()
        loaded = read(self.settings.logs)
        warn_damage(loaded)
        records = list(loaded.records)
        if SHIPPED.resolve() != self.settings.logs.resolve():
            records += read(SHIPPED / folder_of(self.where)).records
        history = History.of(dict.fromkeys(records), self.where, self.versions)
        for why, count in history.left_out.items():
            self.progress.note(f"{count} records left out: {why}")
        return history

    def _learn(self) -> None:
        """Let the cost model know what the log says of other layers; its own each search tells it."""
        own = {use.task for use in self.uses}
        for task, records in self.history.known.items():
            if task not in own:
                self.model.add(Row(task, r.point, median(r.cold) if r.ok else None) for r in records if _counts(r))

    def _layer(self, use: TaskUse) -> Layer:
        settings = self.settings
        space = Space(use.task, self.machine, settings.lowerings, settings.max_workspace, settings.max_error)
        limits = self.limits.get(use.task.problem.dtype)
        search = Search(space, settings.seed, model=self.model, limits=limits)
        for record in self.history.known.get(use.task, ()):
            if _counts(record):
                search.observe(record.point, median(record.cold) if record.ok and record.cold else None)
        folder = settings.logs / folder_of(self.where)
        # What `compile` picks, whether or not its lowering was asked for: what is found must beat that.
        free = (
            space
            if settings.lowerings is None
            else Space(use.task, self.machine, None, settings.max_workspace, settings.max_error)
        )
        return Layer(use, search, free.default(), folder / f"{_file_name(use.places[0][0])}.jsonl")

    # --- 2 ---

    def run(self) -> dict[str, Any]:
        """Trials, finals and the result."""
        self.progress.start(
            [self._view(layer) for layer in self.layers],
            self.settings.budget,
            next((limits.flops_per_s for limits in self.limits.values()), None),
            began=self.begun,
        )
        with Finals(self) as finals:
            finals.prepare()
            budget = Budget(
                [layer.use.count for layer in self.layers],
                self.settings.budget,
                bounds=[layer.search.bound for layer in self.layers],
                priors=[self.prior(layer) for layer in self.layers],
                trials=self.settings.trials,
                finals=FINAL_SECONDS + finals.estimate / len(self.layers),
            )
            budget.spent(None, time.monotonic() - self.begun)
            self.progress.phase("trials")
            self._trials(budget)
            finals.run(budget)
            return summarize(self, finals)

    def _trials(self, budget: Budget) -> None:
        while (index := self._next(budget)) is not None:
            layer, start = self.layers[index], time.monotonic()
            if (why := layer.search.converged) is not None:
                budget.stop(index, why)
                self.progress.stopped(index, why)
                continue
            if not layer.fresh:
                # Asked for now, not before: the layers that had their turn in this run have something to say.
                layer.search.suggest(self.history.seeds_for(layer.task))
            left = budget.trials_left(index)
            most = BATCH * self.settings.workers
            room, lacking = most if left is None else min(most, left), self._lacks_default(layer)
            points = [layer.default] * lacking + layer.search.propose(room - lacking)
            if points:
                self._batch(index, points)
            elif layer.search.converged is None:
                budget.stop(index, "nothing is left to try")
                self.progress.stopped(index, "nothing is left to try")
            best = layer.search.best
            budget.spent(index, time.monotonic() - start, len(points))
            budget.observe(index, None if best is None else best[1])

    def _lacks_default(self, layer: Layer) -> bool:
        """Whether the default is no point of the search (another lowering was asked for) and was not measured yet."""
        tried = self.history.known.get(layer.task, ())
        return not layer.search.space.valid(layer.default) and all(r.point != layer.default for r in tried)

    def _next(self, budget: Budget) -> int | None:
        """The task whose turn it is. Where all have stopped and there is time left, those that may gain yet go on."""
        index = budget.next()
        if index is None and self.settings.budget is not None and budget.left > budget.reserve:
            on = [i for i, layer in enumerate(self.layers) if layer.search.go_on()]
            for i in on:
                budget.reopen(i)
            if on:
                self.progress.note(f"time is left: {len(on)} layers go on, more patiently")
                return self._next(budget)
        return index

    def _batch(self, index: int, points: Sequence[Point]) -> None:
        """Measure `points`; each is in the log as soon as it is known."""
        layer = self.layers[index]
        best = layer.search.best
        for at, found in self.measurer.measure(layer.task, points, give_up=best[1] if best else None):
            point = points[at]
            self.log(layer, point, found)
            seconds = median(found.cold) if found.ok else None
            layer.fresh += 1
            before = layer.search.best
            if found.outcome == "lost":
                layer.search.lost(point)
            else:
                layer.search.observe(point, seconds)
            if point == layer.default and seconds is not None:
                self.progress.default(index, seconds)
            self.progress.trial(index, found.outcome, seconds, point.title)
            after = layer.search.best
            if after is not None and after != before:
                self.progress.best(index, after[1], after[0].lowering)

    def log(self, layer: Layer, point: Point, found: Measured, stage: str = "trial", group: str = "") -> Record:
        """Append what was measured to the layer's log; only then it counts."""
        record = Record(
            layer.task,
            point,
            self.where,
            self.versions,
            found.outcome,
            found.why,
            found.warm,
            found.cold,
            found.error,
            stage,
            group,
            now(),
            self.id,
        )
        with Writer(layer.file) as writer:
            writer.append(record)
        self.history.add(record)
        return record

    # --- what it needs ---

    def _measurer(self) -> Any:
        """What measures: devices of a tracker, of which the first says what machine it is, or this machine; nothing
        for a bundle."""
        settings = self.settings
        if settings.bundle is not None:
            return None
        if settings.tracker is None and isinstance(self.machine, Gpu):
            from .measure.gpu import GpuMeasurer

            return self._stack.enter_context(GpuMeasurer(self.target, seed=settings.seed))
        if settings.tracker is None:
            from .measure.local import LocalMeasurer

            return self._stack.enter_context(LocalMeasurer(self.target, self.threads, seed=settings.seed))
        from .measure.remote import RemoteMeasurer

        devices = RemoteMeasurer(
            self.target,
            self.threads,
            settings.tracker,
            str(settings.key),
            settings.workers,
            seed=settings.seed,
            say=self.progress.note,
            deadline=None if settings.budget is None else self.begun + settings.budget,
        )
        self._stack.enter_context(devices)
        self.where = devices.machine()
        return devices

    def prior(self, layer: Layer) -> float:
        """A guess of a layer's time where none was measured: modelled cycles at a common clock, or nanoseconds."""
        if layer.search.best is not None:
            return layer.search.best[1]
        least = min(layer.search.space.cycles.values())
        return least / (1e9 if isinstance(self.machine, Gpu) else 3e9)

    def _view(self, layer: Layer) -> TaskView:
        known = layer.search.results.get(layer.default)
        return TaskView(layer.task.title, layer.use.count, layer.search.bound, known, layer.task.problem.macs)

    def pack(self) -> dict[str, Any]:
        """Write the bundle of candidates for a machine that cannot be reached."""
        from .measure.bundle import write_bundle

        count = self.settings.trials or 32
        points = {layer.task: layer.search.propose(count) for layer in self.layers}
        assert self.settings.bundle is not None
        done = write_bundle(
            self.settings.bundle,
            [layer.task for layer in self.layers],
            points,
            self.target,
            self.threads,
            self.settings.seed,
        )
        size = done.path.stat().st_size
        made = {"path": str(done.path), "bytes": size, "candidates": done.candidates, "left_out": done.left_out}
        return {"bundle": made, "logs": str(self.settings.logs), "summary": []}

    def stopped(self) -> str:
        """What to say to a user who stopped the run."""
        fresh = sum(layer.fresh for layer in self.layers)
        files = ", ".join(sorted({str(layer.file) for layer in self.layers if layer.fresh}))
        return (
            f"stopped before the finals: {fresh} trials are in {files}; the same command goes on"
            if fresh
            else "stopped before a trial"
        )

    def places(self, net: Network) -> Iterator[tuple[str, Layer]]:
        """(layer name, layer) of the layers of `net` that are tuned."""
        by_task = {layer.task: layer for layer in self.layers}
        for name, task in net.layers:
            yield name, by_task[task]


def _counts(record: Record) -> bool:
    """Whether a record's time can stand beside trials: what a layer took inside a network cannot."""
    return record.outcome != "lost" and record.stage != "network" and (not record.ok or bool(record.cold))


def _file_name(model: str) -> str:
    """A model's name as that of a file."""
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in model).lstrip(".") or "model"
