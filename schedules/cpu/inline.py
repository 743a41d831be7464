"""Producers -> into their consumers, where that repeats no expensive work and keeps the inner loop in vectors.

A block that only maps elements (arithmetic, padding, concatenation, transposition) disappears into the blocks that
read it. It stays a block of its own when it is expensive and would be computed more than once, or when it pads along
the axis that becomes the vector and a reduction slides a window along that axis: every vector would then need its own
condition. `reduction.py` gives such a block a small buffer beside its consumer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import s_tir
from tvm.s_tir import ScheduleError

from .blocks import REDUCTION, BlockInfo, consumers_of, is_output, root_blocks
from .conditions import branch_conditions
from .tir_tools import uses


def inline_producers(sch: s_tir.Schedule) -> None:
    """Inline every block that passes the rules above, in place."""
    inline_where(sch, _wanted)


def inline_where(sch: s_tir.Schedule, wanted: Callable[[BlockInfo, list[BlockInfo], Any], bool]) -> None:
    """Inline, in place and one after the other, every block for which `wanted(block, all blocks, function)` holds and
    TVM can."""
    func = sch.mod["main"]
    kept: set[str] = set()
    while True:
        blocks = root_blocks(sch)
        block = next((b for b in blocks if b.name not in kept and wanted(b, blocks, func)), None)
        if block is None:
            return
        try:
            sch.compute_inline(block.rv)
        except ScheduleError:
            kept.add(block.name)


def _wanted(block: BlockInfo, blocks: list[BlockInfo], func: Any) -> bool:
    if not block.spatial or len(block.written) != 1 or is_output(block, func) or block.write_axes is None:
        return False
    consumers = consumers_of(block, blocks)
    if not consumers:
        return False
    repeats = sum(consumer.points for consumer in consumers)
    if block.heavy and repeats > block.points:
        return False
    return not any(vector_window(block, consumer) for consumer in consumers)


def vector_window(block: BlockInfo, consumer: BlockInfo) -> bool:
    """A conditional producer that the consumer's reduction reads through a window along its innermost output axis."""
    axes = consumer.write_axes
    if not consumer.is_reduction or not axes or not branch_conditions(block.node.body):
        return False
    reduction = [it.var for it in consumer.iters if it.iter_type == REDUCTION]
    for load in consumer.loads:
        if load.source.same_as(block.written[0]):
            for index, own in zip(load.indices, block.write_axes or [], strict=True):
                windowed = uses(index, [axes[-1]]) and uses(index, reduction)
                if windowed and any(uses(condition, [own]) for condition in branch_conditions(block.node.body)):
                    return True
    return False
