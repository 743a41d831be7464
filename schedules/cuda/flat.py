"""Buffers of any rank addressed by one row-major index."""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import tirx
from tvm.ir import TensorLoad
from tvm.tirx import Var


class FlatViews:
    """The flat buffers that stand for those of any rank in the expressions of one function, by the real buffer."""

    def __init__(self) -> None:
        self.views: dict[Var, Var] = {}

    def of(self, buffer: Var) -> Var:
        """The flat buffer of `buffer`, whose shape is constant."""
        if buffer not in self.views:
            size = prod(int(extent) for extent in buffer.shape)
            self.views[buffer] = tirx.decl_buffer((size,), str(buffer.dtype), buffer.name, scope=buffer.scope())
        return self.views[buffer]

    def load(self, buffer: Var, index: Any) -> TensorLoad:
        """The element at row-major `index`."""
        return tirx.BufferLoad(self.of(buffer), [index])
