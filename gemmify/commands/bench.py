"""`gemmify bench`: layers against the machine's limits, or networks against other engines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..errors import InputError


def execute(
    models: Sequence[str],
    suite: str | None,
    *,
    layer: str | None = None,
    lowering: str | dict[str, str] | None = None,
    quick: bool = False,
    peers: Sequence[str] = (),
    shapes: dict[str, tuple[int, ...]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The result of `bench.run_suite` for a suite, of `bench.run_model` for a model, of `peers_report` for several.

    `options` are `target`, `threads` and `repeat`. Lines of progress go to stderr.
    """
    if bool(models) == (suite is not None):
        raise InputError("bench takes either MODELs or --suite NAME (gemm or layers)")
    if models and (layer or quick):
        raise InputError(f"{'--layer' if layer else '--quick'} belongs to --suite; leave it out for a model")
    if suite is not None and (peers or shapes):
        raise InputError(f"{'--peers' if peers else '--shape'} belongs to a model; leave it out for a suite")
    from ..threads import import_tvm

    import_tvm(compiler=True)
    from .. import bench

    options = {name: value for name, value in options.items() if value is not None} | {"progress": _say}
    if suite is not None:
        if isinstance(lowering, dict):
            raise InputError("the layers of a suite take keys, not LAYER=KEY: write --lowering KEY,KEY")
        keys = lowering.split(",") if lowering else None
        return bench.run_suite(suite, layer=layer, lowerings=keys, quick=quick, **options)
    options |= {"peers": peers, "shapes": shapes, "lowering": lowering or "auto"}
    return bench.run_model(models[0], **options) if len(models) == 1 else bench.peers_report(models, **options)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    from .. import bench
    from ..report import console

    console().print(bench.render(result))


def show_markdown(result: dict[str, Any]) -> None:
    from .. import bench

    print(bench.render_markdown(result))
