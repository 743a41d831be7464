"""Building candidates as libraries: a few at a time, each within a time limit, in processes that may die of it."""

from __future__ import annotations

import queue
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...threads import most_threads
from ..point import Point
from ..task import Task
from .helper import Helper, HelperDied, HelperError, HelperTimeout
from .job import Measured
from .library import LibrarySpec, payload_of

START_LIMIT = 60.0
"""Seconds that a process may take to start and import the compiler, on top of its work."""
_BUILD = "gemmify.tuning.measure.library:build_pickled"


@dataclass(frozen=True)
class Built:
    """A candidate's library at `path` and how it is run; or, where there is none, the outcome in `failed`."""

    path: str
    spec: LibrarySpec | None
    failed: Measured | None
    seconds: float


class Builders:
    """Builds candidates for `target` (text), `count` at a time, each for at most `limit` seconds."""

    def __init__(self, target: str, limit: float, count: int = 0) -> None:
        self._target, self._limit = target, limit
        count = count or min(2, most_threads())
        self._helpers = [Helper({"TVM_NUM_THREADS": "1"}) for _ in range(count)]
        self._free: queue.SimpleQueue[Helper] = queue.SimpleQueue()
        for helper in self._helpers:
            self._free.put(helper)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="gemmify-build")

    def submit(self, task: Task, point: Point, path: Path) -> Future[Built]:
        """Begin to build a candidate as the library `path`."""
        return self._pool.submit(self._build, task, point, str(path))

    def close(self) -> None:
        """End everything that is under way."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for helper in self._helpers:
            helper.close()

    def _build(self, task: Task, point: Point, path: str) -> Built:
        helper, begun = self._free.get(), time.monotonic()

        def failed(outcome: str, why: str) -> Built:
            seconds = time.monotonic() - begun
            return Built(path, None, Measured(outcome, why, seconds_build=seconds), seconds)

        try:
            if not helper.alive:
                helper.call("gemmify.tuning.measure.helper:ready", limit=START_LIMIT)
                begun = time.monotonic()
            payload = payload_of(task, point)
            spec = helper.call(_BUILD, payload, self._target, path, limit=self._limit)
            return Built(path, spec, None, time.monotonic() - begun)
        except HelperTimeout:
            return failed("timeout", f"building took more than {self._limit:g} s")
        except HelperDied as err:
            return failed("build", f"the compiler crashed: {err}")
        except HelperError as err:
            return failed("memory" if err.kind == "MemoryError" else "build", f"{err.kind}: {err}")
        except Exception as err:  # an unknown key, sizes that it refuses, a lowering that cannot be sent
            return failed("build", f"{type(err).__name__}: {err}")
        finally:
            self._free.put(helper)
