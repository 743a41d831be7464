"""What one forked process does: build a candidate, wait for its turn, check it, time it, end.

It answers on a pipe; the end of the pipe, or of the process that it was forked from, ends it.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import tvm

from schedules import Machine

from ...measure import set_threads
from . import sampling
from .candidate import Candidate, build
from .check import read_arrays, write_arrays
from .flush import Flusher
from .job import Job, Reply, about_memory


@dataclass(frozen=True)
class Prepared:
    """What every child finds ready in the process that it was forked from."""

    target: tvm.target.Target
    machine: Machine
    threads: int
    touch: Callable[..., Any]
    buffer: np.ndarray


def serve(connection: Connection, prepared: Prepared) -> None:
    """Do the job that comes first, then what is asked of its candidate, until the pipe ends."""
    job: Job = cloudpickle.loads(connection.recv_bytes())
    _limit_memory(job.memory)
    begun = time.monotonic()
    try:
        if job.lowering is None:
            write_arrays(job.task, Path(job.folder), job.seed)
            connection.send(Reply("prepared", {}))
            return
        candidate = build(job, prepared.machine, prepared.target)
    except Exception as error:
        connection.send(_failed("build", error))
        return
    connection.send(Reply("built", {"seconds": time.monotonic() - begun}))
    _answer(connection, prepared, job, candidate)


def _answer(connection: Connection, prepared: Prepared, job: Job, candidate: Candidate) -> None:
    subject: sampling.Subject | None = None
    while True:
        try:
            do, arguments = connection.recv()
        except EOFError:
            return
        try:
            if do == "check":
                set_threads(prepared.threads)
                reply = _check(candidate, Path(job.folder))
                subject = _subject(candidate, prepared)
            else:
                assert do == "sample" and subject is not None, f"a candidate is asked to {do} before it is checked"
                warm, cold = sampling.sample(subject, **arguments)
                reply = Reply("sampled", {"warm": warm, "cold": cold})
        except Exception as error:
            reply = _failed("crash", error)
        connection.send(reply)
        if reply.what == "failed":
            return


def _check(candidate: Candidate, folder: Path) -> Reply:
    want = read_arrays(folder)
    candidate.bind(want)
    candidate()
    error, wrong = candidate.compare(want)
    faults = ([wrong] if wrong else []) + candidate.faults()
    if faults:
        return Reply("failed", {"outcome": "wrong", "why": "; ".join(faults[:3]), "error": error})
    return Reply("checked", {"error": error})


def _subject(candidate: Candidate, prepared: Prepared) -> sampling.Subject:
    flusher = Flusher(prepared.touch, prepared.buffer)
    readers = [flusher.reader(memory) for memory in candidate.recent]

    def cool() -> None:
        flusher.flush()
        for read in readers:
            read()

    return sampling.Subject(candidate, cool)


def _failed(outcome: str, error: Exception) -> Reply:
    """An exception as a reply: its type and its text in one line."""
    why = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no text'}"[:300]
    if isinstance(error, MemoryError) or about_memory(str(error)):
        outcome = "memory"
    return Reply("failed", {"outcome": outcome, "why": why, "error": None})


def _limit_memory(extra: int) -> None:
    """Let this process allocate `extra` bytes beyond what it was forked with, and write no larger file."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        data = next((int(line.split()[1]) for line in file if line.startswith("VmData:")), 0)
    limit = (data << 10) + extra
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (extra, extra))
