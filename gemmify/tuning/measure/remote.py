"""Measuring candidates on other machines, through TVM's own RPC tracker and servers.

Candidates are built here and checked here; the devices run TVM's `rpc_server` and nothing of gemmify. Devices come and
go: what was on one that went away is measured on another.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from tvm.rpc import base

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

MOST_KILLED = 2
"""A candidate during whose run so many devices went away is taken to be the cause."""
MOST_FAILED = 3
"""A trial that so many devices failed is given up as lost."""
_SLOWEST_LINK = 10e6  # bytes a second that a device's network carries at least
_DEVICE = "gemmify.tuning.measure.device"
_GRACE = 10.0


@dataclass
class _Try:
    """A piece of work on its way to a device: how far it came, and what became of it before."""

    phase: str = "waiting"
    address: str = ""
    killed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    begun: float = 0.0
    since: float = field(default_factory=time.monotonic)


class _Gone(Exception):
    """The work cannot be done: (outcome, why)."""


class RemoteMeasurer:
    """Measures on the devices that TVM's tracker at `tracker` ("HOST:PORT") lends under `key`, `workers` at once. A
    context manager, with the methods of `LocalMeasurer`.

    `target` is what the devices are, `threads` how many threads run a layer there. A candidate may build for
    `build_limit` seconds and run for `run_limit` seconds, and its tensors may take `memory_limit` bytes. Where no
    device can be had for `device_limit` seconds the work ends with a GemmifyError; `say` is told of the wait. `machine`
    is what the devices are: the first one decides, and another CPU under the same key is not used.
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
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.target, self.threads, self.seed = resolve_target(target), threads, seed
        self._address, self._key = parse_tracker(tracker), _checked_key(key)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise InputError(f"workers must be a whole number of at least 1, got {workers!r}")
        greet_tracker(self._address)
        self._run_limit, self._memory, self._device_limit, self._say = run_limit, memory_limit, device_limit, say
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
            self._helpers = [Helper({"TVM_NUM_THREADS": "1"}) for _ in range(workers)]
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
            helper.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def machine(self) -> MachineId:
        """What the devices are. Waits for the first one where none was used yet."""
        if self._cores is None:
            self._on_device("facts", (), 0, _Try())
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

        A candidate that is more than 2.5 times slower than `give_up` seconds has two cold samples only.
        """
        arrays = self._arrays(task)
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as made:
            work: dict[Future[Measured], int] = {}
            for index, point in enumerate(points):
                built = self._builders.submit(task, point, Path(made, f"candidate{index}.so"))
                work[self._pool.submit(self._trial, built, task, arrays, give_up)] = index
            try:
                for done in as_completed(work):
                    yield work[done], done.result()
            finally:
                for future in work:
                    future.cancel()

    def _trial(self, building: Future[Built], task: Task, arrays: Path, give_up: float | None) -> Measured:
        built = building.result()
        if built.failed is not None or built.spec is None:
            assert built.failed is not None
            return built.failed
        size = built.spec.bytes
        if self._memory is not None and size > self._memory:
            why = f"its tensors take {size} bytes, {self._memory} are allowed"
            return Measured("memory", why, seconds_build=built.seconds)
        tried = _Try()
        try:
            answer = self._on_device("trial", (task, str(arrays), built.path, built.spec, give_up), size, tried)
        except _Gone as gone:
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
            tried = _Try()
            if libraries:
                try:
                    work = (task, str(arrays), libraries, rounds)
                    answers = self._on_device("finals", work, size, tried, self._run_limit * len(libraries))
                except _Gone as gone:
                    # Which of them it was is not known, so that none is blamed.
                    answers = [{"outcome": "lost", "why": gone.args[1]}] * len(libraries)
            left, spent = iter(answers), time.monotonic() - tried.begun
            for i, b in enumerate(built):
                if i not in found:
                    found[i] = Measured(**next(left), seconds_build=b.seconds, seconds_measure=spent)
            return [replace(found[i]) for i in range(len(points))]

    # --- devices ---------------------------------------------------------------------------------------------------

    def _on_device(self, do: str, work: tuple[Any, ...], size: int, tried: _Try, limit: float | None = None) -> Any:
        """What `device.<do>` answers on some device, tried on others where one goes away. `size` bytes travel. Raises
        _Gone where it is not to be had, GemmifyError where no device is."""
        seconds = (limit or self._run_limit) + 15.0 + size / _SLOWEST_LINK
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
                    _judge(err, tried)
                    if tried.phase == "waiting":
                        self._wait(tried, 0, str(err))
                        time.sleep(1.0)
        finally:
            self._free.put(helper)

    def _heard(self, tried: _Try, seconds: float, news: tuple[Any, ...]) -> float:
        """Note how far a piece of work came; the limit of what comes next, in seconds."""
        tried.phase = news[0]
        if news[0] == "waiting":
            self._wait(tried, news[1], news[2])
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

    def _wait(self, tried: _Try, servers: int, why: str) -> None:
        """No device yet: say so once, and give up after `device_limit` seconds without one."""
        start = f"python -m tvm.exec.rpc_server --tracker {self._address[0]}:{self._address[1]} --key {self._key}"
        place = f"the tracker {self._address[0]}:{self._address[1]}"
        if why:
            text = f"waiting for a device of key {self._key} at {place}: {why}"
        elif servers == 0:
            text = f"waiting: {place} knows no device of key {self._key}; start one with `{start}`"
        else:
            text = f"waiting: all {servers} devices of key {self._key} at {place} are busy"
        with self._lock:
            waited = time.monotonic() - max(self._got_device, tried.since)
            if waited > self._device_limit:
                raise GemmifyError(
                    f"no device of key {self._key} could be had from {place} for {self._device_limit:g} s "
                    f"({why or f'it knows {servers}'}); start one on the device with `{start}`"
                )
            # A moment's wait, as between two trials on one device, is nothing to speak of.
            if waited > 2.0 and text != self._said and not (servers and not why):
                self._said = text
                self._say(text)


def _judge(err: Exception, tried: _Try) -> None:
    """Decide what the end of a conversation says of candidate and device. Raises _Gone where it is settled."""
    text = str(err)
    running = tried.phase == "running"
    if isinstance(err, HelperError) and running:
        if "Timeout" in err.kind or "session has expired" in text:
            raise _Gone("timeout", "running took more than its limit")
        if not _is_link(err):
            raise _Gone("crash", f"{err.kind}: {text}")
    if running:
        tried.killed.append(tried.address)
        if len(tried.killed) >= MOST_KILLED:
            raise _Gone("crash", f"{len(tried.killed)} devices went away while it ran ({', '.join(tried.killed)})")
    elif tried.phase == "setup":
        tried.failed.append(tried.address)
    if len(tried.killed) + len(tried.failed) >= MOST_FAILED:
        raise _Gone("lost", f"{MOST_FAILED} devices went away: {', '.join([*tried.failed, *tried.killed])}; {text}")
    if tried.phase not in ("running", "setup"):
        tried.phase = "waiting"


def _is_link(err: HelperError) -> bool:
    """Whether an exception speaks of the connection, not of what the device's functions raised."""
    return "Error caught from RPC call" not in str(err) and err.kind in (
        "ConnectionError",
        "ConnectionResetError",
        "InternalError",
        "OSError",
        "RPCError",
        "RuntimeError",
        "TVMError",
    )


def parse_tracker(text: str) -> tuple[str, int]:
    """The address in "HOST:PORT"; InputError where it is none."""
    host, _, port = str(text).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--tracker takes HOST:PORT, e.g. 192.168.1.10:9190, got {text!r}")
    return host.strip("[]"), int(port)


def _checked_key(key: str) -> str:
    if not isinstance(key, str) or not key or any(c.isspace() or c == ":" for c in key):
        raise InputError(f"--key takes the name that the servers were started with, without spaces, got {key!r}")
    return key


def greet_tracker(address: tuple[str, int]) -> None:
    """GemmifyError, saying how to start one, where no TVM tracker answers at `address`."""
    place = f"{address[0]}:{address[1]}"
    start = f"start one with `python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {address[1]}`"
    try:
        with contextlib.closing(socket.create_connection(address, timeout=5.0)) as sock:
            sock.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            if struct.unpack("<i", base.recvall(sock, 4))[0] != base.RPC_TRACKER_MAGIC:
                raise GemmifyError(f"what answers at {place} is no TVM tracker; {start}")
    except OSError as err:
        raise GemmifyError(f"no tracker answers at {place}: {err.strerror or err}; {start}") from err
