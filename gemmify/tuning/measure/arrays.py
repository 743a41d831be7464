"""Where the arrays of the tasks lie: a private folder, in memory if there is room, that all candidates read."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import cloudpickle
import psutil

from ...errors import GemmifyError
from ..task import Task
from .job import Job
from .processes import Ended, Processes

PREPARE_LIMIT = 120.0
"""Seconds for the arrays of a task and their float64 result."""
_ROOM_SHARE = 0.25  # of the free space: what the arrays of all tasks together may take
_SCRATCH_BYTES = 1 << 30


def private_folder() -> Path:
    """A new folder of this user alone, in memory where there is room for some layers, else on the disk."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free >= _SCRATCH_BYTES
    return Path(tempfile.mkdtemp(prefix="gemmify-", dir=shared if roomy else None))


class TaskArrays:
    """The tasks whose arrays are in `folder`, each in a folder of its own with the folded weights of its candidates.

    While all of them take more than a quarter of the space that was free, those used longest ago are forgotten.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self.room = int(_ROOM_SHARE * shutil.disk_usage(folder).free)
        self._tasks: dict[Task, Path] = {}  # the one used last stands last
        self._count = 0

    def of(self, task: Task, processes: Processes) -> Path:
        """The folder of a task; a child of `processes` makes it at the first use. GemmifyError where that fails."""
        known = self._tasks.pop(task, None)
        if known is not None and known.exists():
            self._tasks[task] = known
            return known
        self._make_room()
        self._count += 1
        folder = self._folder / f"task{self._count}"
        folder.mkdir()
        try:
            self._fill(task, folder, processes)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._tasks[task] = folder
        return folder

    def _fill(self, task: Task, folder: Path, processes: Processes) -> None:
        job = Job(task, str(folder), psutil.virtual_memory().available, self._seed)
        child = processes.fork(cloudpickle.dumps(job))
        try:
            said = processes.wait([child], time.monotonic() + PREPARE_LIMIT)
        finally:
            processes.end([child])
        reply = said[0][1] if said else None
        if reply is None:
            why = f"it took more than {PREPARE_LIMIT:g} s"
        elif isinstance(reply, Ended):
            why = reply.judged("making them")[1]
        elif reply.what == "failed":
            why = reply.values["why"]
        else:
            return
        raise GemmifyError(f"the layer {task.title} cannot be measured: its arrays and reference were not made: {why}")

    def _make_room(self) -> None:
        while self._tasks and sum(f.stat().st_size for f in self._folder.rglob("*.npy")) > self.room:
            shutil.rmtree(self._tasks.pop(next(iter(self._tasks))), ignore_errors=True)
