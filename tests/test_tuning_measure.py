"""Measuring: every candidate costs one trial at most, and no process outlives what started it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tvm import te, tirx

import lowering
from gemmify.errors import GemmifyError, InputError
from gemmify.host import usable_cpus
from gemmify.layer_reference import random_arrays
from gemmify.tuning.measure import check, sampling
from gemmify.tuning.measure.job import Measured
from gemmify.tuning.measure.local import LocalMeasurer
from gemmify.tuning.measure.processes import Child
from gemmify.tuning.point import Point, knobs
from gemmify.tuning.task import Task
from lowering import Stage, Tile, conv2d
from lowering.epilogue import EpilogueOp

THREADS = min(2, usable_cpus())
BIAS = EpilogueOp("bias", 0)
TASK = Task(conv2d(8, 10, 12, 24, 3), (BIAS, EpilogueOp("relu")))
GOOD = Point("implicit-gemm", Tile(4, 16))
LIMIT = 512 << 20
FIRST, SECOND = signal.SIGSEGV.value, signal.SIGABRT.value


class Toy(lowering.ImplicitGemm):
    """An implicit GEMM whose `build` goes wrong in one way."""

    fault: Any = None

    def build(self, problem: Any, tile: Tile, epilogue: Any = lowering.base.no_epilogue) -> tuple[Stage, ...]:
        fault = type(self).fault

        def spoiled(value: Any, index: Any) -> Any:
            return epilogue(fault(value), index)

        return super().build(problem, tile, spoiled)


def called(name: str, *arguments: int) -> Any:
    """A fault: every output element calls a function of the C library."""
    return staticmethod(lambda value: value + tirx.Cast("float32", tirx.call_extern("int32", name, *arguments)))


class Segfault(Toy):
    key, fault = "toy-segfault", called("raise", FIRST)


class Aborts(Toy):
    key, fault = "toy-aborts", called("raise", SECOND)


class Leaves(Toy):
    key, fault = "toy-leaves", called("_exit", 3)


class Hangs(Toy):
    key, fault = "toy-hangs", called("pause")


class Wrong(Toy):
    key, fault = "toy-wrong", staticmethod(lambda value: value * tirx.const(1.001, "float32"))


class NotFinite(Toy):
    key, fault = "toy-not-finite", staticmethod(lambda value: value * tirx.const(1e38, "float32") * 1e38)


class Unbuilt(Toy):
    key = "toy-unbuilt"

    def build(self, problem: Any, tile: Tile, epilogue: Any = None) -> tuple[Stage, ...]:
        raise ValueError("this form has no code")


class Killed(Toy):
    key = "toy-killed"

    def build(self, problem: Any, tile: Tile, epilogue: Any = None) -> tuple[Stage, ...]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Slow(Toy):
    key = "toy-slow"

    def build(self, problem: Any, tile: Tile, epilogue: Any = None) -> tuple[Stage, ...]:
        time.sleep(60)
        raise AssertionError


class Hungry(Toy):
    """Its first stage is a workspace of 4 GiB that nobody reads."""

    key, fault = "toy-hungry", staticmethod(lambda value: value)

    def build(self, problem: Any, tile: Tile, epilogue: Any = lowering.base.no_epilogue) -> tuple[Stage, ...]:
        def fill(data: te.Tensor) -> te.Tensor:
            return te.compute((1 << 20, 1024), lambda i, j: data[0, 0, 0, 0])

        return (Stage("heap", ("data",), fill, "workspace"), *super().build(problem, tile, epilogue))


class Greedy(Toy):
    """Allocates while it is built."""

    key = "toy-greedy"

    def build(self, problem: Any, tile: Tile, epilogue: Any = None) -> tuple[Stage, ...]:
        np.ones(1 << 30, "float64")
        raise AssertionError


TOYS = (Segfault, Aborts, Leaves, Hangs, Wrong, NotFinite, Unbuilt, Killed, Slow, Hungry, Greedy)


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with lowering.registered(*(toy() for toy in TOYS)):
        yield


@pytest.fixture(scope="module")
def measurer() -> Iterator[LocalMeasurer]:
    with LocalMeasurer("llvm", THREADS, build_limit=8, run_limit=2, memory_limit=LIMIT) as made:
        yield made


def toy(kind: type[Toy]) -> Point:
    return Point(kind.key, GOOD.tile)


def outcomes(measurer: LocalMeasurer, points: list[Point], **options: Any) -> list[Measured]:
    found = dict(measurer.measure(TASK, points, **options))
    assert sorted(found) == list(range(len(points)))
    return [found[i] for i in range(len(points))]


def test_good_candidates_are_timed_warm_and_cold(measurer: LocalMeasurer) -> None:
    points = [GOOD, Point("winograd-2", Tile(5, 16)), Point("im2col", Tile(4, 16)), Point("im2row", Tile(3, 16))]
    for found in outcomes(measurer, points):
        assert found.ok and found.why == ""
        assert len(found.cold) >= sampling.TRIAL.least and len(found.warm) >= sampling.TRIAL.least
        assert all(0 < t < 1 for t in (*found.warm, *found.cold))
        assert found.error is not None and 0 < found.error < 1e-4
        assert found.seconds_build > 0 and found.seconds_measure > 0


@pytest.mark.parametrize(
    ("kind", "outcome", "why"),
    [
        (Segfault, "crash", "SIGSEGV while running"),
        (Aborts, "crash", "SIGABRT while running"),
        (Leaves, "crash", "exit status 3 while running"),
        (Hangs, "timeout", "running took more than 2 s"),
        (Wrong, "wrong", "of the largest output"),
        (NotFinite, "wrong", "output elements are not finite"),
        (Unbuilt, "build", "ValueError: this form has no code"),
        (Killed, "memory", "killed by the system while building (SIGKILL)"),
        (Hungry, "memory", ""),
        (Greedy, "memory", "MemoryError"),
    ],
)
def test_failure_costs_one_trial(measurer: LocalMeasurer, kind: type[Toy], outcome: str, why: str) -> None:
    bad, good = outcomes(measurer, [toy(kind), GOOD])
    assert bad.outcome == outcome and why in bad.why, bad
    assert bad.warm == bad.cold == ()
    assert good.ok


def test_build_that_takes_too_long_is_ended() -> None:
    with LocalMeasurer("llvm", THREADS, build_limit=3) as measurer:
        slow, good = outcomes(measurer, [toy(Slow), GOOD])
    assert slow.outcome == "timeout" and slow.why == "building took more than 3 s"
    assert good.ok


def test_unknown_key_and_bad_size_are_build_failures(measurer: LocalMeasurer) -> None:
    unknown, bad, good = outcomes(
        measurer, [Point("no-such", Tile(4, 16)), Point("implicit-gemm", Tile(4, 16), knobs({"no_size": 3})), GOOD]
    )
    assert unknown.outcome == "build" and "no-such" in unknown.why
    assert bad.outcome == "build" and "no_size" in bad.why
    assert good.ok


def test_a_layer_that_the_lowering_refuses_is_a_build_failure(measurer: LocalMeasurer) -> None:
    task = Task(conv2d(8, 9, 9, 8, 3, s=2))
    ((_, found),) = measurer.measure(task, [Point("winograd-4", Tile(4, 16))])
    assert found.outcome == "build" and "stride" in found.why


def test_results_come_as_they_are_known(measurer: LocalMeasurer) -> None:
    results = measurer.measure(TASK, [toy(Unbuilt), GOOD, GOOD])
    assert next(results)[0] == 0
    results.close()
    assert not measurer._live
    assert outcomes(measurer, [GOOD])[0].ok


def test_those_built_first_are_timed_first(measurer: LocalMeasurer, monkeypatch: pytest.MonkeyPatch) -> None:
    measurer.prepare(TASK)
    processes, fork, settle = measurer._processes, measurer._processes.fork, measurer._settle
    children: list[Child] = []

    def forked(payload: bytes) -> Child:
        children.append(fork(payload))
        if len(children) == 1:
            processes.signal(children[0], "stop")
        return children[-1]

    def settled(trial: Any, *arguments: Any) -> Any:
        if trial.index == 1:
            processes.signal(children[0], "continue")
        return settle(trial, *arguments)

    monkeypatch.setattr(measurer, "_builders", 2)
    monkeypatch.setattr(processes, "fork", forked)
    monkeypatch.setattr(measurer, "_settle", settled)
    found = list(measurer.measure(TASK, [GOOD, toy(Segfault)]))
    assert [(index, measured.outcome) for index, measured in found] == [(1, "crash"), (0, "ok")]


def test_a_slow_candidate_is_given_up(measurer: LocalMeasurer) -> None:
    (found,) = outcomes(measurer, [GOOD], give_up=1e-9)
    assert found.ok and len(found.cold) == 2 and len(found.warm) == 1


def test_finals_take_turns(measurer: LocalMeasurer) -> None:
    first, bad, second = measurer.finals(TASK, [GOOD, toy(Segfault), Point("im2row", Tile(3, 16))], 4)
    assert bad.outcome == "crash"
    for found in (first, second):
        assert found.ok and len(found.cold) >= 4 * sampling.TURN.least and len(found.warm) >= 4 * sampling.TURN.least
    with pytest.raises(InputError, match="at least 1 is required"):
        measurer.finals(TASK, [GOOD], 0)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_dtypes_and_operands(measurer: LocalMeasurer, dtype: str) -> None:
    task = Task(conv2d(8, 7, 9, 16, 3, dtype=dtype), (BIAS, EpilogueOp("add", 1), EpilogueOp("relu")))
    points = [Point(key, Tile(3, 8)) for key in ("implicit-gemm", "im2col", "indirect-gemm")]
    for _, found in measurer.measure(task, points):
        assert found.ok, found


def test_the_server_is_started_again(measurer: LocalMeasurer) -> None:
    assert outcomes(measurer, [GOOD])[0].ok
    os.kill(measurer._processes._process.pid, signal.SIGKILL)
    assert [found.ok for found in outcomes(measurer, [GOOD, GOOD])] == [True, True]


def test_arrays_that_cannot_be_made_are_an_error(measurer: LocalMeasurer) -> None:
    with pytest.raises(GemmifyError, match=r"arrays and reference were not made: MemoryError"):
        measurer.prepare(Task(lowering.DenseProblem(n=1, c=1 << 20, m=1 << 20)))
    assert outcomes(measurer, [GOOD])[0].ok


def test_target_and_threads_are_checked() -> None:
    with pytest.raises(InputError, match="aarch64"):
        LocalMeasurer({"kind": "llvm", "mtriple": "aarch64-linux-gnu"}, 1)
    with pytest.raises(InputError, match="threads"):
        LocalMeasurer("llvm", 0)


def test_tasks_are_dropped_for_room() -> None:
    with LocalMeasurer("llvm", THREADS) as measurer:
        measurer.prepare(TASK)
        (first,) = measurer._folder.glob("task*")
        measurer._arrays.room = 1
        measurer.prepare(Task(conv2d(4, 5, 5, 4, 3)))
        assert not first.exists() and len(list(measurer._folder.glob("task*"))) == 1
        assert outcomes(measurer, [GOOD])[0].ok


def test_arrays_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    check.write_arrays(TASK, tmp_path, 3)
    data, weight = random_arrays(TASK.problem, 3)
    found = check.read_arrays(tmp_path)
    assert np.array_equal(found.data, data) and np.array_equal(found.weight, weight)
    assert len(found.operands) == 1 and found.result.dtype == np.float64


def test_samples_stop_at_the_limit_and_when_hopeless() -> None:
    log: list[str] = []
    subject = sampling.Subject(lambda: log.append("call"), lambda: log.append("cool"))
    warm, cold = sampling.sample(subject, sampling.TRIAL, 0.0, None)
    assert len(cold) == 1 and len(warm) == 1 and log[:2] == ["cool", "call"]
    warm, cold = sampling.sample(subject, sampling.Amount(cold=7, warm=3, cold_budget=9, warm_budget=9), 60.0, None)
    assert len(cold) == 7 and len(warm) == 3


# --- what is left when this process goes away ---------------------------------------------------------------------

_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import lowering, psutil
import test_tuning_measure as t
from gemmify.tuning.measure.local import LocalMeasurer
lowering.register(t.Hangs())
with LocalMeasurer("llvm", t.THREADS, build_limit=60, run_limit=60) as measurer:
    measurer.prepare(t.TASK)
    measurer._builders = 1  # two at once may be done in either order, and the first one that is built is run first
    found = measurer.measure(t.TASK, [t.GOOD, t.toy(t.Hangs)])
    index, good = next(found)
    print(index, good.outcome, measurer._folder, flush=True)
    next(found)
"""


def _started() -> tuple[subprocess.Popen[str], Path, list[psutil.Process]]:
    """A process that measures a candidate which hangs, its folder, and all processes below it."""
    script = _SCRIPT.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    )
    assert process.stdout is not None
    try:
        index, outcome, folder = process.stdout.readline().split()
        assert (index, outcome) == ("0", "ok")
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) == 2, "the server and the candidate that hangs"
    except BaseException:
        process.kill()
        raise
    return process, Path(folder), below


def _gone(below: list[psutil.Process], folder: Path) -> bool:
    _, alive = psutil.wait_procs(below, timeout=10)
    end = time.monotonic() + 5
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return not alive and not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left(number: signal.Signals) -> None:
    process, folder, below = _started()
    process.send_signal(number)
    process.wait(20)
    assert process.returncode != 0
    assert _gone(below, folder)


def test_candidates_die_with_the_server() -> None:
    process, folder, below = _started()
    server = next(p for p in below if p.ppid() == process.pid)
    candidate = next(p for p in below if p != server)
    server.kill()
    _, alive = psutil.wait_procs([candidate], timeout=10)
    process.kill()
    process.wait(10)
    shutil.rmtree(folder, ignore_errors=True)  # both who would have removed it were killed
    assert not alive


_STARTS = """
import os, sys
from pathlib import Path
from gemmify.tuning.measure.processes import Processes
from gemmify.tuning.measure.arrays import private_folder
from gemmify.tuning.measure.server import Config
folder = private_folder()
print(folder, flush=True)
Processes(Config("llvm", 1, 1 << 20, str(folder)))
"""


def test_nothing_is_left_of_a_server_whose_parent_ends_while_it_starts() -> None:
    process = subprocess.Popen([sys.executable, "-c", _STARTS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    end = time.monotonic() + 60
    while not (below := psutil.Process(process.pid).children()) and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait(20)
    assert below and folder.exists()
    psutil.wait_procs(below, timeout=60)
    assert not folder.exists()
