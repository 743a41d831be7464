"""A PrimFunc of blocks -> parts, each of which becomes one kernel.

1. what only maps elements goes into its readers, where that repeats no work worth the name;
2. a sum of shifted products that are held in registers is one product (merge.py);
3. from the last block to the first: the transforms of a tile (chain.py); a product of matrices and what is done to its
   result; equations that agree on their rows (rows.py); a sum and the map behind it; anything else on its own;
4. a product between two chains joins them where what lies between fits in shared memory (staged.py).

A tensor that lies between two parts is scratch: a parameter of the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from tvm import s_tir, sym, tirx
from tvm.ir import Range
from tvm.tirx import BufferLoad, BufferStore, ForKind, Var

from ..cpu.blocks import BlockInfo, consumers_of, is_output, root_blocks
from ..cpu.inline import inline_where
from ..cpu.tir_tools import loop, substitute, uses
from .chain import Chain, find_chain, placed
from .equation import Equation, equation_of, map_loads, same
from .merge import merged
from .rows import Rows, find_rows
from .staged import Staged, find_staged

AXES_ANNOTATION = "gemmify.axes"
COPY_ANNOTATION = "gemmify.copy"
CHAINED = ("gemmify.chain", "gemmify.step", "gemmify.sweep")
REPEATS = 4
"""An element that is read more often than this is computed once, unless it is only moved."""

Kind = Literal["gemm", "sum", "map", "chain", "rows", "staged"]


@dataclass(frozen=True, eq=False)
class Part:
    """One kernel to be: its equations in order; the last one's result is seen by others."""

    kind: Kind
    equations: tuple[Equation, ...]
    nests: tuple[Any, ...]
    """The loop nests of the blocks, as they stand in the function."""
    chain: Chain | None = None
    rows: Rows | None = None
    staged: Staged | None = None

    @property
    def result(self) -> Equation:
        return self.equations[-1]


def partition(func: tirx.PrimFunc) -> tuple[tirx.PrimFunc, list[Part]]:
    """(the function with its producers inlined, its parts in order). Raises NotAnEquation and TVM's ScheduleError."""
    sch = s_tir.Schedule(func, error_render_level="none")
    inline(sch)
    columns_last(sch)
    func = sch.mod["main"]
    blocks = root_blocks(sch)
    found = list(nests(func))
    assert len(found) == len(blocks), "every root block has a nest of its own"
    equations = [equation_of(block) for block in blocks]
    if (whole := merged(equations)) is not None:
        last = next(i for i, eq in enumerate(equations) if eq.buffer.same_as(whole.buffer))
        equations, found = [whole, *equations[last + 1 :]], [nest_of(whole), *found[last + 1 :]]
    parts = list(reversed(list(_parts(equations, found, func))))
    return func, list(_together(parts, equations, list(func.params)))


def _together(parts: list[Part], equations: list[Equation], kept: list[Any]) -> Iterator[Part]:
    """The parts, a product between chains and these chains as one where that fits (staged.py)."""
    while parts:
        first, *rest = parts
        if [part.kind for part in parts[:3]] == ["chain", "gemm", "chain"]:
            ahead, gemm, behind = parts[:3]
            assert ahead.chain is not None and behind.chain is not None
            staged = find_staged(ahead.chain, gemm.equations, behind.chain, equations, kept)
            if staged is not None:
                yield Part("staged", (*ahead.equations, *gemm.equations, *behind.equations), (), staged=staged)
                parts = parts[3:]
                continue
        yield first
        parts = rest


def nests(func: tirx.PrimFunc) -> Iterator[Any]:
    """The statements of a function's root block, one a block."""
    body = func.body.block.body if isinstance(func.body, s_tir.SBlockRealize) else func.body
    yield from body.seq if isinstance(body, tirx.SeqStmt) else [body]


def _parts(equations: list[Equation], nests: list[Any], func: tirx.PrimFunc) -> Iterator[Part]:
    waiting = list(range(len(equations)))
    while waiting:
        last = waiting.pop()
        eq = equations[last]
        if eq.reduced:
            yield Part("sum", (eq,), (nests[last],))
            continue
        before = [equations[i] for i in waiting if not _ends_product(equations[i], equations)]
        if (chain := find_chain(eq, before, equations, list(func.params))) is not None:
            waiting = [i for i in waiting if not any(equations[i] is step for step in chain.steps)]
            whole = chain.steps if chain.behind is None else (*chain.steps, chain.behind)
            yield Part("chain", whole, (), chain)
            continue
        ahead = next((i for i in reversed(waiting) if joins(equations[i], eq, equations, func)), None)
        if ahead is None and (rows := find_rows(eq, before, equations, list(func.params))) is not None:
            waiting = [i for i in waiting if not any(equations[i] is one for one in rows.equations)]
            yield Part("rows", rows.equations, (), rows=rows)
            continue
        if ahead is None:
            yield Part("map", (eq,), (nests[last],))
            continue
        waiting.remove(ahead)
        total = equations[ahead]
        if AXES_ANNOTATION not in total.annotations:
            yield Part("sum", (total, eq), ())
        elif (regular := over_product(total, eq)) is None:
            yield Part("gemm", (total, eq), (nests[ahead], nests[last]))
        else:
            yield Part("gemm", (total, regular), (nests[ahead], nest_of(regular)))


def over_product(total: Equation, behind: Equation) -> Equation | None:
    """The map `behind` a product over the product's own axes, where it reads it through divisions of its axes; None
    where it reads it axis by axis already, or not each element once."""
    read = behind.reads(total.buffer)[0]
    if not any(isinstance(index, tirx.FloorDiv | tirx.FloorMod) for index in read.indices):
        return None
    axes, extents = tuple(axis for axis, _ in total.spatial), tuple(extent for _, extent in total.spatial)
    result = Equation(total.name, axes, extents, (False,) * len(axes), total.buffer, total.indices, read, None)
    if len(total.indices) != len(axes):
        return None
    copy = result.renamed()
    moved = placed(copy, behind)
    if moved is None or moved[1]:
        return None
    analyzer = sym.Analyzer()
    for axis, extent in zip(copy.axes, copy.extents, strict=True):
        analyzer.bind(axis, Range(0, extent))

    def here(expr: Any) -> Any:
        return analyzer.simplify(substitute(expr, moved[0]))

    load = BufferLoad(total.buffer, list(copy.axes))
    value = map_loads(substitute(behind.value, moved[0]), lambda l: load if l.source.same_as(total.buffer) else l)
    indices = tuple(here(i) for i in behind.indices)
    return replace(behind, axes=copy.axes, extents=copy.extents, reduction=copy.reduction, indices=indices, value=value)


def nest_of(eq: Equation) -> Any:
    """The loop nest of an equation, as a block of its own."""
    loops = [Var(axis.name, "int32") for axis in eq.axes]
    axes = zip(eq.axes, eq.extents, eq.reduction, strict=True)
    kinds = [tirx.IterVar(Range(0, extent), axis, 2 if summed else 0, "") for axis, extent, summed in axes]
    whole = [tirx.BufferRegion(b, [Range(0, size) for size in b.shape]) for b in (*eq.sources, eq.buffer)]
    store = BufferStore(eq.buffer, eq.value, list(eq.indices))
    init = None if eq.init is None else BufferStore(eq.buffer, eq.init, list(eq.indices))
    block = s_tir.SBlock(kinds, whole[:-1], whole[-1:], eq.name, store, init=init, annotations=eq.annotations)
    body: Any = s_tir.SBlockRealize(loops, True, block)
    for var, extent in reversed(list(zip(loops, eq.extents, strict=True))):
        body = loop(var, extent, ForKind.SERIAL, body)
    return body


def joins(total: Equation, behind: Equation, equations: list[Equation], func: tirx.PrimFunc) -> bool:
    """Whether `behind` maps the sum `total` element by element and nobody else reads it."""
    if not total.reduced or behind.reduced or any(total.buffer.same_as(param) for param in func.params):
        return False
    reads = behind.reads(total.buffer)
    readers = [eq for eq in equations if eq is not total and eq.reads(total.buffer)]
    if not reads or len(readers) != 1 or behind.points > total.points:
        return False
    return all(same(read, reads[0]) for read in reads)


def _ends_product(eq: Equation, equations: list[Equation]) -> bool:
    """Whether `eq` maps the result of a product of matrices."""
    products = [p for p in equations if AXES_ANNOTATION in p.annotations]
    return any(eq.reads(p.buffer) for p in products)


def inline(sch: s_tir.Schedule) -> None:
    """Step 1, in place."""
    inline_where(sch, _wanted)


def columns_last(sch: s_tir.Schedule) -> None:
    """Scratch that a product of matrices fills is stored row by row: the axes along n last, in place."""
    for block in [b for b in root_blocks(sch) if AXES_ANNOTATION in b.node.annotations]:
        letters = str(block.node.annotations[AXES_ANNOTATION])
        readers = consumers_of(block, root_blocks(sch))
        if len(readers) != 1 or not readers[0].spatial or is_output(readers[0], sch.mod["main"]):
            continue
        (reader,) = readers
        axes, (load, *_) = reader.write_axes, [x for x in reader.loads if x.source.same_as(block.written[0])]
        if axes is None:
            continue
        columns = [i for i, letter in zip(load.indices, letters, strict=True) if letter in "pj"]
        last = [d for d, axis in enumerate(axes) if any(uses(index, [axis]) for index in columns)]
        order = [d for d in range(len(axes)) if d not in last] + last
        if order != list(range(len(axes))):
            sch.transform_layout(reader.rv, ("write", 0), _permutation(order))


def _permutation(order: list[int]) -> Callable[..., list[Any]]:
    return lambda *index: [index[d] for d in order]


def _wanted(block: BlockInfo, blocks: list[BlockInfo], func: Any) -> bool:
    if not block.spatial or len(block.written) != 1 or is_output(block, func) or block.write_axes is None:
        return False
    consumers = consumers_of(block, blocks)
    if not consumers or COPY_ANNOTATION in block.node.annotations or _chained(block, blocks):
        return False
    if _behind_sum(block, blocks):
        # The result of a sum stays with it, unless its reader does as well.
        return len(consumers) == 1 and consumers[0].spatial and consumers[0].points == block.points
    repeats = sum(consumer.points * _times(block, consumer) for consumer in consumers)
    if block.heavy:
        return repeats <= block.points
    return repeats <= REPEATS * block.points or _moves(block)


def _times(block: BlockInfo, consumer: BlockInfo) -> int:
    return sum(load.source.same_as(block.written[0]) for load in consumer.loads)


def _moves(block: BlockInfo) -> bool:
    """Whether an element of the block is one element of one source, or a constant."""
    return len(block.loads) <= 1


def _behind_sum(block: BlockInfo, blocks: list[BlockInfo]) -> bool:
    sums = [b for b in blocks if not b.spatial]
    return any(load.source.same_as(b.written[0]) for b in sums for load in block.loads if len(b.written) == 1)


def _chained(block: BlockInfo, blocks: list[BlockInfo]) -> bool:
    """Whether the block is a step of a chain, or feeds one."""
    if any(name in block.node.annotations for name in CHAINED):
        return True
    readers = consumers_of(block, blocks)
    return any(reader.spatial and _chained(reader, blocks) for reader in readers)
