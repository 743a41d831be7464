"""Measuring candidates on this machine: built two at a time, then run alone, one after another."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import cloudpickle
import psutil

from schedules import Machine

from ...errors import GemmifyError, InputError
from ...host import cpu_flags, host_arch, kernel_names
from ...pipeline import resolve_target
from ...threads import check_threads, most_threads
from ..point import Point
from ..task import Task
from . import sampling
from .arrays import TaskArrays, private_folder
from .flush import FLUSH_BYTES
from .job import Job, Measured, Reply
from .processes import Child, Ended, Processes, ServerEnded
from .server import Config

AT_ONCE = 16
"""Candidates that are built and wait for their turn, at most."""


@dataclass
class _Trial:
    """A candidate between its build and its turn."""

    index: int
    child: Child | None
    begun: float
    seconds_build: float = 0.0
    seconds_measure: float = 0.0
    error: float | None = None
    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    failed: Measured | None = None

    def result(self) -> Measured:
        """What is known of it now."""
        if self.failed is not None:
            return self.failed
        times = tuple(self.warm), tuple(self.cold)
        return Measured("ok", "", *times, self.error, self.seconds_build, self.seconds_measure)

    def fail(self, outcome: str, why: str, error: float | None = None) -> None:
        self.failed = Measured(outcome, why, (), (), error, self.seconds_build, self.seconds_measure)


class LocalMeasurer:
    """Measures on this machine. A context manager; `close` leaves no process and no file behind, and where this process
    is killed the others end by themselves.

    `target` is as for `gemmify.compile`, `threads` how many threads run a layer. A candidate may build for
    `build_limit` seconds, run (check and samples together) for `run_limit` seconds, and allocate `memory_limit` bytes
    (default: half of what is free now). `seed` makes the random input. Raises InputError for a target that this machine
    cannot run and a thread count that it does not have, GemmifyError where no process can be started.
    """

    def __init__(
        self,
        target: Any,
        threads: int,
        *,
        build_limit: float = 20.0,
        run_limit: float = 10.0,
        memory_limit: int | None = None,
        seed: int = 0,
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        resolved = resolve_target(target)
        _require_host(Machine.from_target(resolved))
        self.target, self.threads = resolved, check_threads(threads)
        self._limits = build_limit, run_limit
        self._memory = memory_limit or psutil.virtual_memory().available // 2
        self._folder = private_folder()
        self._arrays = TaskArrays(self._folder, seed)
        self._live: list[_Trial] = []
        self._builders = min(AT_ONCE, most_threads())
        self._config = Config(str(resolved), threads, flush_bytes, str(self._folder))
        try:
            self._processes = Processes(self._config)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def __enter__(self) -> LocalMeasurer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove every file. May be called twice."""
        self._processes.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def prepare(self, task: Task) -> None:
        """Make the task's random arrays and their float64 result, once. GemmifyError where that fails."""
        self._arrays.of(task, self._processes)

    # --- trials ----------------------------------------------------------------------------------------------------

    def measure(
        self, task: Task, points: Sequence[Point], give_up: float | None = None
    ) -> Iterator[tuple[int, Measured]]:
        """Build, check and time every point; yields (index in `points`, result) as soon as each is known, in no fixed
        order: of candidates that are built at the same time the one that is done first is timed first.

        A candidate that is more than 2.5 times slower than `give_up` seconds (the best cold time known; one found in
        this batch takes its place) has two cold samples only.
        """
        left = dict(enumerate(points))
        restarted = False
        while left:
            try:
                batch = dict(list(left.items())[:AT_ONCE])
                for index, found in self._batch(task, batch, give_up):
                    del left[index]
                    restarted = False
                    if give_up is not None and found.ok:
                        give_up = min(give_up, statistics.median(found.cold))
                    yield index, found
            except ServerEnded:
                if restarted:
                    raise GemmifyError("the process that measures candidates ended twice without a result") from None
                restarted = True
                self._restart()

    def _restart(self) -> None:
        self._processes.close()
        self._live = []
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._processes = Processes(self._config)

    def _batch(self, task: Task, points: dict[int, Point], give_up: float | None) -> Iterator[tuple[int, Measured]]:
        ready = []
        try:
            for trial in self._build(task, points):
                if trial.failed is None:
                    ready.append(trial)
                else:
                    yield trial.index, trial.failed
            for trial in ready:
                if self._check(trial):
                    self._sample(trial, sampling.TRIAL, give_up)
                self._drop(trial)
                yield trial.index, trial.result()
        finally:
            self._drop(*self._live)

    def finals(self, task: Task, points: Sequence[Point], rounds: int) -> list[Measured]:
        """Build and check every point, then time them in turns, `rounds` times: a drift of the machine falls on all of
        them alike. Odd rounds go backwards. The results are in the order of `points`."""
        if rounds < 1:
            raise InputError(f"asked for {rounds} rounds; at least 1 is required")
        for attempt in range(2):
            try:
                return self._finals(task, dict(enumerate(points)), rounds)
            except ServerEnded:
                if attempt:
                    break
                self._restart()
        raise GemmifyError("the process that measures candidates ended twice without a result")

    def _finals(self, task: Task, points: dict[int, Point], rounds: int) -> list[Measured]:
        trials: list[_Trial] = []
        try:
            trials = sorted(self._build(task, points), key=lambda trial: trial.index)
            for trial in trials:
                with self._awake(trial):
                    if trial.failed is None:
                        self._check(trial)
            for number in range(rounds):
                for trial in trials if number % 2 == 0 else reversed(trials):
                    with self._awake(trial):
                        if trial.failed is None:
                            self._sample(trial, sampling.TURN, None)
            return [trial.result() for trial in trials]
        finally:
            self._drop(*self._live)

    @contextlib.contextmanager
    def _awake(self, trial: _Trial) -> Iterator[None]:
        """Let a candidate run within the block and hold it still after it: TVM's threads look for work a while longer,
        and would take the next one's processor."""
        if trial.child is None:
            yield
            return
        self._processes.signal(trial.child, "continue")
        yield
        if trial.child is not None:  # it may have failed meanwhile
            self._processes.signal(trial.child, "stop")

    def _build(self, task: Task, points: dict[int, Point]) -> Iterator[_Trial]:
        """The candidates in the order in which they are built, or have failed to be."""
        folder, left, building = self._arrays.of(task, self._processes), list(points.items()), list[_Trial]()
        while left or building:
            while left and len(building) < self._builders:
                trial = self._start(task, folder, *left.pop(0))
                if trial.failed is None:
                    building.append(trial)
                else:
                    yield trial
            if not building:
                continue
            limit, begun = self._limits[0], {trial.child: trial.begun for trial in building}
            heard = dict(self._processes.wait([c for c in begun if c], min(begun.values()) + limit))
            for trial in list(building):
                spent = time.monotonic() - trial.begun
                reply = heard.get(trial.child) if trial.child else None
                if reply is None and spent < limit:
                    continue
                building.remove(trial)
                trial.seconds_build = spent
                self._settle(trial, reply, "building", limit)
                yield trial

    def _start(self, task: Task, folder: Path, index: int, point: Point) -> _Trial:
        trial = _Trial(index, None, time.monotonic())
        try:
            payload = cloudpickle.dumps(Job.of(task, point, str(folder), self._memory))
        except Exception as error:  # an unknown key, sizes that it refuses, a lowering that cannot be sent
            trial.fail("build", f"{type(error).__name__}: {error}")
            return trial
        trial.child = self._processes.fork(payload)
        self._live.append(trial)
        return trial

    def _check(self, trial: _Trial) -> bool:
        """Run a candidate once and compare its numbers; whether they are right."""
        reply = self._ask(trial, "check")
        if reply is not None:
            trial.error = reply.values["error"]
        return reply is not None

    def _sample(self, trial: _Trial, amount: sampling.Amount, give_up: float | None) -> None:
        limit = self._limits[1] / 2
        reply = self._ask(trial, "sample", amount=amount, limit=limit, give_up=give_up)
        if reply is not None:
            trial.warm += reply.values["warm"]
            trial.cold += reply.values["cold"]

    def _ask(self, trial: _Trial, do: str, **arguments: Any) -> Reply | None:
        """Ask a built candidate for something; its reply, or None where it failed."""
        assert trial.child is not None
        begun, limit = time.monotonic(), self._limits[1]
        trial.child.ask(do, **arguments)
        heard = self._processes.wait([trial.child], begun + limit)
        trial.seconds_measure += time.monotonic() - begun
        return self._settle(trial, heard[0][1] if heard else None, "running", limit)

    def _settle(self, trial: _Trial, reply: Reply | Ended | None, phase: str, limit: float) -> Reply | None:
        """Note what a candidate's last reply, or its silence, says of it; the reply unless it failed."""
        if isinstance(reply, Reply) and reply.what != "failed":
            return reply
        if reply is None:
            trial.fail("timeout", f"{phase} took more than {limit:g} s")
        elif isinstance(reply, Ended):
            trial.fail(*reply.judged(phase))
        else:
            trial.fail(reply.values["outcome"], reply.values["why"], reply.values["error"])
        self._drop(trial)
        return None

    def _drop(self, *trials: _Trial) -> None:
        """End the processes of these candidates."""
        self._processes.end([trial.child for trial in trials if trial.child is not None])
        for trial in trials:
            trial.child = None
        self._live = [trial for trial in self._live if trial.child is not None]


def _require_host(machine: Machine) -> None:
    """InputError where this machine cannot run code for `machine`."""
    advice = "tune on a machine of that kind, through --tracker or with --bundle"
    if machine.arch != host_arch():
        raise InputError(f"the target is for {machine.arch} and this machine is {host_arch()}; {advice}")
    present = cpu_flags()
    missing = sorted(set(kernel_names(machine.arch, machine.features)) - present) if present is not None else []
    if missing:
        named = ", ".join(missing[:6])
        raise InputError(f"the target needs CPU features that this machine lacks ({named}); {advice}")
