"""`gemmify bench`: layers against the machine's limits, or networks against other engines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..errors import CheckError, InputError

LOWERINGS = "lowerings"  # the suite that compares them
GPU = "gpu"  # the suite of a GPU
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
    dtype: str | None = None,
    picture: str | None = None,
    bundle: str | None = None,
    imported: str | None = None,
    minutes: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The result of `bench.run_lowerings` or `bench.run_suite` for a suite, of `bench.run_model` for a model, of
    `peers_report` for several.

    `options` are `target`, `threads` and `repeat`, for models `max_error`, `logs`, `frozen` and `tuning_minutes`. Lines
    of progress go to stderr. `picture` is the file that the suite `lowerings` is drawn to. The suite `gpu` takes
    `minutes`; with `bundle` it is written to that file instead, and `imported` is what a bundle's runner wrote.
    """
    if imported is not None:
        return _imported(imported, models, suite, bundle)
    if (bundle is not None or minutes is not None) and suite != GPU:
        raise InputError(f"{'--bundle' if bundle is not None else '--minutes'} belongs to --suite gpu; leave it out")
    if bool(models) == (suite is not None):
        raise InputError("bench takes either MODELs or --suite NAME (layers, gemm, lowerings or gpu)")
    if models and (layer or quick):
        raise InputError(f"{'--layer' if layer else '--quick'} belongs to --suite; leave it out for a model")
    of_models = {"--peers": peers, "--shape": shapes, "--max-error": options.get("max_error")}
    of_models |= {"--frozen": options.get("frozen"), "--logs or --no-logs": "logs" in options}
    of_models |= {"--tuning-minutes": options.get("tuning_minutes"), "--dtype": dtype}
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
    if suite == GPU:
        return _run_gpu({"layer": layer, "quick": quick or None, "minutes": minutes, **options}, lowering, bundle)
    if suite is not None:
        if isinstance(lowering, dict):
            raise InputError("the layers of a suite take keys, not LAYER=KEY: write --lowering KEY,KEY")
        keys = lowering.split(",") if lowering else None
        options |= {"layer": layer, "lowerings": keys, "quick": quick}
        return _run_lowerings(picture, options) if suite == LOWERINGS else bench.run_suite(suite, **options)
    options |= {"peers": peers, "shapes": shapes, "dtype": dtype, "lowering": lowering or "auto"}
    return bench.run_model(models[0], **options) if len(models) == 1 else bench.peers_report(models, **options)


def _imported(path: str, models: Sequence[str], suite: str | None, bundle: str | None) -> dict[str, Any]:
    if models or bundle is not None or suite not in (None, GPU):
        raise InputError("--import shows a file of results; leave out MODELs, --bundle and other suites than gpu")
    from .. import bench

    return bench.import_result(path)


def _run_gpu(options: dict[str, Any], lowering: Any, bundle: str | None) -> dict[str, Any]:
    from .. import bench

    chosen = {name: value for name, value in options.items() if value is not None}
    refused = {"--lowering": lowering, "--threads": chosen.pop("threads", None), "--repeat": chosen.pop("repeat", None)}
    for name, value in refused.items():
        if value:
            raise InputError(f"{name} does not belong to the suite gpu; leave it out")
    if bundle is None:
        return bench.run_gpu(**chosen)
    if chosen.pop("minutes", None) is not None:
        raise InputError("--minutes is for a run; give it to run.py of the bundle instead")
    if "target" not in chosen:
        raise InputError('a bundle needs the GPU that it is for: give --target "cuda -arch=sm_90"')
    return {"kind": "bundle", **bench.write_bundle(bundle, **chosen)}


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
    if result["kind"] == "bundle":
        return _show_bundle(result)
    from .. import bench
    from ..report import console

    console().print(bench.render(result))


def _show_bundle(result: dict[str, Any]) -> None:
    from ..report import size

    for name, why in result["build_failures"]:
        print(f"not built: {name}: {why}")
    failed = f", {len(result['build_failures'])} could not be built" if result["build_failures"] else ""
    print(f"wrote {result['bundle']} ({size(result['bytes'])}, {result['entries']} entries{failed}, "
          f"{result['seconds']:.0f} s)")  # fmt: skip
    print("where the GPU is: tar xf it, then python3 gemmify-gpu/run.py --json result.json")


def show_markdown(result: dict[str, Any]) -> None:
    if result["kind"] == "bundle":
        return _show_bundle(result)
    from .. import bench

    print(bench.render_markdown(result))
