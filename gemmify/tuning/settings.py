"""What a tuning run is asked for, checked before any work."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..durations import parse_duration
from ..errors import InputError
from ..export import check_destination
from ..frontend.convert_dtype import check_dtype
from ..policy import make_policy
from ..threads import check_threads

BATCH = 8
"""Candidates that are built together and then measured one after the other."""
RANKED = 8
"""Points of a task that are measured in turns with the default at the end, alone."""
FINALISTS = 6
"""How many of those, the best, are measured inside the network, where the time is kept for them."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `tuning.tune.tune`, in one type each; see there."""

    target: Any
    budget: float | None
    trials: int | None
    layers: tuple[str, ...]
    lowerings: tuple[str, ...] | None
    logs: Path
    from_nothing: bool
    seed: int
    threads: int | None
    max_workspace: int | None
    max_error: float | None
    shapes: Mapping[str, Sequence[int]] | None
    dtype: str | None
    tracker: str | None
    key: str | None
    workers: int
    bundle: Path | None

    @classmethod
    def checked(
        cls,
        *,
        target: Any,
        budget: float | str | None,
        trials: int | None,
        layers: Sequence[str],
        lowerings: Sequence[str] | None,
        logs: str | PathLike[str],
        from_nothing: bool,
        seed: int,
        threads: int | None,
        max_workspace: int | str | None,
        max_error: float | str | None,
        shapes: Mapping[str, Sequence[int]] | None,
        dtype: str | None,
        tracker: str | None,
        key: str | None,
        workers: int | None,
        bundle: str | PathLike[str] | None,
    ) -> Settings:
        """InputError for a value that makes no sense, or two that contradict."""
        seconds = None if budget is None else parse_duration(budget)
        if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
            raise InputError(f"trials must be a whole number of at least 1, got {trials!r}")
        if seconds is None and trials is None:
            raise InputError("tuning needs an end: give a budget (20m) or a number of trials a layer")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"the seed must be a whole number of at least 0, got {seed!r}")
        if isinstance(layers, str) or isinstance(lowerings, str):
            raise InputError("layers and lowerings are lists of names")
        if lowerings is not None and not lowerings:
            raise InputError("no lowering is left to tune: name some, or leave lowerings out for all that apply")
        if (tracker is None) != (key is None):
            raise InputError("a tracker and the key of its devices belong together: give --tracker HOST:PORT --key KEY")
        if workers is not None and tracker is None:
            raise InputError("workers count the devices of a tracker: give --tracker HOST:PORT --key KEY as well")
        if bundle is not None and tracker is not None:
            raise InputError("a bundle is measured elsewhere and a tracker now: give one of the two")
        policy = make_policy("auto", False, max_workspace, max_error)
        elsewhere = tracker is not None or bundle is not None
        for name, given in (("threads", threads), ("workers", workers)):
            if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
                raise InputError(f"{name} must be a whole number of at least 1, got {given!r}")
        count = threads if threads is None or elsewhere else check_threads(threads)
        folder = Path(logs)
        if bundle is None:
            _require_writable(folder)
        return cls(
            target,
            seconds,
            trials,
            tuple(layers),
            None if lowerings is None else tuple(lowerings),
            folder,
            from_nothing,
            seed,
            count,
            policy.max_workspace,
            policy.max_error,
            shapes,
            None if dtype is None else check_dtype(dtype),
            tracker,
            key,
            workers or 1,
            None if bundle is None else check_destination(bundle),
        )


def _require_writable(folder: Path) -> None:
    """InputError where no log can be made in `folder`: before minutes of work, not at the first trial."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise InputError(f"the logs must be a folder, and {there} is a file; give another folder")
    try:
        tempfile.TemporaryFile(dir=there).close()  # what the permissions say is not enough, as in `check_destination`
    except OSError as err:
        said = err.strerror or err
        raise InputError(
            f"cannot write the logs {folder}: {there} is not writable ({said}); give another folder"
        ) from err
