"""Measuring on other machines: TVM's tracker and servers on loopback, killed and started again in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tvm import rpc

from gemmify.errors import GemmifyError, InputError
from gemmify.tuning.measure.helper import Helper, HelperDied, HelperError, HelperTimeout
from gemmify.tuning.measure.probe import count_cores
from gemmify.tuning.measure.remote import RemoteMeasurer
from gemmify.tuning.measure.tracker import parse_tracker
from gemmify.tuning.point import Point
from gemmify.tuning.task import Task
from lowering import Tile, conv2d
from lowering.epilogue import EpilogueOp
from schedules import host_target

TASK = Task(conv2d(16, 14, 14, 32, 3), (EpilogueOp("bias", 0), EpilogueOp("add", 1), EpilogueOp("relu")))
KEYS = ("direct", "im2col", "kn2row", "implicit-gemm")


def points(count: int) -> list[Point]:
    """Of both layouts, with and without workspaces."""
    tiles = [Tile(2, 16), Tile(2, 32), Tile(1, 16)]
    return [Point(KEYS[i % len(KEYS)], tiles[i // len(KEYS) % len(tiles)]) for i in range(count)]


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(*arguments: str) -> Any:
    port = free_port()
    line = [sys.executable, "-m", *arguments, "--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 50)]
    environment = {**os.environ, "TVM_NUM_THREADS": "1"}
    process = subprocess.Popen(
        line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    process.port = port
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """As if the machine lost its power: the server, and all that it forked, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Farm:
    """A tracker and its servers."""

    def __init__(self) -> None:
        self.tracker = start("tvm.exec.rpc_tracker")
        self.address = f"127.0.0.1:{self.tracker.port}"
        self.servers: list[Any] = []
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                contextlib.closing(socket.create_connection(parse_tracker(self.address))),
            ):
                return
            time.sleep(0.1)
        raise AssertionError("the tracker did not start")

    def add(self, key: str = "cpu") -> Any:
        self.servers.append(start("tvm.exec.rpc_server", "--tracker", self.address, "--key", key))
        return self.servers[-1]

    def close(self) -> None:
        for process in (*self.servers, self.tracker):
            end(process)


@pytest.fixture(scope="module")
def tracker() -> Iterator[Farm]:
    made = Farm()
    yield made
    made.close()


def test_a_server_is_killed_and_another_comes_in_the_middle(tracker: Farm) -> None:
    first, _ = tracker.add(), tracker.add()
    count, found, addresses, retried = 12, {}, set(), []
    with RemoteMeasurer("llvm", 1, tracker.address, "cpu", workers=2, device_limit=60, say=lambda _: None) as measurer:
        heard = measurer._heard

        def listen(tried, seconds, news):  # type: ignore[no-untyped-def]
            limit = heard(tried, seconds, news)
            if news[0] == "setup":
                addresses.add(news[1])
                retried.extend(tried.killed + tried.failed)
            if news[0] == "running" and tried.address.endswith(f":{first.port}") and first.poll() is None:
                end(first)  # a candidate is on its way to it
                tracker.add()
            return limit

        measurer._heard = listen  # type: ignore[method-assign]
        for index, measured in measurer.measure(TASK, points(count)):
            assert index not in found
            found[index] = measured
        machine = measurer.machine()
        while len(addresses) < 3:  # the new server may have started too late for the first batch
            found.update(measurer.measure(TASK, points(count)))
    assert sorted(found) == list(range(count))
    assert retried == [f"127.0.0.1:{first.port}"], "the trial of the server that was killed went to another one"
    assert {m.outcome for m in found.values()} == {"ok"}, [m.why for m in found.values()]
    assert all(len(m.cold) >= 5 and len(m.warm) >= 5 and min(m.cold + m.warm) > 0 for m in found.values())
    assert all(m.error is not None and 0 < m.error < 1e-4 for m in found.values())
    assert (machine.threads, machine.mcpu) == (1, str(host_target().attrs.get("mcpu", "")))
    assert machine.cpu and not machine.cpu.startswith("key:")


def test_finals_are_taken_in_turns_on_one_device(tracker: Farm) -> None:
    tracker.add()
    bad = Point("winograd-4", Tile(5, 16))
    with RemoteMeasurer("llvm", 1, tracker.address, "cpu", device_limit=60, say=lambda _: None) as measurer:
        first, wrong, second = measurer.finals(TASK, [points(4)[0], bad, points(4)[3]], 3)
        with pytest.raises(InputError, match="at least 1 is required"):
            measurer.finals(TASK, points(1), 0)
    assert (first.outcome, wrong.outcome, second.outcome) == ("ok", "build", "ok")
    assert len(first.cold) == len(second.cold) == 12
    assert "divides" in wrong.why


@pytest.mark.slow
def test_what_candidates_do_to_a_device_is_told_apart(tracker: Farm, tmp_path: Path) -> None:
    """A wrong result, a hang and a crash, each by a lowering of its own; the devices outlive the first two."""
    tracker.add("bad")
    seen: list[str] = []
    options = {"device_limit": 90.0, "run_limit": 1.0, "say": seen.append}
    with RemoteMeasurer("llvm", 1, tracker.address, "bad", **options) as measurer:  # type: ignore[arg-type]
        build = measurer._builders._build
        assert build(TASK, Point("no-such-lowering", Tile(2, 16)), str(tmp_path / "a.so")).failed
        for name, outcome in (("wrong", "wrong"), ("hang", "timeout"), ("crash", "crash")):
            measurer._builders._build = spoiled(build, name)  # type: ignore[method-assign]
            if name == "crash":
                tracker.add("bad")  # TVM's server ends when a session of it crashes
            ((_, measured),) = measurer.measure(TASK, points(1))
            assert measured.outcome == outcome, (name, measured)
            assert measured.why and not measured.cold and not measured.warm


def spoiled(build, name):  # type: ignore[no-untyped-def]
    """The builder, with the entry of its library replaced by one that does what `name` says."""
    sources = {
        "wrong": "return 0;",
        "hang": "for (volatile int i = 1; i;) {} return 0;",
        "crash": "__builtin_trap(); return 0;",
    }

    def made(task, point, path):  # type: ignore[no-untyped-def]
        built = build(task, point, path)
        code, shell = Path(path + ".c"), Path(path + ".shell.so")
        os.rename(path, path + ".real.so")
        symbols = ["layer", *(call.symbol for call in (*built.spec.weights, *built.spec.calls))]
        lines = [f"int __tvm_ffi_{s}(void* a, void* b, int n, void* r) {{ {sources[name]} }}" for s in symbols]
        if name != "wrong":
            lines = [line if "_layer" in line else line.replace(sources[name], "return 0;") for line in lines]
        code.write_text("\n".join(lines))
        subprocess.run(["cc", "-shared", "-fPIC", "-O0", "-o", str(shell), str(code)], check=True)
        os.rename(shell, path)
        return built

    return made


def test_no_device_ends_in_words(tracker: Farm) -> None:
    said: list[str] = []
    with RemoteMeasurer("llvm", 1, tracker.address, "nobody", device_limit=4, say=said.append) as measurer:
        waiting = measurer.measure(TASK, points(2))
        with pytest.raises(GemmifyError, match=r"no device of key nobody .*rpc_server --tracker"):
            next(waiting)
    assert len(said) == 1 and "knows no device of key nobody" in said[0]


def test_waiting_ends_with_the_time_and_names_the_keys_that_are_there(tracker: Farm) -> None:
    tracker.add("board")
    session, until = rpc.connect_tracker(*parse_tracker(tracker.address)), time.monotonic() + 60
    while all(server["key"] != "server:board" for server in session.summary()["server_info"]):
        assert time.monotonic() < until, "the server did not start"
        time.sleep(0.2)
    session.close()
    said: list[str] = []
    with RemoteMeasurer("llvm", 1, tracker.address, "bord", say=said.append) as measurer:
        begun = measurer.deadline = time.monotonic()
        with pytest.raises(GemmifyError, match="what was measured is in the log") as raised:
            measurer.machine()
        assert time.monotonic() - begun < 60
    assert "before the time was over" in str(raised.value)
    for text in (said[-1], str(raised.value)):
        assert "or give --key one of those that it has: " in text and "board" in text


def test_tables_are_filled_on_the_device(tracker: Farm) -> None:
    tracker.add("tables")
    tables = [Point("precomp-gemm", Tile(2, 16)), Point("indirect-gemm", Tile(2, 16))]
    with RemoteMeasurer("llvm", 1, tracker.address, "tables", device_limit=60, say=lambda _: None) as measurer:
        found = dict(measurer.measure(TASK, tables))
    assert [found[i].outcome for i in range(2)] == ["ok", "ok"], [m.why for m in found.values()]


def test_a_device_that_lacks_the_features_is_not_used(tracker: Farm) -> None:
    tracker.add("old")
    with RemoteMeasurer("llvm", 1, tracker.address, "old", device_limit=6, say=lambda _: None) as measurer:
        measurer._needs = ("avx512_of_the_future",)
        with pytest.raises(GemmifyError, match="its CPU lacks avx512_of_the_future, which --target asks for"):
            measurer.machine()
        measurer._needs = ()
        assert measurer.machine().cores >= 1


@pytest.mark.parametrize("address", ["", "host", "host:", ":9190", "host:0", "host:99999", "host:x"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InputError, match="--tracker takes HOST:PORT"):
        RemoteMeasurer("llvm", 1, address, "cpu")


def test_nothing_answers_or_something_else_does() -> None:
    with pytest.raises(GemmifyError, match=r"no tracker answers at .*start one with"):
        RemoteMeasurer("llvm", 1, f"127.0.0.1:{free_port()}", "cpu")
    with contextlib.closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        def answer() -> None:
            conn, _ = other.accept()
            conn.sendall(b"HTTP")
            conn.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(GemmifyError, match=r"no TVM tracker|no tracker answers"):
            RemoteMeasurer("llvm", 1, f"127.0.0.1:{port}", "cpu")
        thread.join()


@pytest.mark.parametrize("key", ["", "a b", "a:b"])
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(InputError, match="--key takes the name"):
        RemoteMeasurer("llvm", 1, "127.0.0.1:1", key)


def test_a_helper_may_die_hang_and_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    helper = Helper()
    try:
        with pytest.raises(HelperError, match="boom") as raised:
            helper.call("test_tuning_remote:raises", limit=60)
        assert raised.value.kind == "KeyError"
        first = helper._process
        with pytest.raises(HelperDied, match="SIGABRT"):
            helper.call("test_tuning_remote:aborts", limit=60)
        with pytest.raises(HelperTimeout):
            helper.call("test_tuning_remote:sleeps", limit=1)
        assert helper.call("test_tuning_remote:answers", 3, limit=60) == 6
        assert helper._process is not first
    finally:
        helper.kill()


def test_a_helper_ends_with_its_parent() -> None:
    code = """
import sys, threading
from gemmify.tuning.measure.helper import Helper
helper = Helper()
helper._start()
print(helper._process.pid, flush=True)
helper.call("test_tuning_remote:sleeps", limit=60)
"""
    folder = os.path.dirname(__file__)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": folder}
    )
    assert parent.stdout is not None
    helper = int(parent.stdout.readline())
    os.kill(helper, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{helper}/cmdline").exists() and Path(f"/proc/{helper}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the helper outlived its parent"
        time.sleep(0.05)


def raises(_tell: object) -> None:
    raise KeyError("boom")


def aborts(_tell: object) -> None:
    os.abort()


def sleeps(_tell: object) -> None:
    time.sleep(60)


def answers(_tell: object, number: int) -> int:
    return 2 * number


def test_cores_of_a_device() -> None:
    info = "processor : 0\nsiblings : 8\ncpu cores : 4\n"
    assert count_cores(info, "Cpus_allowed_list:\t0-3,8-11\n", "max 100000") == 4
    assert count_cores(info, "Cpus_allowed_list:\t0-3,8-11\n", "250000 100000") == 2
    assert count_cores("", "Cpus_allowed_list:\t0\n", "") == 1
    assert count_cores(info, "", "") is None
