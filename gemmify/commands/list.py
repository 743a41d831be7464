"""`gemmify list`: the lowerings and the networks of the zoo."""

from __future__ import annotations

from typing import Any

from .. import report


def execute() -> dict[str, Any]:
    """{"lowerings": [{key, summary, workspace, source}], "zoo": [names]}."""
    from ..threads import import_tvm

    import_tvm(compiler=True)
    from lowering import LOWERINGS

    lowerings = [
        {"key": key, "summary": low.summary, "workspace": low.workspace_formula, "source": low.source}
        for key, low in LOWERINGS.items()
    ]
    return {"lowerings": lowerings, "zoo": _zoo_names()}


def _zoo_names() -> list[str]:
    from .. import zoo

    return list(zoo.ZOO)


def show(result: dict[str, Any]) -> None:
    columns: tuple[report.Column, ...] = (
        ("lowering", "key", report.text),
        ("what it is", "summary", report.text),
        ("workspace, bytes", "workspace", report.text),
        ("source", "source", report.text),
    )
    report.table("", columns, result["lowerings"])
    print("\nzoo: " + ", ".join(result["zoo"]))
