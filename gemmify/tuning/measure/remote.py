"""Measuring candidates on other machines, through TVM's own RPC tracker and servers.

Candidates are built here and checked here; the devices run TVM's `rpc_server` and nothing of gemmify. Devices come and
go: what was on one that went away is measured on another.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from schedules import Machine

from ...errors import GemmifyError, InputError
from ...manifest import required_cpu_features, target_triple
from ..record import MachineId, feature_hash
from .builders import START_LIMIT
from .device import Wanted
from .helper import HelperDied, HelperError, HelperTimeout
from .libraries import LibraryMeasurer
from .probe import build_probe
from .tracker import checked_key, greet_tracker, parse_tracker
from .tries import Try, judge

_SLOWEST_LINK = 10e6  # bytes a second that a device's network carries at least
_DEVICE = "gemmify.tuning.measure.device"
_SETUP = 5.0  # seconds of a session beside the run and the transfers
_GRACE = 10.0
_MOMENT = 5.0  # seconds without a device that are no more than the change from one piece of work to the next
_KEYS_SHOWN = 8


class RemoteMeasurer(LibraryMeasurer):
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
        self._address, self._key = parse_tracker(tracker), checked_key(key)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise InputError(f"workers must be a whole number of at least 1, got {workers!r}")
        greet_tracker(self._address)
        super().__init__(
            target,
            threads,
            build_limit=build_limit,
            run_limit=run_limit,
            memory_limit=memory_limit,
            seed=seed,
            workers=workers,
            prefix="gemmify-remote-",
        )
        self._device_limit, self._say, self.deadline = device_limit, say, deadline
        self._said, self._lock = "", threading.Lock()
        self._got_device = time.monotonic()
        self._cpu = ""
        self._cores: int | None = None
        try:
            self._probe = str(self._folder / "probe.so")
            build_probe(target_triple(self.target), self._probe)
            self._needs = required_cpu_features(self.target)
        except BaseException:
            self.close()
            raise

    def machine(self) -> MachineId:
        """What the devices are. Waits for the first one where none was used yet."""
        if self._cores is None:
            self._on_device("facts", (), 0, Try())
        machine = Machine.from_target(self.target)
        cpu, cores = self._cpu or f"key:{self._key}", self._cores or machine.cores
        features = feature_hash(machine.features)
        return MachineId(str(self.target.kind.name), machine.mcpu, features, cpu, cores, self.threads)

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
