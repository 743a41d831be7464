"""One conversation with a remote device through TVM's tracker. Runs in a `helper.Helper`, because a device that
vanishes leaves its client waiting for ever.

What it tells its parent on the way: ("waiting", how many servers of the key the tracker knows, its other keys, why),
("connecting", address), ("setup", address, facts), ("running",): from then on the candidate's code runs.
"""

from __future__ import annotations

import gc
import select
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import rpc
from tvm.rpc import base

from ...threads import SHARE_ALL_CORES
from ..task import Task
from .library import FLUSH, LibrarySpec
from .placed import run_finals, run_trial
from .probe import device_facts

Tell = Callable[[Any], None]
_ASK_EVERY = 1.0


@dataclass(frozen=True)
class Wanted:
    """Which device: the tracker's address, the key, how many threads it must run, the features that the code needs
    (as /proc/cpuinfo spells them), the model that all devices must be ("" for any), how long a session may last, and
    the library of `probe`."""

    tracker: tuple[str, int]
    key: str
    threads: int
    needs: tuple[str, ...]
    cpu: str
    seconds: float
    probe: str


class Session:
    """A session on a device that fits, with its modules."""

    def __init__(self, wanted: Wanted, tell: Tell) -> None:
        self.flush: Mapping[str, Any] = {"f_preproc": FLUSH}
        while True:
            address, match_key = _request(wanted, tell)
            tell(("connecting", f"{address[0]}:{address[1]}"))
            try:
                self.session = rpc.connect(*address, match_key, session_timeout=wanted.seconds)
            except Exception as err:  # the server went away after it had offered itself
                tell(("waiting", *_servers(wanted), f"{address[0]}:{address[1]} does not answer: {_line(err)}"))
                time.sleep(_ASK_EVERY)
                continue
            self.device = self.session.cpu()
            self.facts = device_facts(self.load(wanted.probe), self.device)
            unfit = self._unfit(wanted)
            if unfit is None:
                tell(("setup", f"{address[0]}:{address[1]}", self.facts))
                return
            del self.session, self.device
            gc.collect()  # hands the device back
            tell(("waiting", *_servers(wanted), f"{address[0]}:{address[1]} cannot be used: {unfit}"))
            time.sleep(_ASK_EVERY)

    def _unfit(self, wanted: Wanted) -> str | None:
        """Why this device cannot measure for us, or None."""
        flags = self.facts["flags"]
        missing = [name for name in wanted.needs if name not in flags] if flags is not None else []
        if missing:
            return f"its CPU lacks {', '.join(missing)}, which --target asks for"
        if wanted.cpu and self.facts["cpu"] and self.facts["cpu"] != wanted.cpu:
            return f"it is another CPU ({self.facts['cpu']} instead of {wanted.cpu}); give each kind a key of its own"
        places = self.session.get_function("ffi.Array")(*(str(i) for i in range(wanted.threads)))
        self.session.get_function("runtime.config_threadpool")(SHARE_ALL_CORES, wanted.threads, places)
        used = int(self.session.get_function("runtime.NumThreads")())
        if used != wanted.threads or (self.facts["cores"] or wanted.threads) < wanted.threads:
            has = f"{self.facts['cores'] or used} cores, and runs {used} threads"
            return f"it has {has}, where {wanted.threads} threads are asked for; give --threads, or other devices"
        return None

    def load(self, path: str) -> Any:
        """Send a library and load it there."""
        self.session.upload(path)
        return self.session.load_module(Path(path).name)

    def tensor(self, array: np.ndarray) -> Any:
        """A copy of `array` on the device."""
        return tvm.runtime.tensor(np.ascontiguousarray(array), self.device)


def _line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).strip().splitlines() if line.strip()]
    return (lines or [type(err).__name__])[-1][:200]


def _request(wanted: Wanted, tell: Tell) -> tuple[tuple[str, int], str]:
    """Wait in the tracker's queue for a device; its address and the key that it must be greeted with."""
    sock = base.connect_with_retry(wanted.tracker, timeout=0)
    try:
        sock.settimeout(10.0)
        sock.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
        base.recvall(sock, 4)
        base.sendjson(sock, [base.TrackerCode.REQUEST, wanted.key, "", 1])
        while not select.select([sock], [], [], _ASK_EVERY)[0]:
            tell(("waiting", *_servers(wanted), ""))
        code, answer = base.recvjson(sock)
        if code != base.TrackerCode.SUCCESS:
            raise RuntimeError(f"the tracker refuses the request: {answer}")
        return (str(answer[0]), int(answer[1])), str(answer[2])
    finally:
        sock.close()


def _servers(wanted: Wanted) -> tuple[int, tuple[str, ...]]:
    """How many servers of the key the tracker knows, and which other keys."""
    session = rpc.connect_tracker(*wanted.tracker)
    try:
        known = session.summary()["server_info"]
        keys = [str(server.get("key")).removeprefix("server:") for server in known]
        others = sorted({key for key in keys if key.isprintable()} - {wanted.key})
        return keys.count(wanted.key), tuple(others)
    finally:
        session.close()


def facts(_tell: Tell, wanted: Wanted) -> dict[str, Any]:
    """What the next free device that fits is."""
    return Session(wanted, _tell).facts


def trial(
    tell: Tell, wanted: Wanted, task: Task, folder: str, path: str, spec: LibrarySpec, give_up: float | None
) -> dict[str, Any]:
    """`run_trial` on a device."""
    session = Session(wanted, tell)
    tell(("running",))
    return run_trial(session, task, folder, path, spec, give_up)


def finals(
    tell: Tell, wanted: Wanted, task: Task, folder: str, libraries: list[tuple[str, LibrarySpec]], rounds: int
) -> list[dict[str, Any]]:
    """`run_finals` on one device."""
    session = Session(wanted, tell)
    tell(("running",))
    return run_finals(session, task, folder, libraries, rounds)
