"""The weights of a network: drawn by their names from the seed that the bundle names, so that none need travel."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from . import arrays

Weight = dict[str, Any]
"""`{name, shape, low, high}` of a uniform weight, or `{name, shape, values}` of one that is given."""


def draw(weight: Weight, seed: int) -> np.ndarray:
    """The weight in float32: uniform in [low, high), the same for the same seed and name."""
    if "values" in weight:
        return np.asarray(weight["values"], np.float32).reshape(weight["shape"])
    generator = np.random.default_rng([seed, zlib.crc32(weight["name"].encode())])
    values = generator.random(weight["shape"], dtype=np.float32)
    values *= np.float32(weight["high"] - weight["low"])
    values += np.float32(weight["low"])
    return values


def arranged(values: np.ndarray, recipe: Weight, dtype: str) -> np.ndarray:
    """The weight as the compiled network takes it: seen in the shape `as`, its axes permuted, stored in `dtype`."""
    return arrays.narrow(np.ascontiguousarray(values.reshape(recipe["as"]).transpose(recipe["axes"])), dtype)
