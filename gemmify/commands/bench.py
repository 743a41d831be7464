"""`gemmify bench`: layers against the machine's limits, or a network against other engines."""

from __future__ import annotations

from typing import Any


def execute(
    model: str | None, suite: str | None, layer: str | None, target: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The result of `bench.run_model` for a model, of `bench.run_suite` for a suite."""
    from ..errors import InputError

    if (model is None) == (suite is None):
        raise InputError("bench takes either a MODEL or --suite NAME")
    from .. import bench

    if suite is not None:
        kept = {"threads": options.get("threads")}
        result: dict[str, Any] = bench.run_suite(suite, layer=layer, target=target, **kept)
    else:
        result = bench.run_model(model, **options)
    return result


def show(result: dict[str, Any]) -> None:
    from .. import bench

    rendered = bench.render(result)
    if rendered is not None:  # it may print itself, or return text or a rich table
        from rich.console import Console

        Console().print(rendered)
