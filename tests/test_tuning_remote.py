"""Measuring on other machines: TVM's tracker and servers on loopback, killed and started again in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemmify.errors import GemmifyError, InputError
from gemmify.tuning.measure.helper import Helper, HelperDied, HelperError, HelperTimeout
from gemmify.tuning.measure.probe import count_cores
from gemmify.tuning.measure.remote import RemoteMeasurer, parse_tracker
from gemmify.tuning.point import Point, knobs
from gemmify.tuning.task import Task
from lowering import Tile, conv2d
from lowering.epilogue import EpilogueOp
from schedules import host_target

TASK = Task(conv2d(16, 14, 14, 32, 3), (EpilogueOp("bias", 0), EpilogueOp("add", 1), EpilogueOp("relu")))
KEYS = ("direct", "im2col", "winograd-2", "kn2row", "mec", "implicit-gemm")


def points(count: int) -> list[Point]:
    tiles = [Tile(4, 16), Tile(6, 32), Tile(2, 16)]
    return [Point(KEYS[i % len(KEYS)], tiles[i // len(KEYS) % len(tiles)]) for i in range(count)]


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(*arguments: str) -> subprocess.Popen[bytes]:
    port = free_port()
    line = [sys.executable, "-m", *arguments, "--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 50)]
    environment = {**os.environ, "TVM_NUM_THREADS": "1"}
    process = subprocess.Popen(
        line, start_new_session=True, stdout=open("/tmp/E/srv.log","ab"), stderr=subprocess.STDOUT, env=environment
    )
    process.port = port  # type: ignore[attr-defined]
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
        self.address = f"127.0.0.1:{self.tracker.port}"  # type: ignore[attr-defined]
        self.servers: list[subprocess.Popen[bytes]] = []
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(parse_tracker(self.address))):
                return
            time.sleep(0.1)
        raise AssertionError("the tracker did not start")

    def add(self, key: str = "cpu") -> subprocess.Popen[bytes]:
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
    count, found, addresses = 12, {}, set()
    with RemoteMeasurer("llvm", 1, tracker.address, "cpu", workers=2, device_limit=60, say=lambda _: None) as measurer:
        heard = measurer._heard

        def listen(tried, seconds, news):  # type: ignore[no-untyped-def]
            if news[0] == "setup":
                addresses.add(news[1])
            return heard(tried, seconds, news)

        measurer._heard = listen  # type: ignore[method-assign]
        for index, measured in measurer.measure(TASK, points(count)):
            found[index] = measured
            if len(found) == 2:
                end(first)
                tracker.add()
        machine = measurer.machine()
        while len(addresses) < 3:  # the new server may have started too late for the first batch
            found.update(measurer.measure(TASK, points(count)))
    assert sorted(found) == list(range(count))
    assert {m.outcome for m in found.values()} == {"ok"}, [m.why for m in found.values()]
    assert all(len(m.cold) >= 5 and len(m.warm) >= 5 and min(m.cold + m.warm) > 0 for m in found.values())
    assert all(m.error is not None and 0 < m.error < 1e-4 for m in found.values())
    assert (machine.threads, machine.mcpu) == (1, str(host_target().attrs.get("mcpu", "")))
    assert machine.cpu and not machine.cpu.startswith("key:")
