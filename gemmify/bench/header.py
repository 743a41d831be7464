"""What every benchmark result begins with: schema, date, command, machine, versions, and this machine's limits."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from gemmify import __version__, host
from gemmify.bench.peers import installed_versions

SCHEMA = "gemmify-bench/1"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name as the kernel gives it; the architecture's name where it gives none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = [line.partition(":") for line in lines]
    found = {key.strip(): value.strip() for key, _, value in fields}
    family = f" (family {found['cpu family']}, model {found['model']})" if {"cpu family", "model"} <= set(found) else ""
    return found["model name"] + family if "model name" in found else platform.processor() or platform.machine()


def header(kind: str, threads: int, target: Any) -> dict[str, Any]:
    """The common fields of a result, ready for JSON. `threads` is what the run uses, `cores` what it could."""
    known = set(host.X86_FEATURES.values()) | set(host.ARM_FEATURES.values())
    flags = host.cpu_flags() or frozenset()
    program = Path(sys.argv[0]).name.replace("__main__.py", "gemmify") or "python"
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([program, *sys.argv[1:]]),
        "machine": {
            "cpu": cpu_model(),
            "arch": host.host_arch(),
            "features": sorted(flags & known),
            "cores": host.physical_cores(),
            "threads": threads,
            "target": str(target),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {**installed_versions(), "gemmify": __version__, "python": platform.python_version()},
    }
