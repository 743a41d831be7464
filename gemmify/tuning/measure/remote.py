"""Measuring candidates on other machines, through TVM's own RPC tracker and servers.

Candidates are built here and checked here; the devices run TVM's `rpc_server` and nothing of gemmify. Devices come and
go: what was on one that went away is measured on another.
"""

from __future__ import annotations

import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from schedules import Machine

from ...errors import GemmifyError, InputError
from ...manifest import required_cpu_features, target_triple
from ...pipeline import resolve_target
from ..point import Point
from ..record import MachineId, feature_hash
from ..task import Task
from .builders import START_LIMIT, Builders, Built
from .check import write_arrays
from .device import Wanted
from .helper import Helper, HelperDied, HelperError, HelperTimeout
from .job import Measured
from .probe import build_probe
from .tracker import checked_key, greet_tracker, parse_tracker
from .tries import Gone, Try, judge

_SLOWEST_LINK = 10e6  # bytes a second that a device's network carries at least
_DEVICE = "gemmify.tuning.measure.device"
_SETUP = 5.0  # seconds of a session beside the run and the transfers
_GRACE = 10.0
_MOMENT = 5.0  # seconds without a device that are no more than the change from one piece of work to the next
_KEYS_SHOWN = 8


class RemoteMeasurer:
    """Measures on the devices that TVM's tracker at `tracker` ("HOST:PORT") lends under `key`, `workers` at once. A
    context manager, with the methods of `LocalMeasurer`.

    `target` is what the devices are, `threads` how many threads run a layer there. A candidate may build for
    `build_limit` seconds and run for `run_limit` seconds, and its tensors may take `memory_limit` bytes. Where no
    device can be had for `device_limit` seconds the work ends with a GemmifyError, as it does where, past `deadline`
    (`time.monotonic()`; may be set later), none was to be had for a moment; `say` is told of the wait. `machine` is
    what the devices are: the first one decides, and another CPU under the same key is not used.
    Raises InputError for an address that is none, GemmifyError where no tracker answers there.
    """

    def __init__(
        self,
        target: Any,
        threads: int,
        tracker: str,
        key: str,
        workers: int = 1,
        *,
        build_limit: float = 20.0,
        run_limit: float = 10.0,
        memory_limit: int | None = None,
        seed: int = 0,
        device_limit: float = 300.0,
        deadline: float | None = None,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.target, self.threads, self.seed = resolve_target(target), threads, seed
        self._address, self._key = parse_tracker(tracker), checked_key(key)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise InputError(f"workers must be a whole number of at least 1, got {workers!r}")
        greet_tracker(self._address)
        self._run_limit, self._memory, self._device_limit, self._say = run_limit, memory_limit, device_limit, say
        self.deadline = deadline
        self._said, self._lock, self._closed = "", threading.Lock(), False
        self._got_device = time.monotonic()
        self._cpu = ""
        self._cores: int | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="gemmify-remote-"))
        self._tasks: dict[Task, Path] = {}
        self._count = 0
        try:
            self._probe = str(self._folder / "probe.so")
            build_probe(target_triple(self.target), self._probe)
            self._needs = required_cpu_features(self.target)
            self._builders = Builders(str(self.target), build_limit)
            self._helpers = [Helper({"TVM_NUM_THREADS": "1"}, str(self._folder)) for _ in range(workers)]
            self._free: queue.SimpleQueue[Helper] = queue.SimpleQueue()
            for helper in self._helpers:
                self._free.put(helper)
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="gemmify-device")
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def __enter__(self) -> RemoteMeasurer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process here and remove every file; the devices are handed back. May be called twice."""
        self._closed = True
        self._builders.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for helper in self._helpers:
            helper.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def machine(self) -> MachineId:
        """What the devices are. Waits for the first one where none was used yet."""
        if self._cores is None:
            self._on_device("facts", (), 0, Try())
        machine = Machine.from_target(self.target)
        cpu, cores = self._cpu or f"key:{self._key}", self._cores or machine.cores
        features = feature_hash(machine.features)
        return MachineId(str(self.target.kind.name), machine.mcpu, features, cpu, cores, self.threads)

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

    # --- devices ---------------------------------------------------------------------------------------------------

    def _on_device(self, do: str, work: tuple[Any, ...], size: int, tried: Try, limit: float | None = None) -> Any:
        """What `device.<do>` answers on some device, tried on others where one goes away. `size` bytes travel. Raises
        Gone where it is not to be had, GemmifyError where no device is."""
        seconds = (limit or self._run_limit) + _SETUP + size / _SLOWEST_LINK
        helper = self._free.get()
        try:
            while True:
                if self._closed:
                    raise GemmifyError("the measurer was closed")
                tried.phase = "waiting"
                wanted = Wanted(
                    self._address, self._key, self.threads, self._needs, self._cpu, round(seconds), self._probe
                )
                try:
                    news = partial(self._heard, tried, seconds)
                    return helper.call(f"{_DEVICE}:{do}", wanted, *work, limit=START_LIMIT, news=news)
                except (HelperDied, HelperTimeout, HelperError) as err:
                    helper.kill()  # whatever it still holds of the session goes with it
                    if self._closed:
                        raise GemmifyError("the measurer was closed") from err
                    judge(err, tried)
                    if tried.phase == "waiting":
                        self._wait(tried, 0, (), str(err))
                        time.sleep(1.0)
        finally:
            self._free.put(helper)

    def _heard(self, tried: Try, seconds: float, news: tuple[Any, ...]) -> float:
        """Note how far a piece of work came; the limit of what comes next, in seconds."""
        tried.phase = news[0]
        if news[0] == "waiting":
            self._wait(tried, *news[1:])
            return START_LIMIT
        if news[0] == "connecting":
            return 20.0
        if news[0] == "setup":
            tried.address, tried.begun = news[1], time.monotonic()
            with self._lock:
                self._got_device, self._said = time.monotonic(), ""
                self._cpu = self._cpu or news[2]["cpu"]
                self._cores = self._cores or news[2]["cores"] or self.threads
        return seconds + _GRACE

    def _wait(self, tried: Try, servers: int, others: tuple[str, ...], why: str) -> None:
        """No device yet: say so once, and give up after `device_limit` seconds without one or at the deadline. The
        tracker knows `servers` of the key, and the keys `others`."""
        start = f"python -m tvm.exec.rpc_server --tracker {self._address[0]}:{self._address[1]} --key {self._key}"
        place = f"the tracker {self._address[0]}:{self._address[1]}"
        if others and not servers and not why:
            shown = ", ".join(others[:_KEYS_SHOWN]) + (", ..." if len(others) > _KEYS_SHOWN else "")
            start = f"{start}`, or give --key one of those that it has: {shown}"
        else:
            start += "`"
        if why:
            text = f"waiting for a device of key {self._key} at {place}: {why}"
        elif servers == 0:
            text = f"waiting: {place} knows no device of key {self._key}; start one with `{start}"
        else:
            text = f"waiting: all {servers} devices of key {self._key} at {place} are busy"
        with self._lock:
            clock = time.monotonic()
            waited = clock - max(self._got_device, tried.since)
            over = self.deadline is not None and clock > self.deadline and waited > _MOMENT
            if over or waited > self._device_limit:
                end = "before the time was over" if over else f"for {self._device_limit:g} s"
                raise GemmifyError(
                    f"no device of key {self._key} could be had from {place} {end} ({why or f'it knows {servers}'}); "
                    f"what was measured is in the log; start one on the device with `{start}"
                )
            # A moment's wait, as between two trials on one device, is nothing to speak of.
            if waited > 2.0 and text != self._said and not (servers and not why):
                self._said = text
                self._say(text)
