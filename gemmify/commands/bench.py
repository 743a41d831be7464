"""`gemmify bench`: layers against the machine's limits, or networks against other engines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..errors import CheckError, InputError

LOWERINGS = "lowerings"  # the suite that compares them
SHOWN = 4
"""Failures that the error names; the table has all."""


def execute(
    models: Sequence[str],
    suite: str | None,
    *,
    layer: str | None = None,
    lowering: str | dict[str, str] | None = None,
    quick: bool = False,
    peers: Sequence[str] = (),
    shapes: dict[str, tuple[int, ...]] | None = None,
    picture: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The result of `bench.run_lowerings` or `bench.run_suite` for a suite, of `bench.run_model` for a model, of
    `peers_report` for several.

    `options` are `target`, `threads` and `repeat`, for models `max_error`, `logs`, `frozen` and `tuning_minutes`. Lines
    of progress go to stderr. `picture` is the file that the suite `lowerings` is drawn to.
    """
    if bool(models) == (suite is not None):
        raise InputError("bench takes either MODELs or --suite NAME (layers, gemm or lowerings)")
    if models and (layer or quick):
        raise InputError(f"{'--layer' if layer else '--quick'} belongs to --suite; leave it out for a model")
    of_models = {"--peers": peers, "--shape": shapes, "--max-error": options.get("max_error")}
    of_models |= {"--frozen": options.get("frozen"), "--logs or --no-logs": "logs" in options}
    of_models["--tuning-minutes"] = options.get("tuning_minutes")
    if suite is not None and any(of_models.values()):
        given = next(name for name, value in of_models.items() if value)
        raise InputError(f"{given} belongs to a model; leave it out for a suite")
    if picture is not None:
        if suite != LOWERINGS:
            raise InputError("--picture belongs to --suite lowerings; leave it out")
        from ..bench.picture import check_picture

        check_picture(picture)  # before minutes of work, not after
    from ..threads import import_tvm

    import_tvm(compiler=True)
    from .. import bench

    options = {name: value for name, value in options.items() if value is not None} | {"progress": _say}
    if suite is not None:
        if isinstance(lowering, dict):
            raise InputError("the layers of a suite take keys, not LAYER=KEY: write --lowering KEY,KEY")
        keys = lowering.split(",") if lowering else None
        options |= {"layer": layer, "lowerings": keys, "quick": quick}
        return _run_lowerings(picture, options) if suite == LOWERINGS else bench.run_suite(suite, **options)
    options |= {"peers": peers, "shapes": shapes, "lowering": lowering or "auto"}
    return bench.run_model(models[0], **options) if len(models) == 1 else bench.peers_report(models, **options)


def _run_lowerings(picture: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from .. import bench

    result = bench.run_lowerings(**options)
    if picture is not None and not any(row["right"] for row in result["rows"]):
        _say("no picture: no lowering gave a right result")
    elif picture is not None:
        from ..bench.picture import write_picture

        write_picture(result, picture)
    return result


def check(result: dict[str, Any]) -> None:
    """CheckError where a lowering of the suite `lowerings` failed, was wrong, or does not allocate what it says."""
    if failures := result.get("failures"):
        named = dict.fromkeys(f"{failure['lowering']} on {failure['name']}" for failure in failures)
        shown = ", ".join(list(named)[:SHOWN]) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")
        raise CheckError(f"{shown}: {failures[0]['what']}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    from .. import bench
    from ..report import console

    console().print(bench.render(result))


def show_markdown(result: dict[str, Any]) -> None:
    from .. import bench

    print(bench.render_markdown(result))
