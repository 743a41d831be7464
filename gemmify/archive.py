"""The tar of a bundle: what is packed here and unpacked on another machine."""

from __future__ import annotations

import tarfile
from gzip import GzipFile
from pathlib import Path
from typing import IO


def write_tar(file: IO[bytes] | GzipFile, folder: Path, name: str) -> None:
    """Write every file of `folder` into a tar, in order, below the folder `name`."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for place in sorted(p for p in folder.rglob("*") if p.is_file()):
            tar.add(place, f"{name}/{place.relative_to(folder)}", filter=_nobody)


def _nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the owner, who means nothing on another machine."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.name.endswith(("run.py", ".so")) else 0o644
    return entry
