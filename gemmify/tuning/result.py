"""What a tuning run comes to: a row a task, the networks, and a few lines for people."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..durations import show_duration
from ..report import duration
from .use import LOCAL

if TYPE_CHECKING:
    from .finals import Finals
    from .session import Session


def summarize(session: Session, finals: Finals) -> dict[str, Any]:
    """The result of `tuning.tune.tune`, ready for JSON: seconds, bytes, text."""
    rows = [_row(session, finals, layer) for layer in session.layers]
    seconds = time.monotonic() - session.begun
    fresh = sum(layer.fresh for layer in session.layers)
    tuned = sum(not row["kept"] and row["ratio"] is not None for row in rows)
    covered = sum(row["tuned"] is not None for row in rows)
    lines = [f"{fresh} trials in {show_duration(seconds)}; {tuned} of {len(rows)} different layers got faster"]
    if covered < len(rows):
        lines.append(f"{len(rows) - covered} layers have no time yet: run it again, with a larger --budget")
    for net in finals.networks:
        lines.append(
            f"{net['name']}: {duration(net['untuned'])} untuned, {duration(net['tuned'])} tuned, "
            f"{net['ratio']:.2f} x, measured in turns"
        )
    files = sorted({str(layer.file) for layer in session.layers})
    how = "by itself" if session.settings.logs.resolve() == LOCAL.resolve() else f"with --logs {session.settings.logs}"
    lines.append(f"log: {', '.join(files)}; compile uses it {how}")
    return {
        "layers": rows,
        "networks": finals.networks,
        "machine": session.where.to_dict(),
        "versions": session.versions.to_dict(),
        "limits": {dtype: dict(limits.__dict__) for dtype, limits in session.limits.items()} or None,
        "trials": fresh,
        "seconds": seconds,
        "seed": session.settings.seed,
        "logs": str(session.settings.logs),
        "files": files,
        "summary": lines,
    }


def _row(session: Session, finals: Finals, layer: Any) -> dict[str, Any]:
    verdict = finals.verdict(layer)
    outcomes: dict[str, int] = {}
    for record in session.history.known.get(layer.task, ()):
        outcomes[record.outcome] = outcomes.get(record.outcome, 0) + 1
    return {
        "title": layer.task.title,
        "task": layer.task.to_dict(),
        "count": layer.use.count,
        "places": [list(place) for place in layer.use.places],
        "default": verdict.default_seconds,
        "tuned": verdict.seconds,
        "ratio": verdict.ratio,
        "spread": verdict.spread,
        "bound": layer.search.bound,
        "kept": verdict.kept,
        "why": verdict.why,
        "choice": verdict.point.title if verdict.point else "",
        "point": verdict.point.to_dict() if verdict.point else None,
        "trials": layer.search.trials,
        "fresh": layer.fresh,
        "outcomes": outcomes,
        "converged": layer.search.converged,
    }
