"""Blocks that map elements: arithmetic, padding, concatenation, slices, resizing, transposition.

1. all accesses in the same order: one flat loop, in chunks, over all cores;
2. contiguous along another axis than the output (a transposition): square tiles, so that both sides use whole
   cache lines;
3. otherwise: outer axes over the cores, the output's contiguous axis innermost, for `vectorize.py`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.ir import TensorLoad
from tvm.tirx import BufferStore, Var

from ..machine import Machine
from .blocks import BlockInfo
from .parallel import PIECES_PER_CORE, SERIAL_WORK, extent, parallelize
from .tir_tools import collect, constant, flat_index, stride_of, uses

# Elements in a piece of a flat loop: long enough that the loop's start is nothing, short enough to balance.
_CHUNK = 2048
# Elements below which an inner loop is worth lengthening.
_SHORT = 256
_TRANSPOSE_TILE = 16
_TRANSPOSE_MIN = 8


def schedule_elementwise(sch: s_tir.Schedule, block: BlockInfo, machine: Machine) -> None:
    """Schedule a block of data-parallel axes at the root; raises TVM's ScheduleError where it is not one."""
    loops = sch.get_loops(block.rv)
    if not loops:
        return
    if len(loops) == len(block.iters) and _same_order(block):
        _flat(sch, loops, block, machine)
        return
    if len(loops) == len(block.iters) and (other := _transposed_axis(block)) is not None:
        _tiled(sch, loops, other, block, machine)
        return
    outer = loops[:-1]
    if all(extent(sch, loop) == 1 for loop in outer) and block.work >= SERIAL_WORK:
        last_outer, _ = sch.split(loops[-1], [None, min(_CHUNK, _pieces(extent(sch, loops[-1]), machine))])
        outer = [*outer, last_outer]
    parallelize(sch, outer, block.work, machine)


def _same_order(block: BlockInfo) -> bool:
    """Every load takes the element that the store writes, of a buffer of the same shape, or one constant element."""
    stores = collect(block.node.body, BufferStore)
    if len(stores) != 1 or not isinstance(block.node.body, BufferStore) or block.write_axes is None:
        return False
    store = stores[0]
    if [v.name for v in block.write_axes] != [it.var.name for it in block.iters]:
        return False
    if _uses_axes_itself(store.value, [it.var for it in block.iters]):
        return False
    return all(_same_access(load, store) for load in block.loads)


def _same_access(load: Any, store: BufferStore) -> bool:
    if all(constant(index) is not None for index in load.indices):
        return True
    return bool(
        tvm_ffi.structural_equal(list(load.source.shape), list(store.buffer.shape))
        and tvm_ffi.structural_equal(list(load.indices), list(store.indices))
    )


def _uses_axes_itself(value: Any, axes: list[Var]) -> bool:
    """Whether the value depends on the position, other than through the indices of its loads."""
    values = tvm_ffi.structural_map(
        value, (TensorLoad, lambda load: tirx.const(0, str(load.source.dtype))), order="post"
    )
    return uses(values, axes)


def _flat(sch: s_tir.Schedule, loops: list[Any], block: BlockInfo, machine: Machine) -> None:
    """Trailing axes fused until they are a few hundred elements long: one inner loop whose index stays linear."""
    position, size = len(loops) - 1, extent(sch, loops[-1])
    while size < _SHORT and position > 0:
        position -= 1
        size *= extent(sch, loops[position])
    outer, inner = loops[:position], loops[position:]
    enough = prod(extent(sch, loop) for loop in outer) >= PIECES_PER_CORE * machine.cores
    longest = _CHUNK if enough else min(_CHUNK, max(_SHORT, _pieces(size, machine)))
    if size > longest and block.work >= SERIAL_WORK:
        first, rest = extent(sch, inner[0]), size // extent(sch, inner[0])
        chunk = longest // rest
        # Only a divisor keeps the fused index linear; a single axis needs no fusing and may end in a partial chunk.
        most = chunk if rest == 1 else max(d for d in range(1, max(1, chunk) + 1) if first % d == 0)
        if most < first:
            many, few = sch.split(inner[0], [None, most])
            outer, inner = [*outer, many], [few, *inner[1:]]
    if len(inner) > 1:
        sch.fuse(*inner)
    parallelize(sch, outer, block.work, machine)


def _pieces(points: int, machine: Machine) -> int:
    """Elements in a piece such that every core gets some: a multiple of a cache line of float32."""
    line = machine.lanes("float32")
    return max(line, -(-points // (PIECES_PER_CORE * machine.cores)) // line * line)


def _transposed_axis(block: BlockInfo) -> int | None:
    """The position of the axis along which the loads are contiguous, where it is not the store's, and both are long."""
    axes, extents = [it.var for it in block.iters], block.extents
    written = block.write_axes
    if written is None or not axes or not written[-1].same_as(axes[-1]) or extents[-1] < _TRANSPOSE_MIN:
        return None
    analyzer = sym.Analyzer()
    for load in block.loads:
        index = flat_index(load)
        if index is None or stride_of(index, axes[-1], analyzer) in (0, 1):
            continue
        for position, axis in enumerate(axes[:-1]):
            if extents[position] >= _TRANSPOSE_MIN and stride_of(index, axis, analyzer) == 1:
                return position
    return None


def _tiled(sch: s_tir.Schedule, loops: list[Any], other: int, block: BlockInfo, machine: Machine) -> None:
    other_outer, other_inner = sch.split(loops[other], [None, _TRANSPOSE_TILE])
    last_outer, last_inner = sch.split(loops[-1], [None, _TRANSPOSE_TILE])
    outer = [*loops[:other], other_outer, *loops[other + 1 : -1], last_outer]
    sch.reorder(*outer, other_inner, last_inner)
    parallelize(sch, outer, block.work, machine)
