"""What the schedule rules ask about the blocks of a PrimFunc: their axes, what they cost, who reads whom."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import Call, TensorLoad
from tvm.tirx import BufferStore, IterVar, Var

from .tir_tools import collect, constant
from .vector_math import HEAVY_CALLS, op_name

SPATIAL, REDUCTION = 0, 2
# What an element of a heavy function costs, in elements of simple arithmetic.
_HEAVY_COST = 8


@dataclass(frozen=True)
class BlockInfo:
    """One block at the root: its schedule handle, its name, and its TIR as it is now."""

    rv: Any
    node: Any

    @property
    def name(self) -> str:
        return str(self.node.name_hint)

    @property
    def iters(self) -> list[IterVar]:
        return list(self.node.iter_vars)

    @property
    def extents(self) -> list[int]:
        """Constant extents of all axes; -1 for a symbolic one."""
        return [-1 if (size := constant(it.dom.extent)) is None else size for it in self.iters]

    @property
    def spatial(self) -> bool:
        return all(it.iter_type == SPATIAL for it in self.iters)

    @property
    def is_reduction(self) -> bool:
        """Spatial and reduction axes, one initial value and one updated buffer."""
        kinds = {int(it.iter_type) for it in self.iters}
        return REDUCTION in kinds and kinds <= {SPATIAL, REDUCTION} and self.node.init is not None

    @property
    def points(self) -> int:
        """Iterations of the whole block (0 where a size is symbolic)."""
        return max(0, prod(self.extents)) if min(self.extents, default=1) > 0 else 0

    @property
    def work(self) -> int:
        """Iterations, weighted by what one costs, in elements of simple arithmetic."""
        return self.points * (_HEAVY_COST if self.heavy else 1)

    @property
    def heavy(self) -> bool:
        """Whether the body calls a transcendental function."""
        return any(op_name(call) in HEAVY_CALLS for call in collect(self.node.body, Call))

    @property
    def loads(self) -> list[TensorLoad]:
        return collect(self.node.body, TensorLoad)

    @property
    def written(self) -> list[Any]:
        return [region.source for region in self.node.writes]

    @property
    def read(self) -> list[Any]:
        return [region.source for region in self.node.reads]

    @property
    def write_axes(self) -> list[Var] | None:
        """The axis variables that index the single written buffer, in its order; None where an index is not one."""
        stores = collect(self.node.body, BufferStore)
        if len(stores) != 1 or not isinstance(self.node.body, BufferStore):
            return None
        own = [it.var for it in self.iters]
        found: list[Var] = []
        for index in stores[0].indices:
            if constant(index) == 0 and constant(stores[0].buffer.shape[len(found)]) == 1:
                unit = next((it.var for it in self.iters if constant(it.dom.extent) == 1), None)
                index = unit if unit is not None else index
            if not any(index.same_as(var) for var in own):
                return None
            found.append(index)
        return found


def root_blocks(sch: s_tir.Schedule) -> list[BlockInfo]:
    """The blocks directly under the root, in program order."""
    return [BlockInfo(rv, sch.get(rv)) for rv in sch.get_child_blocks(sch.get_sblock("root"))]


def consumers_of(block: BlockInfo, blocks: list[BlockInfo]) -> list[BlockInfo]:
    """The other blocks that read what `block` writes."""
    return [b for b in blocks if b.name != block.name and _shares(b.read, block.written)]


def is_output(block: BlockInfo, func: tirx.PrimFunc) -> bool:
    """Whether the block writes a parameter of the function."""
    return _shares(block.written, list(func.params))


def _shares(some: list[Any], others: list[Any]) -> bool:
    return any(a.same_as(b) for a in some for b in others)
