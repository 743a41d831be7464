"""The parent of the processes that touch the GPU: it hands them entries, keeps what they answer, and starts another one
where one crashes or hangs, so that no kernel can take the rest of the results with it."""

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
from collections.abc import Callable, Iterator
from typing import Any

START_SECONDS = 180.0
"""A process may take so long to import PyTorch and to reach the GPU."""
MOST_STARTS = 25
"""Processes that a section may use up."""
Entry = dict[str, Any]
Keep = Callable[[Entry, dict[str, Any]], None]


class Refused(Exception):
    """This machine cannot run the bundle; the text says why."""


class Child:
    """A running process of `child.py` with its request sent."""

    def __init__(self, folder: str, request: dict[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        line = [sys.executable, "-m", f"{__package__}.child"]
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        for _ in range((__package__ or "").count(".")):
            root = os.path.dirname(root)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        self.process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({**request, "folder": folder}).encode())
            self.process.stdin.close()
        self._pipe, self._pending, self._open = self.process.stdout.fileno(), b"", True

    def line(self, limit: float) -> dict[str, Any] | None:
        """The next answer; None where the process has ended. TimeoutError after `limit` seconds."""
        end = time.monotonic() + limit
        while b"\n" not in self._pending:
            if not self._open:
                return None
            if not select.select([self._pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(self._pipe, 1 << 16)
            self._open = bool(part)
            self._pending += part
        text, _, self._pending = self._pending.partition(b"\n")
        found: dict[str, Any] = json.loads(text)
        return found

    def close(self) -> str:
        """End the process, wherever it is; how it ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.0 if self._open else 10.0)
        self.process.kill()
        code = self.process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        self._errors.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        ended = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        return f"{ended}{': ' + said[-1][:300] if said else ''}"


class Section:
    """The entries of one section, run one after the other in as many processes as it takes."""

    def __init__(
        self, folder: str, request: dict[str, Any], keep: Keep, machine: Callable[[dict[str, Any]], None]
    ) -> None:
        self.folder, self.request, self.keep, self.machine = folder, request, keep, machine

    def run(self, entries: list[Entry], limit: float, end: float) -> list[Entry]:
        """Run the entries, each within `limit` seconds, all until the clock says `end`; those that were not reached.

        Raises Refused where the machine cannot run the bundle.
        """
        left = list(entries)
        for _ in range(MOST_STARTS):
            if not left or time.monotonic() >= end:
                break
            left = self._one_process(left, limit, end)
        return left

    def _one_process(self, left: list[Entry], limit: float, end: float) -> list[Entry]:
        child = Child(self.folder, {**self.request, "entries": left})
        why, running = "", left[0]
        rest = list(left)
        try:
            for line in self._lines(child, limit, end):
                if "begin" in line:
                    running = rest[0]
                    assert running["id"] == line["begin"], line
                elif "end" in line:
                    self.keep(running, line)
                    rest.pop(0)
        except TimeoutError:
            if time.monotonic() >= end:
                return rest
            why = f"it took more than {limit:g} s"
        finally:
            ended = child.close()
        if rest and len(rest) == len(left) and not why:
            why = f"its process did not come to it ({ended})"
        if rest and (why or rest[0] is running):
            self.keep(rest.pop(0), {"failed": why or f"its process was ended ({ended})"})
        return rest

    def _lines(self, child: Child, limit: float, end: float) -> Iterator[dict[str, Any]]:
        """The answers of a process until it ends. TimeoutError where one is late, or the time of the section is up."""
        patience = START_SECONDS
        while (line := child.line(max(0.1, min(patience, end - time.monotonic())))) is not None:
            if "refused" in line:
                raise Refused(line["refused"])
            if "machine" in line:
                self.machine(line["machine"])
            patience = limit
            yield line
