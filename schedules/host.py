"""What this machine is: its physical cores and its caches, read from the operating system."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

_CPU_DIR = Path("/sys/devices/system/cpu")
# Sound values where the target is another machine: (L1 data a core, L2 a core, L3 shared), in bytes.
DEFAULT_CACHES = (32 << 10, 512 << 10, 8 << 20)


@lru_cache(maxsize=1)
def host_cores() -> int:
    """Physical cores that this process may run on (two hardware threads of one core count once); at least 1."""
    try:
        allowed = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        topology = _CPU_DIR / f"cpu{cpu}" / "topology"
        try:
            cores.add((_read(topology / "physical_package_id"), _read(topology / "core_id")))
        except OSError:
            cores.add(("cpu", str(cpu)))
    return max(1, len(cores))


@lru_cache(maxsize=1)
def host_caches() -> tuple[int, int, int]:
    """(L1 data a core, L2 a core, L3 shared) of this machine in bytes; a default for each level that is not told."""
    sizes = dict(zip((1, 2, 3), DEFAULT_CACHES, strict=True))
    for index in sorted((_CPU_DIR / "cpu0" / "cache").glob("index*")):
        try:
            level, kind, text = int(_read(index / "level")), _read(index / "type"), _read(index / "size")
            if kind in ("Data", "Unified") and level in sizes:
                sizes[level] = _parse_size(text) or sizes[level]
        except (OSError, ValueError):
            continue
    return sizes[1], sizes[2], sizes[3]


def _parse_size(text: str) -> int:
    """`"48K"` -> 49152."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1].upper()] if text[-1:].upper() in units else int(text)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
