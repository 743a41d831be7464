"""Appending to a log: whole lines, by several processes at once, whatever kills them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from pathlib import Path
from types import TracebackType

from ..errors import GemmifyError
from .line import encode
from .locks import append, current, open_log
from .record import Record


class Writer:
    """Appends records to the log file at `path`; its folders are made. A context manager.

    Each record goes to the system in one write under a lock before `append` returns, so that neither `kill -9` of this
    process nor other writers can take it away. Writers may share a file from any number of processes and threads, and
    one Writer may be used on both sides of a fork. Raises GemmifyError where the file cannot be opened or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd: int | None = None
        self._owner = os.getpid()
        self._turn = threading.Lock()
        self._closed = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as err:
            raise self._failed("open", err) from err

    def append(self, record: Record) -> None:
        """Write `record` at the end. ValueError for a record that could not be read back; GemmifyError where it cannot
        be written, as on a full disk: the log then ends as it did before."""
        line = encode(record)
        if self._closed:
            raise GemmifyError(f"the log {self.path} was closed; open another Writer to append to it")
        if self._owner != os.getpid():
            self._after_fork()
        with self._turn:
            try:
                self._append(line)
            except OSError as err:
                raise self._failed("write", err) from err

    def close(self) -> None:
        """Hand the file to the disk and close it; closing twice is allowed."""
        with self._turn if self._owner == os.getpid() else contextlib.nullcontext():
            self._closed, fd, self._fd = True, self._fd, None
            if fd is None:
                return
            try:
                os.fsync(fd)
            except OSError as err:
                raise self._failed("write", err) from err
            finally:
                os.close(fd)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            self.close()
        except GemmifyError:
            if kind is None:  # else what ended the block matters more
                raise

    def _append(self, line: bytes) -> None:
        while True:
            fd = self._open() if self._fd is None else self._fd
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                if current(fd, self.path):
                    return append(fd, line)
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)
            # A repair put a new file there, or somebody removed it: what is appended here would be lost.
            self._fd = None
            os.close(fd)

    def _open(self) -> int:
        if not self.path.parent.is_dir():  # removed since
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = open_log(self.path)
        return self._fd

    def _after_fork(self) -> None:
        """A descriptor of this process's own: parent and child would share one lock, and both be inside."""
        self._owner, self._turn = os.getpid(), threading.Lock()
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _failed(self, what: str, err: OSError) -> GemmifyError:
        return GemmifyError(
            f"cannot {what} the log {self.path}: {err.strerror or err}; free space there or take another folder"
        )
