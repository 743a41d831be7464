"""A process of our own that does one piece of work after another, and that may die or hang without harm.

    python -c "..." -> main(requests, answers, life, folder)

The parent sends (function as "module:name", arguments) and waits for what comes back, for a limited time. When the
parent is gone, however it went, the helper ends by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import lowering

_START = "from gemmify.tuning.measure.helper import main; import sys; main(*map(int, sys.argv[1:4]), sys.argv[4])"
_LONGEST = 600  # characters of an exception's message
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(lowering.__file__)))


class HelperDied(Exception):
    """The process ended in the middle of the work; the message says how."""


class HelperTimeout(Exception):
    """The work took longer than its limit; the process was killed."""


class HelperError(Exception):
    """The work raised; the message is the exception's, `kind` its type's name."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Helper:
    """One such process. It is started by the first call and again after it died. Calls must come from one thread.

    Where the parent is killed the process removes `folder` at its end: nobody else does.
    """

    def __init__(self, environment: dict[str, str] | None = None, folder: str = "") -> None:
        self._folder = folder
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def call(
        self, function: str, *arguments: Any, limit: float, news: Callable[[Any], float | None] | None = None
    ) -> Any:
        """The value of `function(tell, *arguments)` there. `limit` is in seconds; the function may `tell` news of its
        work, on which `news` answers a new limit from now on, or None to leave it. Raises HelperDied, HelperTimeout,
        HelperError."""
        if self._closed:
            raise HelperDied("it was closed")
        if not self.alive:
            self._start()
        end = time.monotonic() + limit
        try:
            self._requests.send((function, arguments))
            while True:
                if not self._answers.poll(max(0.0, end - time.monotonic())):
                    self.kill()
                    raise HelperTimeout(f"no answer within {limit:g} s")
                kind, value = self._answers.recv()
                if kind == "value":
                    return value
                if kind == "raised":
                    raise HelperError(*value)
                again = news(value) if news is not None else None
                if again is not None:
                    limit, end = again, time.monotonic() + again
        except (EOFError, OSError) as err:
            raise HelperDied(self._how()) from err
        except HelperError:
            raise
        except BaseException:
            self.kill()  # else its next answer would be taken for that of another call
            raise

    @property
    def alive(self) -> bool:
        """Whether the process runs already."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End the process at once; the next call starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for connection in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                connection.close()
        os.close(self._life)

    def close(self) -> None:
        """End the process for good; a call that is under way, or comes later, raises HelperDied."""
        self._closed = True
        self.kill()

    def _how(self) -> str:
        status = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(2.0)
        self.kill()
        if status is not None and status < 0:
            with contextlib.suppress(ValueError):
                return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process ended with status {status}"

    def _start(self) -> None:
        self.kill()
        their_requests, requests = os.pipe()
        answers, their_answers = os.pipe()
        their_life, self._life = os.pipe()
        theirs = (their_requests, their_answers, their_life)
        path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, theirs), self._folder],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", **self._environment},
        )
        for descriptor in theirs:
            os.close(descriptor)
        self._requests = Connection(requests, readable=False)
        self._answers = Connection(answers, writable=False)


def ready(_tell: Any) -> None:
    """Import what building and measuring need."""
    from . import device, library

    del device, library


def main(requests: int, answers: int, life: int, folder: str) -> None:
    """Serve until the requests end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone decides

    def watch() -> None:
        os.read(life, 1)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    asked, told = Connection(requests, writable=False), Connection(answers, readable=False)
    while True:
        try:
            function, arguments = asked.recv()
        except EOFError:
            return
        module, _, name = function.partition(":")
        try:
            work = getattr(importlib.import_module(module), name)
            told.send(("value", work(lambda news: told.send(("news", news)), *arguments)))
        except Exception as err:
            text = " ".join(str(err).split())[:_LONGEST] or "without a message"
            told.send(("raised", (type(err).__name__, text)))
