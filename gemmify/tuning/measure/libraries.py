"""Measuring candidates that are built as libraries and run in processes of their own, somewhere else than here.

Where that is, subclasses say: on the devices of a tracker (remote.py), on the GPU of this machine (gpu.py).
"""

from __future__ import annotations

import queue
import shutil
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import GemmifyError, InputError
from ...pipeline import resolve_target
from ..point import Point
from ..record import MachineId
from ..task import Task
from .builders import Builders, Built
from .check import write_arrays
from .helper import Helper
from .job import Measured
from .tries import Gone, Try


class LibraryMeasurer(ABC):
    """Builds candidates for `target` as libraries, `builders` at once, and has `workers` processes run them. A context
    manager, with the methods of `LocalMeasurer`.

    A candidate may build for `build_limit` seconds and run for `run_limit` seconds, and its tensors may take
    `memory_limit` bytes (None: no limit); `seed` makes the random input.
    """

    def __init__(
        self,
        target: Any,
        threads: int,
        *,
        build_limit: float,
        run_limit: float,
        memory_limit: int | None,
        seed: int,
        workers: int,
        builders: int = 0,
        prefix: str,
    ) -> None:
        self.target, self.threads, self.seed = resolve_target(target), threads, seed
        self._run_limit, self._memory, self._closed = run_limit, memory_limit, False
        self._folder = Path(tempfile.mkdtemp(prefix=prefix))
        self._tasks: dict[Task, Path] = {}
        self._count = 0
        self._builders = Builders(str(self.target), build_limit, builders)
        self._helpers = [Helper({"TVM_NUM_THREADS": "1"}, str(self._folder)) for _ in range(workers)]
        self._free: queue.SimpleQueue[Helper] = queue.SimpleQueue()
        for helper in self._helpers:
            self._free.put(helper)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="gemmify-device")

    @abstractmethod
    def machine(self) -> MachineId:
        """What the candidates run on."""

    @abstractmethod
    def _on_device(self, do: str, work: tuple[Any, ...], size: int, tried: Try, limit: float | None = None) -> Any:
        """What `do` ("trial", "finals") answers to `work`; `size` bytes of tensors go there. Raises Gone where it
        cannot be had, GemmifyError where nothing can be measured any more."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process here and remove every file. May be called twice."""
        self._closed = True
        self._builders.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for helper in self._helpers:
            helper.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def prepare(self, task: Task) -> None:
        """Make the task's random arrays and their float64 result, once. GemmifyError where there is no room."""
        self._arrays(task)

    def _arrays(self, task: Task) -> Path:
        if task not in self._tasks:
            while len(self._tasks) >= 2:  # large layers: the arrays of all would fill a small disk
                shutil.rmtree(self._tasks.pop(next(iter(self._tasks))), ignore_errors=True)
            self._count += 1
            folder = self._folder / f"task{self._count}"
            folder.mkdir()
            try:
                write_arrays(task, folder, self.seed)
            except OSError as err:
                said = err.strerror or err
                raise GemmifyError(f"cannot keep the arrays of {task.title} in {folder}: {said}; free space") from err
            self._tasks[task] = folder
        return self._tasks[task]

    # --- trials ----------------------------------------------------------------------------------------------------

    def measure(
        self, task: Task, points: Sequence[Point], give_up: float | None = None
    ) -> Iterator[tuple[int, Measured]]:
        """Build, check and time every point; yields (index in `points`, result) as soon as each is known.

        A candidate that is more than 2.5 times slower than `give_up` seconds (the best cold time known; one found in
        this batch takes its place) has two cold samples only.
        """
        arrays, best = self._arrays(task), [give_up]
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as made:
            work: dict[Future[Measured], int] = {}
            for index, point in enumerate(points):
                built = self._builders.submit(task, point, Path(made, f"candidate{index}.so"))
                work[self._pool.submit(self._trial, built, task, arrays, best)] = index
            try:
                for done in as_completed(work):
                    found = done.result()
                    if found.ok and best[0] is not None:
                        best[0] = min(best[0], statistics.median(found.cold))
                    yield work[done], found
            finally:
                for future in work:
                    future.cancel()

    def _trial(self, building: Future[Built], task: Task, arrays: Path, best: list[float | None]) -> Measured:
        built = building.result()
        if built.failed is not None or built.spec is None:
            assert built.failed is not None
            return built.failed
        size = built.spec.bytes
        if self._memory is not None and size > self._memory:
            why = f"its tensors take {size} bytes, {self._memory} are allowed"
            return Measured("memory", why, seconds_build=built.seconds)
        tried = Try()
        try:
            answer = self._on_device("trial", (task, str(arrays), built.path, built.spec, best[0]), size, tried)
        except Gone as gone:
            answer = {"outcome": gone.args[0], "why": gone.args[1]}
        finally:
            Path(built.path).unlink(missing_ok=True)
        spent = time.monotonic() - tried.begun
        return Measured(**answer, seconds_build=built.seconds, seconds_measure=spent)

    def finals(self, task: Task, points: Sequence[Point], rounds: int) -> list[Measured]:
        """Build every point, then check and time all of them in turns on one device, `rounds` times, odd rounds
        backwards; the results are in the order of `points`."""
        if rounds < 1:
            raise InputError(f"asked for {rounds} rounds; at least 1 is required")
        arrays = self._arrays(task)
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as made:
            building = [self._builders.submit(task, p, Path(made, f"final{i}.so")) for i, p in enumerate(points)]
            built = [future.result() for future in building]
            found = {i: b.failed for i, b in enumerate(built) if b.failed is not None}
            libraries = [(b.path, b.spec) for b in built if b.spec is not None]
            size = sum(spec.bytes for _, spec in libraries)
            answers: list[dict[str, Any]] = []
            tried = Try()
            if libraries:
                try:
                    work = (task, str(arrays), libraries, rounds)
                    answers = self._on_device("finals", work, size, tried, self._run_limit * len(libraries))
                except Gone as gone:
                    # Which of them it was is not known, so that none is blamed.
                    answers = [{"outcome": "lost", "why": gone.args[1]}] * len(libraries)
            left, spent = iter(answers), time.monotonic() - tried.begun
            for i, b in enumerate(built):
                if i not in found:
                    found[i] = Measured(**next(left), seconds_build=b.seconds, seconds_measure=spent)
            return [found[i] for i in range(len(points))]
