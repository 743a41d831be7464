"""Benchmarks: single layers against this machine's limits, and whole networks against other engines in the same run.

The worker processes live in this package and must load no compiler, so each name is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemmify.bench.gpu_bundle import write_bundle
    from gemmify.bench.gpu_suite import import_result, run_gpu
    from gemmify.bench.lowerings import run_lowerings
    from gemmify.bench.network import run_model
    from gemmify.bench.report import peers_report, render, render_markdown
    from gemmify.bench.suites import run_suite

__all__ = [
    "import_result",
    "peers_report",
    "render",
    "render_markdown",
    "run_gpu",
    "run_lowerings",
    "run_model",
    "run_suite",
    "write_bundle",
]

_HOMES = {
    "import_result": "gpu_suite",
    "run_gpu": "gpu_suite",
    "write_bundle": "gpu_bundle",
    "run_lowerings": "lowerings",
    "run_model": "network",
    "run_suite": "suites",
    "peers_report": "report",
    "render": "report",
    "render_markdown": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gemmify.bench' has no attribute {name!r}")
    return getattr(import_module(f"gemmify.bench.{_HOMES[name]}"), name)
