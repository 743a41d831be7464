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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import rpc
from tvm.rpc import base

from ...conformance import Expected, tolerance
from ...guarded import poison
from ...threads import SHARE_ALL_CORES
from ..task import Task
from . import sampling
from .check import read_arrays
from .library import ENTRY, FLUSH, LibrarySpec
from .probe import device_facts

Tell = Callable[[Any], None]
_ASK_EVERY = 1.0
_SHORTEST = 200e-6  # seconds of a warm sample


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


@dataclass
class _Placed:
    """A candidate on the device: its module and the arguments of its entry."""

    spec: LibrarySpec
    module: Any
    tensors: dict[str, Any]

    @property
    def arguments(self) -> list[Any]:
        return [self.tensors[name] for name in self.spec.entry]

    def run(self) -> None:
        """Transform the weight and run the layer once."""
        for call in self.spec.weights:
            self.module[call.symbol](*(self.tensors[name] for name in (*call.reads, call.writes)))
        self.module[ENTRY](*self.arguments)

    def times(self, session: Session, number: int, repeat: int, flush: bool) -> tuple[float, ...]:
        """Seconds of a call, one entry each of `repeat` samples of `number` calls."""
        preparation = FLUSH if flush else ""
        timer = self.module.time_evaluator(ENTRY, session.device, number=number, repeat=repeat, f_preproc=preparation)
        return tuple(float(t) for t in timer(*self.arguments).results)


def _place(session: Session, path: str, spec: LibrarySpec, given: dict[str, Any]) -> _Placed:
    written = {call.writes: spec.tensors[call.writes] for call in (*spec.weights, *spec.calls)}
    tensors = dict(given)
    for name, (shape, dtype) in written.items():
        tensors[name] = session.tensor(np.full(shape, poison(dtype), dtype))
    for name, (shape, source) in spec.views.items():
        tensors[name] = tensors[source]._create_view(shape)
    return _Placed(spec, session.load(path), tensors)


def _given(session: Session, want: Expected, names: set[str]) -> dict[str, Any]:
    arrays = {"data": want.data, "weight": want.weight}
    arrays |= {f"operand {i}": operand for i, operand in enumerate(want.operands)}
    return {name: session.tensor(array) for name, array in arrays.items() if name in names}


def compare(got: np.ndarray, want: Expected, task: Task, growth: float) -> tuple[float, str | None]:
    """The largest deviation of an output relative to the largest result, and what is wrong with it or None."""
    got = got.reshape(want.result.shape)
    largest = float(np.abs(want.result).max()) or 1.0
    worst = float(np.max(np.abs(got - want.result)))
    limit = tolerance(task.problem.dtype, want, growth, task.epilogue)
    if worst <= limit:  # a NaN compares as False: it must fail
        return worst / largest, None
    if not np.isfinite(worst):
        return float("inf"), f"{int((~np.isfinite(got)).sum())} of {got.size} output elements are not finite"
    return worst / largest, f"off by {worst / largest:.1e} of the largest output, {limit / largest:.1e} is allowed"


def facts(_tell: Tell, wanted: Wanted) -> dict[str, Any]:
    """What the next free device that fits is."""
    return Session(wanted, _tell).facts


def trial(
    tell: Tell, wanted: Wanted, task: Task, folder: str, path: str, spec: LibrarySpec, give_up: float | None
) -> dict[str, Any]:
    """Check a candidate on a device and time it: outcome, why, warm, cold, error, as `Measured` has them."""
    session = Session(wanted, tell)
    want = read_arrays(Path(folder))
    given = _given(session, want, set(spec.tensors))
    tell(("running",))
    placed = _place(session, path, spec, given)
    placed.run()
    error, wrong = compare(placed.tensors[spec.output].numpy(), want, task, spec.growth)
    if wrong is not None:
        return {"outcome": "wrong", "why": wrong, "error": error}
    warm, cold = _sample(session, placed, give_up)
    return {"outcome": "ok", "warm": warm, "cold": cold, "error": error}


def _sample(session: Session, placed: _Placed, give_up: float | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(warm, cold) times, in the amounts of a trial on this machine."""
    amount = sampling.TRIAL
    first = placed.times(session, 1, 2, flush=True)
    if give_up is not None and min(first) > sampling.GIVE_UP_FACTOR * give_up:
        return placed.times(session, 1, 1, flush=False), first
    more = _fitting(amount.cold_budget, max(first), amount.least, amount.cold) - len(first)
    cold = first + placed.times(session, 1, more, flush=True)
    call = min(placed.times(session, 1, 2, flush=False))
    number = max(1, int(np.ceil(_SHORTEST / max(call, 1e-7))))
    repeat = _fitting(amount.warm_budget, number * call, amount.least, amount.warm)
    return placed.times(session, number, repeat, flush=False), cold


def _fitting(budget: float, seconds: float, least: int, most: int) -> int:
    """How many samples of `seconds` fit into `budget`, between `least` and `most`."""
    return max(least, min(most, int(budget / max(seconds, 1e-7))))


def finals(
    tell: Tell, wanted: Wanted, task: Task, folder: str, libraries: list[tuple[str, LibrarySpec]], rounds: int
) -> list[dict[str, Any]]:
    """All candidates in turns on one device, `rounds` times, every second round backwards; one answer as `trial` gives
    for each."""
    session = Session(wanted, tell)
    want = read_arrays(Path(folder))
    given = _given(session, want, {name for _, spec in libraries for name in spec.tensors})
    tell(("running",))
    placed: list[_Placed] = []
    answers: list[dict[str, Any]] = []
    for path, spec in libraries:
        placed.append(_place(session, path, spec, given))
        placed[-1].run()
        error, wrong = compare(placed[-1].tensors[spec.output].numpy(), want, task, spec.growth)
        answers.append(
            {"outcome": "wrong" if wrong else "ok", "why": wrong or "", "error": error, "warm": (), "cold": ()}
        )
    turn = sampling.TURN
    for number in range(rounds):
        order = range(len(placed)) if number % 2 == 0 else reversed(range(len(placed)))
        for i in (i for i in order if answers[i]["outcome"] == "ok"):
            cold = placed[i].times(session, 1, turn.cold, flush=True)
            calls = max(1, int(np.ceil(_SHORTEST / max(min(cold), 1e-7))))
            answers[i]["cold"] += cold
            answers[i]["warm"] += placed[i].times(session, calls, turn.warm, flush=False)
    return answers
