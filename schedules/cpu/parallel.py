"""When a loop nest is worth the threads, and which of its outer loops share the work."""

from __future__ import annotations

from typing import Any

from tvm import s_tir

from ..machine import Machine
from .tir_tools import constant

# Starting the threads takes about 5 us: what one core does in that time, in elements of simple arithmetic.
SERIAL_WORK = 16384
# Pieces a core, so that one late core costs a quarter of its share at most.
PIECES_PER_CORE = 4


def extent(sch: s_tir.Schedule, loop: Any) -> int:
    """The constant extent of a loop; 1 for a symbolic one."""
    size = constant(sch.get(loop).extent)
    return 1 if size is None else size


def parallelize(sch: s_tir.Schedule, loops: list[Any], work: int, machine: Machine) -> list[Any]:
    """Fuse as many of the outermost `loops` as give every core some pieces, and run them in parallel.

    `loops` are nested, data-parallel and have nothing between them. Work is in elements of simple arithmetic; too
    little of it, or a single core, leaves the loops serial. Returns the loops as they are afterwards.
    """
    if not loops or work < SERIAL_WORK or machine.cores == 1:
        return loops
    wanted = PIECES_PER_CORE * machine.cores
    taken, pieces = 0, 1
    while taken < len(loops) and pieces < wanted:
        pieces *= extent(sch, loops[taken])
        taken += 1
    if pieces == 1:
        return loops
    fused = sch.fuse(*loops[:taken]) if taken > 1 else loops[0]
    sch.parallel(fused)
    return [fused, *loops[taken:]]
