"""A GEMM between chains of small maps (transform, multiply, transform back), block by block in a core's own cache.

1. the chain behind the GEMM gives the loops: blocks, panels, elements of a block, vectors
2. blocks run in parallel; with a chain ahead of the GEMM that chain is computed once a block and the panels follow
one
   another, otherwise panels come first, so that a panel of B is used by every block while it is in the cache
3. the products of one block and panel stay in a buffer of that core
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import s_tir
from tvm.tirx import PrimFunc

from ..machine import Machine
from .chain import CHAIN_ANNOTATION, ONCE_ANNOTATION, place_consumer, schedule_chain
from .gemm import block_order, tile_loops, unroll_reduction, unroll_tile
from .gemm_knobs import REDUCTION, GemmSizes, Knobs


@dataclass(frozen=True, eq=False)
class StagedSizes(GemmSizes):
    """The sizes of a GEMM between chains: a row is one of its blocks, a panel holds all of a block's products.

    `fused` says that a chain ahead of the GEMM is computed in its blocks: then the panels of a block follow one
    another, and the order is not free.
    """

    fused: bool = False

    @property
    def over_tiles(self) -> bool:
        return False

    @property
    def large_b(self) -> bool:
        return True

    @property
    def rows(self) -> int:
        spatial = [v for v in self.node.iter_vars if int(v.iter_type) != REDUCTION]
        return 1 if self.fused else prod(int(v.dom.extent) for v in spatial[: self.letters.index("p")])

    @property
    def panel_bytes(self) -> int:
        return self.operand_bytes(-1) // self.panels

    @property
    def k_unroll(self) -> int:
        return 1


def staged_sizes(gemm: Any, func: PrimFunc, machine: Machine, fused: bool) -> StagedSizes:
    """The sizes of the block `gemm` of a function of chains; `fused` says that one of them is ahead of it."""
    return StagedSizes(gemm, func, machine, serial=True, fused=fused)


def schedule_staged(sch: s_tir.Schedule, chains: list[Any], gemm: Any | None, machine: Machine, knobs: Knobs) -> None:
    """Schedule a function whose blocks are chains, and a GEMM between them if there is one, in place."""
    alone = [c for c in chains if gemm is None or ONCE_ANNOTATION in sch.get(c).annotations]
    for block in alone:
        outer, _ = schedule_chain(sch, block, machine)
        sch.parallel(sch.fuse(*outer, *_serial_loops(sch, block, outer)))
    if gemm is None:
        return
    chains = [c for c in chains if ONCE_ANNOTATION not in sch.get(c).annotations]
    behind = [c for c in chains if _reaches(sch, gemm, c)]
    ahead = [c for c in chains if _reaches(sch, c, gemm)]
    assert len(behind) == 1 and len(ahead) <= 1, "a staged GEMM has one chain behind it and at most one ahead"
    (product,) = sch.get_consumers(gemm)
    (store,) = sch.get_consumers(behind[0])
    sizes = staged_sizes(sch.get(gemm), sch.mod["main"], machine, bool(ahead))
    # 1.
    outer, vector = schedule_chain(sch, behind[0], machine, stop=product)
    place_consumer(sch, store, vector, sizes.lanes)
    sch.set_scope(behind[0], 0, "local")
    # 2.
    if ahead:
        at_block = sch.fuse(*outer[:-1])
        sch.parallel(at_block)
        at_panel = outer[-1]
    else:
        order = block_order(sch, {"o": outer[:-1], "p": outer[-1:], "t": []}, sizes, knobs)
        sch.reorder(*order)
        at_block = at_panel = sch.fuse(*order)
        sch.parallel(at_panel)
    # 3.
    sch.compute_at(product, at_panel, preserve_unit_loops=True)
    sch.compute_at(gemm, at_panel, preserve_unit_loops=True)
    _schedule_product(sch, gemm, product, sizes, knobs)
    for block in ahead:
        sch.compute_at(block, at_block, preserve_unit_loops=True)
        schedule_chain(sch, block, machine, at=at_block)


def _schedule_product(sch: s_tir.Schedule, gemm: Any, product: Any, sizes: GemmSizes, knobs: Knobs) -> None:
    """The register-tiled GEMM inside a block: tile loops, reduction, tile; its result stored vector by vector."""
    spatial, reduction = tile_loops(sch, gemm, sizes.letters)
    sch.reorder(*spatial["o"], *spatial["p"], *spatial["t"], *reduction, *spatial["i"], *spatial["j"])
    sch.set_scope(gemm, 0, "local")
    at = spatial["t"][0]
    sch.reverse_compute_at(product, at, preserve_unit_loops=True)
    unroll_reduction(sch, reduction, sizes, knobs)
    unroll_tile(sch, spatial["i"][0], spatial["j"][0], sizes.lanes)
    init = sch.decompose_reduction(gemm, reduction[0])
    for block in (init, product):
        i, j = sch.get_loops(block)[-2:]
        unroll_tile(sch, i, j, sizes.lanes)


def _serial_loops(sch: s_tir.Schedule, block: Any, outer: list[Any]) -> list[Any]:
    """The `r` loops of a chain block, which stand right behind its outer loops."""
    count = str(sch.get(block).annotations[CHAIN_ANNOTATION]).count("r")
    return sch.get_loops(block)[len(outer) : len(outer) + count]


def _reaches(sch: s_tir.Schedule, source: Any, target: Any) -> bool:
    """Whether the result of block `source` flows into block `target`."""
    frontier = list(sch.get_consumers(source))
    while frontier:
        block = frontier.pop()
        if sch.get(block).name_hint == sch.get(target).name_hint:
            return True
        frontier += sch.get_consumers(block)
    return False
