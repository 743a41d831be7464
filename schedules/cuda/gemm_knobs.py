"""The knobs of a GPU's schedules: what is free in the GEMM of a function before it is scheduled.

| knob | values | meaning |
| --- | --- | --- |
| `tile` | `"mma-128x128x32-2x4"` ... | the core, what a block computes of C, k of a stage, its warps along m and n |
| `stages` | 2 .. 6 | stages of A and B in shared memory |
| `split_k` | 1, 2, 3, 4, 6 ... | parts of the reduction, each for blocks of its own |
| `raster` | 1, 2, 4, 8 | column tiles that neighbouring blocks cover before the next rows |

What the space holds is pruned by registers and shared memory, and of the tiles to those that the model of
`block_tiles.py` thinks best. Every value goes with every other: a GEMM takes as many stages as fit with its tile, and
as many parts and column tiles as it has. All that is no GEMM has nothing free here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from tvm.tirx import PrimFunc

from .block_tiles import SPLITS
from .contraction import Contraction, contraction_of
from .device import Gpu
from .gemm_choice import candidates, tile_name

KNOBS = ("tile", "stages", "split_k", "raster")
Knobs = Mapping[str, int | str]
Space = dict[str, tuple[int | str, ...]]

MOST_TILES = 12
"""Tiles that a tuner is offered."""
STAGES = (2, 3, 4, 5, 6)
RASTERS = (1, 2, 4, 8)
LONG_STAGES = 4
"""Stages that every part of a split reduction has at least."""


def require_known(knobs: Knobs) -> None:
    """ValueError for a name that no schedule of a GPU has."""
    if unknown := sorted(set(knobs) - set(KNOBS)):
        raise ValueError(f"no schedule of a GPU has a knob {unknown[0]!r}; the knobs are {', '.join(KNOBS)}")


def gemm_space(found: Contraction, gpu: Gpu, tf32: bool = False) -> Space:
    """The knobs of one GEMM, default first; only those that have more than one value."""
    ranked = candidates(found, gpu, tf32)
    _, name, plan = ranked[0]
    names = list(dict.fromkeys(tile_name(core, other.tile) for _, core, other in ranked))
    stages = ceil(found.size("k") / plan.tile.bk)
    columns = ceil(found.size("n") / plan.tile.bn)
    space: Space = {
        "tile": (tile_name(name, plan.tile), *names[1:MOST_TILES]),
        "stages": _first(plan.tile.stages, STAGES if stages > 1 else ()),
        "split_k": _first(plan.split, [s for s in SPLITS if s == 1 or stages // s >= LONG_STAGES]),
        "raster": _first(plan.raster, [r for r in RASTERS if r <= columns]),
    }
    return {name: values for name, values in space.items() if len(values) > 1}


def knob_space(func: PrimFunc, gpu: Gpu) -> Space:
    """What the schedule of an unscheduled function leaves free on `gpu`: values by name, the default first; {} where it
    has no GEMM. The largest GEMM of a function that has several decides."""
    from .rules import gemm_funcs

    found = [contraction for one in gemm_funcs(func) if isinstance(contraction := contraction_of(one), Contraction)]
    if not found:
        return {}
    largest = max(found, key=lambda c: c.size("batch") * c.size("m") * c.size("n") * c.size("k"))
    tf32 = bool(func.attrs and "gemmify.tf32" in func.attrs and int(func.attrs["gemmify.tf32"]))
    return gemm_space(largest, gpu, tf32)


def _first(default: int, values: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    return (default, *(value for value in values if value != default))
