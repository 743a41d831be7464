"""Random arrays from seeds, in every dtype of the suite; bfloat16 is held as the upper half of a float32, in uint16."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

STORED: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
}
"""What numpy holds a dtype in."""


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 `values` as they are stored in `dtype`, rounded to the nearest."""
    if dtype != "bfloat16":
        return values.astype(STORED[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """What an array of `dtype` holds, in float64."""
    if dtype != "bfloat16":
        return stored.astype(np.float64)
    return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def poison(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array that shows where nothing was written: NaN, or the largest integer."""
    if dtype == "bfloat16":
        return np.full(shape, 0x7FC0, np.uint16)
    kind = np.dtype(STORED[dtype])
    return np.full(shape, np.nan if kind.kind == "f" else np.iinfo(kind).max, kind)


def random(shape: tuple[int, ...], dtype: str, *seed: int | str) -> np.ndarray:
    """Uniform in -1/2 .. 1/2, as stored; the same for the same seed. A text in the seed counts by its checksum."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in seed]
    values = np.random.default_rng(numbers).random(shape, dtype=np.float32)
    values -= np.float32(0.5)
    return narrow(values, dtype)
