"""Tensors between zones of poison: what a kernel reads or writes beside its tensors shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

# Longer than any overrun of a register tile, a panel or a row of the shapes that tests use.
ZONE_BYTES = 16 << 10
_ALIGNMENT = 64


def poison(dtype: str) -> Any:
    """The value that shows where a kernel has written nothing: NaN, or an offset so far out that a read of it fails."""
    return np.iinfo(dtype).max if np.issubdtype(np.dtype(dtype), np.integer) else np.nan


def on_device(array: np.ndarray, device: tvm.runtime.Device) -> tvm.runtime.Tensor:
    """A copy of `array` on `device`."""
    tensor = tvm.runtime.empty(array.shape, str(array.dtype), device)
    tensor.copyfrom(array)
    return tensor


@dataclass(frozen=True)
class Guarded:
    """A tensor and the memory around it, `ZONE_BYTES` of poison before and behind; on a GPU the tensor alone, because a
    kernel takes no pointer into a larger one there."""

    tensor: tvm.runtime.Tensor
    zones: tuple[np.ndarray, np.ndarray]

    @staticmethod
    def of(array: np.ndarray, device: tvm.runtime.Device | None = None) -> Guarded:
        """A copy of `array` between its zones, aligned as TVM's own tensors are; on `device`, if given."""
        if device is not None and device.dlpack_device_type() != tvm.cpu().dlpack_device_type():
            nothing = np.empty(0, array.dtype)
            return Guarded(on_device(array, device), (nothing, nothing))
        size, zone = array.itemsize, ZONE_BYTES // array.itemsize
        memory = np.full(array.size + 2 * zone + _ALIGNMENT // size, poison(str(array.dtype)), array.dtype)
        start = zone + (-memory.ctypes.data % _ALIGNMENT) // size
        view = memory[start : start + array.size].reshape(array.shape)
        view[...] = array
        return Guarded(tvm.runtime.from_dlpack(view), (memory[:start], memory[start + array.size :]))

    @staticmethod
    def poisoned(shape: Sequence[int], dtype: str, device: tvm.runtime.Device | None = None) -> Guarded:
        """A tensor that holds nothing but poison, between its zones."""
        return Guarded.of(np.full(tuple(shape), poison(dtype), dtype), device)

    @property
    def intact(self) -> bool:
        """Whether the zones still hold poison only."""
        expected = poison(str(self.zones[0].dtype))
        return all(bool(np.all(np.isnan(zone) if expected != expected else zone == expected)) for zone in self.zones)

    @property
    def filled(self) -> bool:
        """Whether no element of the tensor is poison."""
        values = self.tensor.numpy()
        return bool(np.issubdtype(values.dtype, np.integer)) or not bool(np.isnan(values).any())
