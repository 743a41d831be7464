"""A layer of the bundle: its kernels, with all tensors on the GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arrays
from .box import Array, Box
from .ffi import Module

Entry = dict[str, Any]
Call = tuple[Callable[..., Any], tuple[Any, ...]]


class Libraries:
    """The libraries of a bundle, each loaded once."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self._loaded: dict[str, Module] = {}

    def __getitem__(self, name: str) -> Module:
        if name not in self._loaded:
            self._loaded[name] = self.box.runtime.load(os.path.join(self.box.folder, name))
        return self._loaded[name]


class Loaded:
    """An entry that is ready to run. Everything that a kernel writes holds NaN until it does."""

    def __init__(self, box: Box, libraries: Libraries, entry: Entry, poison: bool = True) -> None:
        self.box, self.entry = box, entry
        self.arrays: dict[str, Array] = {}
        try:
            for name, (shape, dtype) in entry["tensors"].items():
                self.arrays[name] = box.array(tuple(shape), dtype)
            module = libraries[entry["library"]]
            self.once, self.calls = ([self._call(module, call) for call in entry[part]] for part in ("once", "calls"))
            written = {
                call["arguments"][i] for part in ("once", "calls") for call in entry[part] for i in call["writes"]
            }
            self.given = [name for name in entry["tensors"] if name not in written]
            for name in written if poison else ():
                self.arrays[name].poison()
        except BaseException:
            self.close()
            raise

    def _call(self, module: Module, call: dict[str, Any]) -> Call:
        return module[call["symbol"]], tuple(self.arrays[name].tensor for name in call["arguments"])

    def prepare(self) -> None:
        """Transform the weight, and fill tables."""
        for function, arguments in self.once:
            function(*arguments)
        self.box.cuda.synchronize()

    def __call__(self) -> None:
        """Launch the layer once."""
        for function, arguments in self.calls:
            function(*arguments)

    def output(self) -> np.ndarray:
        """The output in float64, channels last."""
        self.box.cuda.synchronize()
        found = self.arrays[self.entry["output"]].get().reshape(self.entry["output_shape"])
        return np.moveaxis(found, 1, -1) if self.entry["layout"] == "NCHW" else found

    def give(self, seed: int) -> dict[str, np.ndarray]:
        """Draw every given tensor from `seed`; returns them in float64, channels last."""
        drawn = {}
        for name in self.given:
            array = self.arrays[name]
            shape = channels_last(array.shape) if self.turned(name) else array.shape
            stored = arrays.random(shape, array.dtype, seed, self.entry["id"], name)
            drawn[name] = arrays.widen(stored, array.dtype)
            array.put(np.moveaxis(stored, -1, 1) if self.turned(name) else stored)
        return drawn

    def turned(self, name: str) -> bool:
        """Whether the tensor is an activation that the lowering takes channels first."""
        return self.entry["layout"] == "NCHW" and name in self.entry["activations"]

    def close(self) -> None:
        """Give all memory back."""
        self.box.cuda.synchronize()
        for array in self.arrays.values():
            array.close()
        self.arrays = {}


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:], shape[1])
