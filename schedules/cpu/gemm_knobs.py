"""What is free in the schedule of one GEMM block, read from its annotations and extents alone.

    for po in panels / panel_block:              # the fused product of these four is shared among the threads
        for ro in rows / row_block:
            for pi in panel_block:
                for ri in row_block:
                    for k: C tile += A rows * B panel

A row is one step of the outer axes, or one register tile where there is a single such step and every tile is full. A
panel of B that serves the `row_block` rows of a block must stay in the L2 meanwhile, and so must the block of A that
the panels pass by: what does not is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from tvm.s_tir import SBlock
from tvm.tirx import PrimFunc

from ..machine import Machine
from .blocks import REDUCTION
from .borders import BORDERS_ANNOTATION
from .tir_tools import collect

AXES_ANNOTATION = "gemmify.axes"
ROWS_ANNOTATION = "gemmify.rows"

Knobs = Mapping[str, int | str]
Space = dict[str, tuple[int | str, ...]]

# Waking the other cores and waiting for them takes a few microseconds: a GEMM of fewer cycles runs on one core.
PARALLEL_CYCLES = 12_000
SHORT_REDUCTION = 4
UNROLLS = (1, 2, 4, 8)
MOST_UNROLLED = 256
"""Multiply-adds of vectors that the unrolled steps of a tile may hold: the code of more leaves the decoder's cache."""
PREFETCH_BYTES = (1024, 4096)
BETWEEN = 4
"""Block sizes between the smallest and the largest that are offered."""


@dataclass(frozen=True, eq=False)
class GemmSizes:
    """Extents of a GEMM block by the letter of its axes, and the bytes of its operands as the caches hold them.

    `lead` outer axes stand outside the blocking; `serial` says that one core runs all of it, whatever its size.
    """

    node: Any
    func: PrimFunc
    machine: Machine
    lead: int = 0
    serial: bool = False

    @cached_property
    def letters(self) -> str:
        return str(self.node.annotations[AXES_ANNOTATION])

    @cached_property
    def reduction(self) -> list[int]:
        return [int(v.dom.extent) for v in self.node.iter_vars if int(v.iter_type) == REDUCTION]

    def extent(self, letter: str) -> int:
        """The product of the extents of all axes of a letter, without those that stand outside the blocking."""
        spatial = [v for v in self.node.iter_vars if int(v.iter_type) != REDUCTION]
        named = list(zip(spatial, self.letters, strict=True))[self.lead :]
        return prod(int(v.dom.extent) for v, a in named if a == letter)

    @property
    def lanes(self) -> int:
        return self.machine.lanes(str(self.node.writes[0].source.dtype))

    @cached_property
    def full(self) -> bool:
        """Whether no tile reaches past the last row, and none is cut out for conditions of its own (borders.py)."""
        if BORDERS_ANNOTATION in self.node.annotations:
            return False
        noted = self.node.annotations.get(ROWS_ANNOTATION) if self.lead == 0 else None
        rows = self._stored_rows() if noted is None else int(noted)
        return self.extent("t") * self.extent("i") == rows

    def _stored_rows(self) -> int:
        """The second to last axis of the block that stores the tiles. With groups that axis counts the groups: the last
        tile is then taken for a partial one, which costs time and is never wrong."""
        made = self.node.writes[0].source
        readers = (b for b in collect(self.func.body, SBlock) if any(r.source.same_as(made) for r in b.reads))
        return next(int(b.iter_vars[-2].dom.extent) for b in readers if AXES_ANNOTATION not in b.annotations)

    @property
    def over_tiles(self) -> bool:
        """Whether a row of the blocking is a register tile."""
        return self.extent("o") == 1 and self.full

    @property
    def rows(self) -> int:
        return self.extent("t") if self.over_tiles else self.extent("o")

    @property
    def panels(self) -> int:
        return self.extent("p")

    @cached_property
    def steps(self) -> int:
        """Multiply-adds of the whole block, partial tiles counted whole."""
        return prod(int(v.dom.extent) for v in self.node.iter_vars)

    @property
    def cycles(self) -> int:
        return self.steps // (self.lanes * self.machine.fma_ports)

    def operand_bytes(self, which: int) -> int:
        """Bytes of the tensor that is operand A (0) or B (-1); 0 where nothing is read."""
        reads = list(self.node.reads)
        if not reads:
            return 0  # a layer whose every input element is padding reads nothing at all
        source = reads[which].source
        element = self.machine.vector_bytes // self.machine.lanes(str(source.dtype))
        return prod(int(extent) for extent in source.shape) * element

    @property
    def panel_bytes(self) -> int:
        return prod(self.reduction) * self.extent("j") * self.machine.vector_bytes // self.lanes

    @property
    def large_b(self) -> bool:
        """Whether B is too large for half of a core's L2: its panels then stand outside the rows by default."""
        return not self.serial and self.operand_bytes(-1) > self.machine.l2_bytes // 2

    @property
    def row_block(self) -> int:
        """Rows that meet a panel before the next one by default; tiles of one row of the image all do."""
        return self.rows if self.large_b or self.over_tiles else 1

    @property
    def given(self) -> bool:
        """Whether B is an argument of the function, not made in it."""
        source = list(self.node.reads)[-1].source if len(self.node.reads) else None
        return any(param.same_as(source) for param in self.func.params)

    @property
    def k_unroll(self) -> int:
        """Steps of the reduction that are written out by default."""
        return self.reduction[-1] if self.reduction[-1] <= SHORT_REDUCTION else 1


def gemm_space(sizes: GemmSizes) -> Space:
    """The knobs of a GEMM block, default first; only those that have more than one value."""
    space: Space = {
        "row_block": _row_blocks(sizes),
        "panel_block": _panel_blocks(sizes),
        "k_unroll": _unrolls(sizes),
        "prefetch": _prefetches(sizes),
    }
    return {name: values for name, values in space.items() if len(values) > 1}


def _row_blocks(sizes: GemmSizes) -> tuple[int, ...]:
    if sizes.panels == 1 or sizes.rows == 1:
        return (sizes.row_block,)
    cache, row_bytes = sizes.machine.l2_bytes, sizes.operand_bytes(0) / sizes.rows
    between = [r for r in _between(sizes.rows) if r * row_bytes <= cache] if sizes.panel_bytes <= cache else []
    return _first(sizes.row_block, (1, *spread(between), sizes.rows))


def _panel_blocks(sizes: GemmSizes) -> tuple[int, ...]:
    if sizes.panels == 1 or sizes.rows == 1:
        return (sizes.panels,)
    # One panel at a time is the order of all rows in one block.
    between = [p for p in _between(sizes.panels) if p * sizes.panel_bytes <= sizes.machine.l2_bytes]
    return (sizes.panels, *spread(between))


def _unrolls(sizes: GemmSizes) -> tuple[int, ...]:
    last = sizes.reduction[-1]
    most = MOST_UNROLLED * sizes.lanes // (sizes.extent("i") * sizes.extent("j"))
    found = [u for u in UNROLLS if last % u == 0 and (u <= most or u == 1)]
    return _first(sizes.k_unroll, found)


def _prefetches(sizes: GemmSizes) -> tuple[int, ...]:
    if not sizes.given or sizes.operand_bytes(-1) <= sizes.machine.l1_bytes:
        return (0,)
    return (0, *PREFETCH_BYTES)


def _between(n: int) -> list[int]:
    return [d for d in range(2, n) if n % d == 0]


def spread(values: list[int]) -> list[int]:
    """At most BETWEEN of the sorted `values`, evenly apart in their order."""
    if len(values) <= BETWEEN:
        return values
    return [values[round(i * (len(values) - 1) / (BETWEEN - 1))] for i in range(BETWEEN)]


def _first(default: int, values: Any) -> tuple[int, ...]:
    return (default, *(v for v in dict.fromkeys(values) if v != default))


def divisor(knobs: Knobs, name: str, of: int, what: str, default: int) -> int:
    """The knob `name`, or `default`; ValueError where it is no whole number that divides `of`."""
    value = knobs.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or of % value:
        raise ValueError(f"the knob {name} must be a whole number that divides the {of} {what}, found {value!r}")
    return value


def one_of(knobs: Knobs, name: str, values: tuple[int, ...], default: int) -> int:
    """The knob `name`, or `default`; ValueError where it is none of `values`."""
    value = knobs.get(name, default)
    if isinstance(value, bool) or value not in values:
        raise ValueError(f"the knob {name} must be one of {', '.join(map(str, values))}, found {value!r}")
    return int(value)
