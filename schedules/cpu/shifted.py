"""A sum of shifted products as it stands in a function: which blocks it is made of, its axes, shifts and operands."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.ir import Call, Range, TensorLoad
from tvm.s_tir import SBlock, SBlockRealize
from tvm.tirx import BufferLoad, BufferStore, PrimFunc, Stmt, Var

from .blocks import REDUCTION
from .gemm import AXES_ANNOTATION
from .tir_tools import collect, constant, sequence, substitute, uses
from .vector_math import op_name

ACCUMULATE_ANNOTATION = "gemmify.accumulate"
HOLD_ANNOTATION = "gemmify.hold"
ROWS_ANNOTATION = "gemmify.rows"


@dataclass(frozen=True, eq=False)
class Product:
    """The GEMM block behind T: its axes by letter (gemm.py), its depth, and the product that it sums."""

    letters: str
    axes: list[Var]
    extents: list[int]
    depth_loops: list[tuple[Var, int]]
    value: Any
    block: Var | None = None
    blocks: int = 1

    @property
    def mr(self) -> int:
        return self.extents[self.letters.index("i")]

    @property
    def nr(self) -> int:
        return self.extents[self.letters.index("j")]

    @property
    def depth(self) -> int:
        return prod(extent for _, extent in self.depth_loops)

    def blocked(self, most: int) -> Product:
        """The same product in `blocks` parts of at most `most` steps of depth, numbered by `block`."""
        var, extent = self.depth_loops[-1]
        size = max(d for d in range(1, extent + 1) if extent % d == 0 and d <= max(1, most))
        if size == extent or size < most // 2:
            return self
        block, step = Var("depth", "int32"), Var("step", "int32")
        value = substitute(self.value, {var: block * size + step})
        return replace(
            self, depth_loops=[*self.depth_loops[:-1], (step, size)], value=value, block=block, blocks=extent // size
        )

    def term(self, outer: list[Any], group: Any, tile: Any, i: Any, panel: Any, j: Any) -> Any:
        """The product summed into row `i`, column `j` of a tile; `outer` stands for the `o` axes ahead of the tile."""
        before = self.letters.index("t")
        inner = {"t": tile, "o": group, "p": panel, "i": i, "j": j}
        values = [*outer, *(inner[letter] for letter in self.letters[before:])]
        return substitute(self.value, dict(zip(self.axes, values, strict=True)))


@dataclass(frozen=True, eq=False)
class Shifted:
    """The parts of a shifted sum; a list over axes has one entry a letter of the annotation.

    `shift` is how far T's index is ahead of the sum's own, an expression in `taps`; `limits` are T's extents. `where`
    says for each axis of T which of the sum's axes (an int) or taps (a Var) indexes it.
    """

    func: PrimFunc
    letters: str
    hold: str
    rows: int
    extents: list[int]
    taps: list[Var]
    tap_extents: list[int]
    source: Any
    where: list[int | Var]
    shift: list[Any]
    limits: list[int]
    product: Product | None
    view: SBlock | None
    output: Any
    output_axes: list[Var]
    output_value: Any
    total: Any
    nests: frozenset[int] = field(default_factory=frozenset)

    def source_value(self, there: list[Any], taps: dict[Var, Any]) -> Any:
        """T's element for a place `there`; where T is only a view of another tensor, that one's."""
        index = self.source_index(there, taps)
        if self.view is None:
            return BufferLoad(self.source, index)
        return substitute(self.view.body.value, {it.var: i for it, i in zip(self.view.iter_vars, index, strict=True)})

    def source_index(self, there: list[Any], taps: dict[Var, Any]) -> list[Any]:
        """T's index for a place `there`, given by the sum's axes."""
        return [there[w] if isinstance(w, int) else taps[w] for w in self.where]

    def output_index(self, at: list[Any]) -> list[Any]:
        """The output's index for the sum's element `at`: a group and its column are one axis there."""
        if len(self.output_axes) == len(at):
            return at
        g = self.letters.index("g")
        return [*at[:g], at[g] * self.extents[-1] + at[-1]]

    @cached_property
    def is_plain_copy(self) -> bool:
        return isinstance(self.output_value, TensorLoad)

    def finish(self, at: list[Any]) -> Stmt:
        """The output block at the sum's element `at`, which it finds in the output itself."""
        index = self.output_index(at)
        value = substitute(self.output_value, dict(zip(self.output_axes, index, strict=True)))
        own = BufferLoad(self.output, index)
        return BufferStore(self.output, _replace_loads(value, self.total, own), index)

    def replace(self, nest: Stmt) -> PrimFunc:
        """The function with `nest` in place of the blocks of the sum."""
        root = self.func.body.block
        parts = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
        first = min(self.nests)
        body = [nest if i == first else part for i, part in enumerate(parts) if i == first or i not in self.nests]
        written = [store.buffer for part in body for store in collect(part, BufferStore)]
        kept = [b for b in root.alloc_buffers if any(b.same_as(w) for w in written)]
        block = SBlock([], [], [], root.name_hint, sequence(body), alloc_buffers=kept, annotations=root.annotations)
        return self.func.with_body(SBlockRealize([], True, block))


def find_shifted(func: PrimFunc) -> Shifted | None:
    """The shifted sum of a function, or None where no block is annotated as one.

    Raises ScheduleError where the annotated block is not what the annotation promises.
    """
    root = getattr(func.body, "block", None)
    if root is None:
        return None
    parts = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    blocks = {i: inside[-1] for i, part in enumerate(parts) if (inside := collect(part, SBlock))}
    at = next((i for i, b in blocks.items() if ACCUMULATE_ANNOTATION in b.annotations), None)
    if at is None:
        return None
    block, total = blocks[at], blocks[at].writes[0].source
    behind = [i for i, b in blocks.items() if any(r.source.same_as(total) for r in b.reads)]
    (out,) = (i for i in behind if i != at)
    letters, hold = str(block.annotations[ACCUMULATE_ANNOTATION]), str(block.annotations[HOLD_ANNOTATION])
    axes = [it.var for it in block.iter_vars if int(it.iter_type) != REDUCTION]
    taps = {it.var: int(it.dom.extent) for it in block.iter_vars if int(it.iter_type) == REDUCTION}
    (load,) = (l for l in collect(block.body, TensorLoad) if not l.source.same_as(total))
    where, shift = _shifts(load, axes, list(taps))
    limits = [int(load.source.shape[where.index(a)]) for a in range(len(axes))]
    extents = [int(it.dom.extent) for it in block.iter_vars if int(it.iter_type) != REDUCTION]
    nests, product = {at, out}, None
    writer = next((i for i, b in blocks.items() if b.writes[0].source.same_as(load.source)), None)
    view = None if writer is None or hold != "all" else blocks[writer]
    if view is not None and writer is not None and isinstance(view.body.value, TensorLoad):
        nests |= {writer}
    else:
        view = None
    if hold != "all":
        _require(writer is not None, "the product is in the function")
        assert writer is not None
        (inner,) = (r.source for r in blocks[writer].reads)
        gemm = next(i for i, b in blocks.items() if b.writes[0].source.same_as(inner))
        product, nests = _product(blocks[gemm]), nests | {writer, gemm}
    store = blocks[out].body
    found = Shifted(
        func=func,
        letters=letters,
        hold=hold,
        rows=int(block.annotations[ROWS_ANNOTATION]),
        extents=extents,
        taps=list(taps),
        tap_extents=list(taps.values()),
        source=load.source,
        where=where,
        shift=shift,
        limits=limits,
        product=product,
        view=view,
        output=store.buffer,
        output_axes=[it.var for it in blocks[out].iter_vars],
        output_value=store.value,
        total=total,
        nests=frozenset(nests),
    )
    _check(found, block, load, blocks[out])
    return found


def _shifts(load: TensorLoad, axes: list[Var], taps: list[Var]) -> tuple[list[int | Var], list[Any]]:
    """Which axis or tap indexes each axis of T, and how far T's index is ahead of each of the sum's axes."""
    analyzer = sym.Analyzer()
    where: list[int | Var] = []
    shift: list[Any] = [None] * len(axes)
    for index in load.indices:
        tap = next((var for var in taps if index.same_as(var)), None)
        if tap is not None:
            where.append(tap)
            continue
        axis = next((a for a, var in enumerate(axes) if uses(index, [var])), None)
        _require(axis is not None, "T is read at its taps and at the sum's own axes")
        assert axis is not None
        where.append(axis)
        shift[axis] = analyzer.simplify(index - axes[axis])
        _require(not uses(shift[axis], axes), "a shift depends on the taps only")
    _require(all(s is not None for s in shift), "every axis of the sum reads its own axis of T")
    return where, shift


def _product(block: SBlock) -> Product:
    spatial = [it for it in block.iter_vars if int(it.iter_type) != REDUCTION]
    depth = [(it.var, int(it.dom.extent)) for it in block.iter_vars if int(it.iter_type) == REDUCTION]
    return Product(
        letters=str(block.annotations[AXES_ANNOTATION]),
        axes=[it.var for it in spatial],
        extents=[int(it.dom.extent) for it in spatial],
        depth_loops=depth,
        value=block.body.value.b,
    )


def _check(found: Shifted, block: SBlock, load: TensorLoad, out: SBlock) -> None:
    """The condition of the sum says no more than that T's element exists; the output reads the sum at its own place."""
    analyzer = sym.Analyzer()
    for it in [*block.iter_vars, *out.iter_vars]:
        analyzer.bind(it.var, Range(0, int(it.dom.extent)))
    exists = [t for i, size in zip(load.indices, load.source.shape, strict=True) for t in (i >= 0, i < size)]
    for call in collect(block.body.value, Call):
        if op_name(call) == "tirx.if_then_else":
            with analyzer.constraint_scope(tirx.all(*exists)):
                _require(analyzer.can_prove(call.args[0]), "the sum leaves out what lies outside T, and nothing else")
    own = _flat(found.output.shape, [it.var for it in out.iter_vars])
    for read in collect(out.body.value, TensorLoad):
        if read.source.same_as(found.total):
            same = analyzer.can_prove_equal(_flat(found.total.shape, read.indices), own)
            _require(same, "the output block reads the sum at its own element")


def _flat(shape: Any, indices: Any) -> Any:
    flat: Any = 0
    for size, index in zip(shape, indices, strict=True):
        flat = flat * constant(size) + index
    return flat


def _replace_loads(value: Any, buffer: Any, by: Any) -> Any:
    """`value` with every load from `buffer` replaced."""

    def change(load: TensorLoad) -> Any:
        return by if load.source.same_as(buffer) else load

    return tvm_ffi.structural_map(value, (TensorLoad, change), order="post")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise s_tir.ScheduleError(f"a shifted sum cannot be scheduled: {what}")
