"""The register tile of a GEMM, chosen from its shape and the machine by a small model of one core.

A reduction step of an `mr x nr` tile (v = nr / lanes vectors) needs, in cycles,

    max( mr v / fma_ports,  (mr + v) / 1.8 loads,  latency 4 while mr v is small,  nr e / 24 bytes of B from the L2 )

and a layer needs that times `k` times the number of tiles, partial tiles counted whole, plus the start and the store of
each tile. The best tile is the cheapest one whose accumulators, one row of B and one element of A fit into registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from ..machine import Machine

FMA_LATENCY = 4
LOADS_PER_CYCLE = 1.8  # of the two that the core can start, what a long loop of broadcasts was seen to reach
L2_BYTES_PER_CYCLE = 24
# Addresses this far apart fall into the same set of an L1 cache of 64 sets of 64 bytes.
L1_SPAN = 4096


@dataclass(frozen=True)
class TileRequest:
    """`outer` rows of `inner` consecutive m each, `groups` GEMMs of `n` columns and `k` steps, elements of `dtype`."""

    outer: int
    inner: int
    n: int
    k: int
    groups: int = 1
    dtype: str = "float32"
    vector_a: bool = False
    nr_divides: bool = False
    mr_divides: bool = False
    row_bytes: int = 0


def candidates(request: TileRequest, machine: Machine) -> list[tuple[int, int]]:
    """Every (mr, nr) that fits the registers: the space a tuner samples from."""
    lanes = machine.lanes(request.dtype)
    widths = [lanes * v for v in range(1, machine.vector_registers // 2)]
    widths = [w for w in widths if w < request.n + lanes]
    if request.nr_divides:
        widths = [w for w in widths if request.n % w == 0]
        if not widths:
            narrow = lanes
            while request.n % narrow:
                narrow //= 2
            widths = [narrow]
    tiles = []
    for nr in widths:
        v = max(1, nr // lanes)
        spare = machine.vector_registers - 1 - v * (2 if request.vector_a else 1)
        rows = range(1, min(spare // v, request.inner) + 1)
        tiles += [(mr, nr) for mr in rows if not request.mr_divides or request.inner % mr == 0]
    return tiles or [(1, lanes)]


def modelled_cycles(request: TileRequest, machine: Machine, mr: int, nr: int) -> float:
    """Cycles of all cores for the whole GEMM with this tile, by the module's model."""
    lanes = machine.lanes(request.dtype)
    v = max(1, nr // lanes)
    loads = mr * v + v if request.vector_a else mr + v
    if _rows_in_a_set(request, mr) > 1.5 * machine.l1_bytes / L1_SPAN:
        loads *= 4  # the rows of A evict one another: each element comes from the L2
    step = max(
        mr * v / machine.fma_ports,
        loads / LOADS_PER_CYCLE,
        FMA_LATENCY,
        v * machine.vector_bytes / L2_BYTES_PER_CYCLE,
    )
    tile_cost = request.k * step + 2.0 * mr * v + 12
    row_tiles = -(-request.inner // mr)
    panels = request.groups * -(-request.n // nr)
    tasks = request.outer * panels * (row_tiles if request.inner % mr == 0 else 1)
    # Static shares: the slowest core does ceil(tasks / cores) of them.
    balance = -(-tasks // machine.cores) * machine.cores / tasks
    return tile_cost * request.outer * row_tiles * panels * balance


def _rows_in_a_set(request: TileRequest, mr: int) -> int:
    """How many of a tile's rows of A fall into one set of the L1 cache (1,024 channels of float32 are 4 KiB apart)."""
    if request.vector_a or request.row_bytes == 0:
        return 1
    return -(-mr * gcd(request.row_bytes, L1_SPAN) // L1_SPAN)


@lru_cache(maxsize=4096)
def choose_tile(request: TileRequest, machine: Machine) -> tuple[int, int]:
    """The (mr, nr) of the least modelled time; ties go to the larger tile."""
    return min(
        candidates(request, machine),
        key=lambda tile: (modelled_cycles(request, machine, *tile), -tile[0] * tile[1]),
    )
