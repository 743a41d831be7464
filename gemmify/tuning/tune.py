"""The entry: arguments checked, a session run under its display."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from .cost_model import require_xgboost
from .progress import Progress
from .session import Session
from .settings import Settings


def tune(
    models: Sequence[Any],
    *,
    target: Any = "llvm",
    budget: float | str | None = "15m",
    trials: int | None = None,
    layers: Sequence[str] = (),
    lowerings: Sequence[str] | None = None,
    logs: str | PathLike[str] = "tuning_logs",
    from_nothing: bool = False,
    seed: int = 0,
    threads: int | None = None,
    max_workspace: int | str | None = None,
    max_error: float | str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    tracker: str | None = None,
    key: str | None = None,
    workers: int | None = None,
    bundle: str | PathLike[str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Tune the layers of `models`; see `gemmify.tune` for the arguments.

    Returns {"layers": a row a task, "networks", "machine", "versions", "trials", "seconds", "logs", "summary"}, ready
    for JSON. A KeyboardInterrupt ends it cleanly and is raised again: what was measured is in the log.
    """
    given = {k: v for k, v in locals().items() if k not in ("models", "quiet")}
    settings = Settings.checked(**given)
    require_xgboost()
    begun = time.monotonic()
    with Progress(quiet) as progress, Session(models, settings, progress, begun) as session:
        try:
            return session.run() if settings.bundle is None else session.pack()
        except KeyboardInterrupt:
            progress.finish(session.stopped())
            raise
