"""Correctness: every lowering x precision on random inputs, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import reference
from .box import Box
from .loaded import Entry, Libraries, Loaded


def check(box: Box, libraries: Libraries, entry: Entry, seed: int) -> dict[str, Any]:
    """`{error, limit, right, why}`: the largest difference from float64, over the largest absolute output."""
    layer = Loaded(box, libraries, entry)
    try:
        drawn = layer.give(seed)
        layer.prepare()
        layer()
        got = layer.output()
    finally:
        layer.close()
    want = reference.layer(entry["problem"], drawn["data"], drawn["weight"])
    want = reference.epilogue(want, entry["epilogue"], drawn)
    limit = float(entry["limit"])
    largest = float(np.abs(want).max()) or 1.0
    missing = int((~np.isfinite(got)).sum())
    if missing:
        why = f"{missing} of {got.size} outputs are not written, or not finite"
        return {"error": None, "limit": limit, "right": False, "why": why}
    error = float(np.abs(got - want).max()) / largest
    why = "" if error <= limit else f"off by {error:.1e} of the largest output, {limit:.1e} is allowed"
    return {"error": error, "limit": limit, "right": error <= limit, "why": why}
