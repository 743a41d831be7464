"""A reduction and everything around it, tile by tile: pooling, softmax, mean, layer norm, LRN.

1. Take the block that writes the result (a reduction that writes it itself gets a small buffer and a copy).
2. Find the axes that every producer shares with it: along these, a piece of the result needs its own piece of each
   producer and nothing is computed twice. softmax: the rows; pooling: all axes.
3. Those loops go outside and over the cores; the contiguous axis, where it is shared, is cut into vectors.
4. Every producer moves inside, so that its buffer holds one piece only: registers or a few cache lines.
5. Inside a reduction, the contiguous axis is innermost: of the result (accumulators in registers) or, where only
   one element is left of it, of the input (`vectorize.py` keeps partial results in lanes).
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir
from tvm.tirx import Var

from ..machine import Machine
from .blocks import REDUCTION, SPATIAL, BlockInfo, consumers_of, is_output
from .inline import vector_window
from .parallel import extent, parallelize
from .pooling import channel_tile, inner_tile
from .tir_tools import uses

_LOCAL_BYTES = 16384
# Elements of padded rows that are prepared together: a quarter of a small first-level cache.
_WINDOW_ELEMENTS = 2048


def group_of(block: BlockInfo, blocks: list[BlockInfo], waiting: set[str], func: Any) -> list[BlockInfo]:
    """The blocks still `waiting` whose results only `block` and one another read, in program order."""
    members: list[BlockInfo] = []
    position = next(i for i, other in enumerate(blocks) if other.name == block.name)
    for other in reversed([one for one in blocks[:position] if one.name in waiting]):
        readers = {reader.name for reader in consumers_of(other, blocks)}
        inside = {block.name, *(member.name for member in members)}
        if readers and readers <= inside and len(other.written) == 1 and not is_output(other, func):
            members.insert(0, other)
    return members


def schedule_group(sch: s_tir.Schedule, block: BlockInfo, members: list[BlockInfo], machine: Machine) -> bool:
    """Steps 2 to 5 for a data-parallel `block` and its producers; False (nothing done) where no axis is shared."""
    axes = block.write_axes
    if not axes or any(member.write_axes is None for member in members) or not members:
        return False
    shared = shared_axes(block, members)
    own = [it.var for it in block.iters]
    found = sch.get_loops(block.rv)
    if not shared or len(found) != len(own):
        return False
    loops = dict(zip([var.name for var in own], found, strict=True))
    last = axes[-1]
    everyone = [*members, block]
    windowed = any(vector_window(m, reader) for m in members if m.spatial for reader in consumers_of(m, everyone))
    tiled = any(last.same_as(var) for var in shared) and not windowed
    outside = [var for var in own if any(var.same_as(s) for s in shared) and not var.same_as(last)]
    inside = [var for var in own if not any(var.same_as(o) for o in outside) and not var.same_as(last)]
    outer = [loops[var.name] for var in outside]
    inner = [loops[var.name] for var in inside]
    last_inner = loops[last.name]
    if tiled:
        others = 1
        for loop_rv in outer:
            others *= extent(sch, loop_rv)
        tile = channel_tile(extent(sch, last_inner), str(block.written[0].dtype), others, machine)
        last_outer, last_inner = sch.split(last_inner, [None, tile])
        outer = [*outer, last_outer]
    if windowed and outer:
        outer, inner = _batch_windows(sch, outer, inner, extent(sch, last_inner))
    if not outer:
        outer = [sch.add_unit_loop(sch.get_loops(block.rv)[0])]
    sch.reorder(*outer, *inner, last_inner)
    work = block.work + sum(member.work for member in members)
    at = parallelize(sch, outer, work, machine)[-1]
    depth = len(sch.get_loops(block.rv)) - len(inner) - 1
    for member in reversed(members):
        sch.compute_at(member.rv, at, preserve_unit_loops=True)
        _inside(sch, member, depth, machine)
    return True


def _batch_windows(sch: s_tir.Schedule, outer: list[Any], inner: list[Any], row: int) -> tuple[list[Any], list[Any]]:
    """Several padded rows at a time: a window reads across the vectors that were just stored, and the processor can
    only do that without waiting once the stores have left its queue."""
    size = extent(sch, outer[-1])
    most = max(1, _WINDOW_ELEMENTS // max(1, row))
    rows = max(factor for factor in range(1, size + 1) if size % factor == 0 and factor <= most)
    if rows == 1:
        return outer, inner
    many, few = sch.split(outer[-1], [None, rows])
    return [*outer[:-1], many], [few, *inner]


def shared_axes(block: BlockInfo, members: list[BlockInfo]) -> list[Var]:
    """The axes of `block` that index, directly or through other members, every member's buffer."""
    axes = block.write_axes or []
    # For each block: its output axis -> the axes of `block` that it follows.
    follows: dict[str, list[set[int]]] = {block.name: [{i} for i in range(len(axes))]}
    for member in reversed(members):
        dims: list[set[int]] = [set() for _ in member.write_axes or []]
        for reader in consumers_of(member, [*members, block]):
            reader_axes, reader_follows = reader.write_axes or [], follows[reader.name]
            for load in reader.loads:
                if load.source.same_as(member.written[0]):
                    for dim, index in enumerate(load.indices):
                        for axis, followed in zip(reader_axes, reader_follows, strict=True):
                            if uses(index, [axis]):
                                dims[dim] |= followed
        follows[member.name] = dims
    reached = [set().union(*follows[member.name]) for member in members]
    return [axis for i, axis in enumerate(axes) if all(i in one for one in reached) or _unit(block, axis)]


def _unit(block: BlockInfo, axis: Var) -> bool:
    sizes = {it.var.name: size for it, size in zip(block.iters, block.extents, strict=True)}
    return sizes[axis.name] == 1


def _inside(sch: s_tir.Schedule, member: BlockInfo, depth: int, machine: Machine) -> None:
    """Step 5, and the member's buffer on the stack where it is small."""
    loops = sch.get_loops(member.rv)[depth:]
    kinds = [int(it.iter_type) for it in member.iters]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == SPATIAL]
    points = 1
    for loop_rv in spatial:
        points *= extent(sch, loop_rv)
    if points * 8 <= _LOCAL_BYTES:
        sch.set_scope(member.rv, 0, "local")
    if member.is_reduction:
        reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == REDUCTION]
        order_reduction(sch, member, spatial, reduction, machine)


def order_reduction(
    sch: s_tir.Schedule, member: BlockInfo, spatial: list[Any], reduction: list[Any], machine: Machine
) -> None:
    """Order the loops of a reduction block (step 5) and take its initial value out of them."""
    vector = spatial[-1] if spatial and extent(sch, spatial[-1]) > 1 else None
    if vector is not None:
        size = extent(sch, vector)
        tile = inner_tile(size, str(member.written[0].dtype), machine)
        head = spatial[:-1]
        if tile < size:
            outer, vector = sch.split(vector, [None, tile])
            head = [*head, outer]
        sch.reorder(*head, *reduction, vector)
    sch.decompose_reduction(member.rv, reduction[0])


def root_reduction(sch: s_tir.Schedule, block: BlockInfo, machine: Machine) -> None:
    """A reduction that stays at the root: its own axes over the cores, then as inside a group."""
    loops = sch.get_loops(block.rv)
    kinds = [int(it.iter_type) for it in block.iters]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == SPATIAL]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == REDUCTION]
    sch.reorder(*spatial, *reduction)
    head = parallelize(sch, spatial[:-1], block.work, machine)
    order_reduction(sch, block, [*head, *spatial[-1:]], reduction, machine)


def split_off_result(sch: s_tir.Schedule, block: BlockInfo) -> BlockInfo:
    """Step 1: a reduction that writes a whole tensor gets a buffer; the copy out of it is returned."""
    copy = sch.cache_write(block.rv, 0, "global")
    return BlockInfo(copy, sch.get(copy))
