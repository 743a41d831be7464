"""The file of results: one line of JSON each, added as soon as it is known."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

from .machine import fail

BUNDLE_FORMAT = "gemmify-bundle/1"
RESULTS_FORMAT = "gemmify-results/1"


def read_results(path: str, bundle: Any) -> list[dict[str, Any]]:
    """The good results of this bundle in the file; a cut last line, as a kill leaves it, does not count."""
    found: list[dict[str, Any]] = []
    if not os.path.exists(path):
        return found
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    for line in lines:
        try:
            result = json.loads(line)
            if sealed(result) != result.get("sum"):
                continue
        except (ValueError, AttributeError):
            continue
        if result.get("bundle") != bundle["id"]:
            fail(f"{path} holds results of another bundle; give --results another name")
        found.append(result)
    return found


def sealed(result: dict[str, Any]) -> str:
    """The checksum of a result without its own."""
    rest = {key: value for key, value in result.items() if key != "sum"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def append(path: str, results: list[dict[str, Any]]) -> None:
    """Add lines in one write and hand them to the system."""
    with open(path, "ab+") as file:
        end = file.seek(0, 2)
        cut = False
        if end:
            file.seek(end - 1)
            cut = file.read(1) != b"\n"
        text = "".join(json.dumps(result) + "\n" for result in results)
        file.write((b"\n" if cut else b"") + text.encode())
        file.flush()
        os.fsync(file.fileno())


def median(values: list[float]) -> float:
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
