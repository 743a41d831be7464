"""The parent's side of `server`: starts it, asks it for children, hears what they say and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from ...errors import GemmifyError
from .job import Reply, about_memory
from .server import Config

START_SECONDS = 120.0
_END_SECONDS = 5.0
_RUN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from gemmify.tuning.measure.server import main; main(int(sys.argv[2]))"
)


class ServerEnded(Exception):
    """The process that forks the candidates is gone, and all its children with it."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: by a signal's name ("" where it left by itself), and what it had written until then."""

    signal: str
    status: int
    said: str

    def judged(self, phase: str) -> tuple[str, str]:
        """(outcome, reason) of a child that ended without a reply while it was `phase`."""
        said = f": {self.said}" if self.said else ""
        if about_memory(self.said):
            return "memory", f"ended while {phase}{said}"
        if self.signal == "SIGKILL":  # not by us: we hear nothing of those
            return "memory", f"killed by the system while {phase} (SIGKILL), as it does where memory is short{said}"
        if self.signal:
            return "crash", f"{self.signal} while {phase}{said}"
        return "crash", f"its process left with exit status {self.status} while {phase}{said}"


class Child:
    """One forked process: its number, the pipe to it, and whether that has come to its end."""

    def __init__(self, number: int, connection: Connection) -> None:
        self.number, self.connection = number, connection
        self.silent = False

    def ask(self, do: str, **arguments: object) -> None:
        """Send it a request; where it is dead, `Processes.wait` says so."""
        with contextlib.suppress(OSError):
            self.connection.send((do, arguments))


class Processes:
    """A running server. Raises GemmifyError where it cannot start, ServerEnded where it is gone later."""

    def __init__(self, config: Config) -> None:
        self._folder = Path(config.folder)
        self._number = 0
        self._exits: dict[int, int] = {}
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Before the process is there: where this one ends in the next moment, it must know which folder to remove.
        self._control.send(pickle.dumps(config))
        with theirs, (self._folder / "server.txt").open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _RUN, json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(config.threads),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def _await_ready(self) -> None:
        self._control.settimeout(START_SECONDS)
        try:
            text = self._control.recv(4096).decode()
        except TimeoutError:
            text = f"it said nothing for {START_SECONDS:g} s"
        except OSError as error:
            text = str(error)
        self._control.settimeout(None)
        if text != "ready":
            said = text.removeprefix("failed ") or self._words("server") or "it ended without a word"
            raise GemmifyError(f"the process that measures candidates cannot start: {said}")

    def fork(self, payload: bytes) -> Child:
        """A new child that has been given a pickled Job."""
        ours, theirs = socket.socketpair()
        self._number += 1
        child = Child(self._number, Connection(ours.detach()))
        with theirs:
            try:
                socket.send_fds(self._control, [f"fork {child.number}".encode()], [theirs.fileno()])
            except OSError as error:
                raise ServerEnded from error
        with contextlib.suppress(OSError):
            child.connection.send_bytes(payload)
        return child

    def wait(self, children: Sequence[Child], deadline: float) -> list[tuple[Child, Reply | Ended]]:
        """What the next of `children` say, or how they ended; nothing where `deadline` (time.monotonic) comes first."""
        while True:
            speaking = {child.connection: child for child in children if not child.silent}
            ready = wait([self._control, *speaking], max(0.0, deadline - time.monotonic()))
            found: list[tuple[Child, Reply | Ended]] = []
            for connection in ready:
                if connection is not self._control:
                    found += self._hear(speaking[connection])  # type: ignore[index]
            if self._control in ready:
                self._note_exit()
            found += [(c, self._ended(c)) for c in children if c.silent and c.number in self._exits]
            if found or time.monotonic() >= deadline:
                return found

    @staticmethod
    def _hear(child: Child) -> list[tuple[Child, Reply | Ended]]:
        try:
            return [(child, child.connection.recv())]
        except Exception:  # the end, also in the middle of a message
            child.silent = True
            return []

    def _note_exit(self) -> None:
        try:
            text = self._control.recv(256).decode()
        except OSError:
            text = ""
        if not text:
            raise ServerEnded
        _, number, status = text.split()
        self._exits[int(number)] = int(status)

    def _ended(self, child: Child) -> Ended:
        status = self._exits[child.number]
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
        return Ended(name, os.waitstatus_to_exitcode(status), self._words(str(child.number)))

    def _words(self, name: str) -> str:
        """The first line that a process wrote."""
        with contextlib.suppress(OSError), (self._folder / f"{name}.txt").open(errors="replace") as file:
            return next((line.strip()[:300] for line in file if line.strip()), "")
        return ""

    def signal(self, child: Child, do: str) -> None:
        """`do`: "stop" or "continue" it, "kill" it; nothing happens to one that has ended."""
        try:
            self._control.send(f"{do} {child.number}".encode())
        except OSError as error:
            raise ServerEnded from error

    def end(self, children: Iterable[Child]) -> None:
        """Kill children and wait until they are gone, memory and all."""
        children = list(children)
        with contextlib.suppress(ServerEnded):
            for child in children:
                if child.number not in self._exits:
                    self.signal(child, "kill")
            until = time.monotonic() + _END_SECONDS
            while any(c.number not in self._exits for c in children) and time.monotonic() < until:
                if wait([self._control], max(0.0, until - time.monotonic())):
                    self._note_exit()
        for child in children:
            child.connection.close()
            self._exits.pop(child.number, None)
            (self._folder / f"{child.number}.txt").unlink(missing_ok=True)

    def close(self) -> None:
        """End the server, which ends its children."""
        self._control.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the children die with it
            self._process.wait()


def _environment(threads: int) -> dict[str, str]:
    """One thread for every library of numbers, so that a fork leaves none behind; TVM's pool of the size asked for."""
    single = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
    plain = {name: value for name, value in os.environ.items() if name != "TVM_USE_RUNTIME_LIB"}
    return {**plain, **dict.fromkeys(single, "1"), "TVM_NUM_THREADS": str(threads)}
