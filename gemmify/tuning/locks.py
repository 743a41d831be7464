"""A log file held by one process, `flock` on the file that the path names now, and what is done under the lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_PATIENCE = 2.0
"""Seconds that a reader waits for a writer. It then reads without the lock: a stopped writer must not stop everybody,
and a line that it is writing is read as damage at worst."""


def open_log(path: Path) -> int:
    """A descriptor that reads and appends; the file is made where it is missing. OSError as `os.open`."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def current(fd: int, path: Path) -> bool:
    """Whether `fd` is still the file at `path`: a repair puts a new one there, and a user may remove it."""
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(fd)
    return (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev)


def append(fd: int, line: bytes) -> None:
    """Write `line` at the end of a file whose lock is held: whole or, with an OSError, not at all. A line that a killed
    writer left unfinished is ended first."""
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        line = b"\n" + line
    written = 0
    try:
        while written < len(line):  # one turn, unless the disk or a limit takes a part only
            written += os.write(fd, line[written:])
    except OSError:
        os.ftruncate(fd, size)
        raise


@contextlib.contextmanager
def held(path: Path) -> Iterator[int]:
    """A descriptor of the log at `path`, locked against all writers until the end of the block. OSError where it cannot
    be opened."""
    while True:
        fd = open_log(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if current(fd, path):
                yield fd
                return
        finally:
            os.close(fd)  # it ends the lock too


def read_whole(path: Path) -> bytes:
    """The bytes of a log, read while no writer is inside a line. OSError where the file cannot be read."""
    with open(path, "rb") as file:
        _share(file.fileno())
        return file.read()


def read_fd(fd: int) -> bytes:
    """All bytes of the file that `fd` has open."""
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.read()


def _share(fd: int) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return None
            time.sleep(0.002)
        except OSError:  # a file system without locks
            return None
