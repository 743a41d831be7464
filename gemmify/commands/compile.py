"""`gemmify compile MODEL`: a shared library, and the table of what became of each layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import report
from ..export import check_destination


def execute(
    model: str,
    output: str | None,
    options: dict[str, Any],
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Compile `model` with the keyword `options` of `gemmify.compile` and write `output` (default: MODEL's stem + .so).

    Returns {output, bytes, model, target, threads, archs, cpu_features, layers, memory, tuning, log_hash}.
    """
    import time

    from .. import compile as compile_model

    place = check_destination(output or Path(model).stem + ".so")  # before minutes of work, not after
    compiled = compile_model(model, progress=progress, **options)
    begin = time.perf_counter()
    compiled.export(place)
    if progress:
        progress("export", time.perf_counter() - begin)
    manifest = compiled.manifest
    return {
        "output": str(place),
        "bytes": place.stat().st_size,
        "model": manifest.model,
        "target": manifest.target,
        "threads": compiled.threads,
        "archs": list(manifest.archs),
        "cpu_features": list(manifest.cpu_features),
        "layers": compiled.layers,
        "memory": compiled.memory(),
        "tuning": manifest.tuning,
        "log_hash": manifest.log_hash,
    }


def show(result: dict[str, Any]) -> None:
    report.layers_table(result["layers"])
    report.coverage_line(result["tuning"])
    report.memory_line(result["memory"])
    made_for = ", ".join(result["archs"]) or f"{result['threads']} threads"
    print(f"wrote {result['output']} ({report.size(result['bytes'])}, {made_for})")
