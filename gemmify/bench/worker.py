"""One engine in a process of its own, told what to do by JSON lines: `python -m gemmify.bench.worker`.

Requests come on standard input, one object a line; each is answered by one line on the original standard output:

    {"do": "load", "engine": "openvino", "model": PATH, "threads": 2, "inputs": NPZ}
                                           -> {"version": ..., "seconds": ..., "tethered": ...}
    {"do": "burst", "runs": 5, "drop": 1}  -> {"seconds": [...], "idle_cpu": ..., "idle": ...}
    {"do": "outputs", "path": NPZ}         -> {"count": ...}
    {"do": "profile", "repeat": 5}         -> {"kernels": [[name, seconds], ...]}
    {"do": "quit"}

A request that fails is answered by `{"error": TEXT}` and the process goes on; the end of the input ends it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any, TextIO

import numpy as np

from gemmify.bench.peers import ENGINES, Engine

_PR_SET_PDEATHSIG = 1


def tether() -> bool:
    """Let the system kill this process when its parent ends, even while it is stopped; False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    parent = os.getppid()
    failed = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return not failed and os.getppid() == parent


class Worker:
    """The state between requests: the engine, its inputs, and how busy the process was since the last answer."""

    def __init__(self, tethered: bool = False) -> None:
        self.tethered = tethered
        self.engine: Engine | None = None
        self.inputs: dict[str, np.ndarray] = {}
        self._left = (time.perf_counter(), time.process_time())

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request; every failure becomes an `error` text."""
        idle = time.perf_counter() - self._left[0]
        idle_cpu = time.process_time() - self._left[1]
        try:
            reply = self._do(request)
        except Exception as error:  # an engine may raise anything: the parent decides what it means
            text = " ".join(str(error).split())
            reply = {"error": f"{type(error).__name__}: {text[:600]}"}
        self._left = (time.perf_counter(), time.process_time())
        return {**reply, "idle": idle, "idle_cpu": idle_cpu}

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        do = request.get("do")
        if do == "load":
            return self._load(request)
        if self.engine is None:
            raise RuntimeError(f"{do!r} needs a loaded engine: send a load request first")
        if do == "burst":
            return {"seconds": self._burst(self.engine, int(request["runs"]), int(request["drop"]))}
        if do == "outputs":
            outputs = self.engine.run(self.inputs)
            np.savez(request["path"], *[np.asarray(o) for o in outputs])
            return {"count": len(outputs)}
        if do == "profile" and hasattr(self.engine, "profile"):
            return {"kernels": self.engine.profile(self.inputs, int(request["repeat"]))}
        raise RuntimeError(f"unknown request {do!r}")

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        with np.load(request["inputs"]) as data:
            self.inputs = {name: data[name] for name in data.files}
        self.engine = ENGINES[request["engine"]][0](request["model"], int(request["threads"]))
        return {"version": self.engine.version, "seconds": time.perf_counter() - start, "tethered": self.tethered}

    def _burst(self, engine: Engine, runs: int, drop: int) -> list[float]:
        """Seconds of `runs` inferences after `drop` that are not counted: caches and sleeping threads wake up."""
        times = []
        for index in range(runs + drop):
            start = time.perf_counter()
            engine.run(self.inputs)
            if index >= drop:
                times.append(time.perf_counter() - start)
        return times


def serve(requests: TextIO, replies: TextIO, tethered: bool = False) -> None:
    """Answer each line of `requests` by a line on `replies` until the input ends or a quit request comes."""
    worker = Worker(tethered)
    for line in requests:
        request = json.loads(line)
        if request.get("do") == "quit":
            return
        replies.write(json.dumps(worker.answer(request)) + "\n")
        replies.flush()


def main() -> None:
    # What a library prints must not mix with the replies: they keep the old standard output, all else goes to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, replies, tether())


if __name__ == "__main__":
    main()
