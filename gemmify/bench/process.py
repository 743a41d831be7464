"""The parent's side of a worker: start it, ask it, and turn every way in which it can fail into one clear error."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gemmify.errors import GemmifyError

COMMAND = (sys.executable, "-m", "gemmify.bench.worker")
_ROOT = Path(__file__).resolve().parents[2]


class WorkerProcess:
    """A running `gemmify.bench.worker`; a context manager, so that no worker outlives its measurement."""

    def __init__(self, engine: str, command: Sequence[str] = COMMAND, timeout: float = 900.0) -> None:
        self.engine, self._timeout = engine, timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if p)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._pending = b""
        self._tethered = self._stopped = False

    def pause(self) -> None:
        """Stop the process until the next request: some thread pools spin for long after their last task.

        Done only where the process has said that it dies with this one; a stopped orphan would stay for ever.
        """
        if self._tethered and self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)
            self._stopped = True

    def _resume(self) -> None:
        if self._stopped:
            self._process.send_signal(signal.SIGCONT)
            self._stopped = False

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its reply. Raises GemmifyError where the engine fails, dies or says nothing."""
        assert self._process.stdin is not None
        self._resume()
        with contextlib.suppress(OSError):  # where it is dead, the missing reply below says how it died
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        line = self._read_line(do)
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise GemmifyError(f"engine {self.engine}: the reply to {do!r} is not JSON: {line[:80]!r}") from error
        if "error" in reply:
            raise GemmifyError(f"engine {self.engine} failed in {do!r}: {reply['error']}")
        self._tethered = bool(reply.get("tethered", self._tethered))
        return reply

    def _read_line(self, do: str) -> bytes:
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + self._timeout
        while b"\n" not in self._pending:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._process.kill()
                self.close()
                raise GemmifyError(f"engine {self.engine}: no answer to {do!r} within {self._timeout:g} s; stopped it")
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                ending = f"its process ended {self._ending()} during {do!r}{self._said()}"
                raise GemmifyError(f"engine {self.engine}: {ending}")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "without an exit status"
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"

    def _said(self) -> str:
        """The last line that the process wrote on standard error."""
        self._errors.seek(0)
        lines = self._errors.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        return f"; it said: {lines[-1].strip()[:300]}" if lines else ""

    def close(self) -> None:
        """End the process, by force where it does not end by itself."""
        self._resume()
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # the end of its input ends it
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
