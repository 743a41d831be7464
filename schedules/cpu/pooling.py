"""Tiles for reductions that leave the contiguous axis alone: pooling and means over pixels with channels last.

The channels of a tile are vectors side by side that stay in registers while the window is read; each element of the
input is loaded as part of a vector once a window.
"""

from __future__ import annotations

from ..machine import Machine
from .parallel import PIECES_PER_CORE


def channel_tile(channels: int, dtype: str, tiles_elsewhere: int, machine: Machine) -> int:
    """Elements of the contiguous axis that one tile holds in registers.

    The whole axis where half of the registers hold it; otherwise the largest count of vectors, up to a third of the
    registers, that divides it (else a partial tile at its end). With few tiles along the other axes the tile shrinks
    until every core has some.
    """
    lanes = machine.lanes(dtype)
    most = max(1, machine.vector_registers // 3)
    enough = PIECES_PER_CORE * machine.cores
    vectors = channels // lanes
    if tiles_elsewhere >= enough and channels <= lanes * machine.vector_registers // 2:
        return channels
    if vectors <= 1:
        return channels
    wanted = [v for v in range(most, 0, -1) if vectors % v == 0 and channels % lanes == 0]
    best = next((v for v in wanted if v >= most // 3), min(most, vectors))
    while best > 1 and tiles_elsewhere * (vectors // best) < enough:
        best = max(1, best // 2)
    return best * lanes


def inner_tile(elements: int, dtype: str, machine: Machine) -> int:
    """How many of `elements` accumulators to reduce together where the tile holds more than the registers."""
    lanes = machine.lanes(dtype)
    most = machine.vector_registers // 2
    if elements <= lanes * most:
        return elements
    vectors = elements // lanes
    divisor = next((v for v in range(most, 3, -1) if vectors % v == 0), min(8, most))
    return divisor * lanes
