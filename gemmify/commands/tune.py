"""`gemmify tune MODEL...`: measure lowerings and schedules of every layer, and keep what was found in a log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import report


def execute(models: Sequence[str], **options: Any) -> dict[str, Any]:
    """Tune `models` with the keyword `options` of `tuning.tune.tune`; returns its result."""
    from ..threads import check_threads, import_tvm

    if options.get("threads") is not None and not (options.get("tracker") or options.get("bundle")):
        check_threads(options["threads"])  # those of this machine: elsewhere there may be more
    import_tvm(compiler=True)
    from ..tuning.tune import tune

    return tune(list(models), **options)


def show(result: dict[str, Any]) -> None:
    if result.get("bundle"):
        bundle = result["bundle"]
        print(f"wrote {bundle['path']} ({report.size(bundle['bytes'])}, {bundle['candidates']} candidates)")
        print("there: unpack it, then `python run.py`")
        print(f"back here: `gemmify logs import results.jsonl --logs {result['logs']}`")
        return
    rows = sorted(result["layers"], key=lambda row: -row["count"] * (row["default"] or 0.0))
    columns: list[report.Column] = [
        ("layer", "title", report.text),
        ("x", "count", report.text),
        ("default", "default", _seconds),
        ("tuned", "tuned", _seconds),
        ("ratio", "ratio", lambda value: report.ratio(value) if value else ""),
        ("bound", "bound", _seconds),
        ("trials", "trials", report.text),
        ("choice", "choice", report.text),
    ]
    report.table("tuned layers", columns, rows)
    for line in result["summary"]:
        print(line)


def _seconds(value: Any) -> str:
    return report.duration(value) if value else ""
