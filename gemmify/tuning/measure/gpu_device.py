"""Candidates on a GPU of this machine. Runs in a `helper.Helper`: an error on a GPU ends all that a process can do
there, and a kernel that hangs can only be killed with it.

What it tells its parent: ("running",), from when on the candidate's code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import tvm

from ...runtime import load_module
from ..task import Task
from .library import LibrarySpec
from .placed import FLUSHED, run_finals, run_trial

Tell = Callable[[Any], None]


class Gpu:
    """The GPU as a place where libraries run (`placed.Place`). `l2_bytes` is the size of its cache."""

    def __init__(self, l2_bytes: int) -> None:
        self.device = tvm.cuda(0)
        self.flush: Mapping[str, Any] = {"cache_flush_bytes": FLUSHED * l2_bytes}

    def load(self, path: str) -> Any:
        """The module of a library."""
        return load_module(path)

    def tensor(self, array: np.ndarray) -> Any:
        """A copy of `array` in the GPU's memory."""
        return tvm.runtime.tensor(np.ascontiguousarray(array), self.device)


@lru_cache(maxsize=1)
def _gpu(l2_bytes: int) -> Gpu:
    return Gpu(l2_bytes)


def trial(
    tell: Tell, l2_bytes: int, task: Task, folder: str, path: str, spec: LibrarySpec, give_up: float | None
) -> dict[str, Any]:
    """`run_trial` on the GPU."""
    gpu = _gpu(l2_bytes)
    tell(("running",))
    return run_trial(gpu, task, folder, path, spec, give_up)


def finals(
    tell: Tell, l2_bytes: int, task: Task, folder: str, libraries: list[tuple[str, LibrarySpec]], rounds: int
) -> list[dict[str, Any]]:
    """`run_finals` on the GPU."""
    gpu = _gpu(l2_bytes)
    tell(("running",))
    return run_finals(gpu, task, folder, libraries, rounds)
