"""Which core and which plan a GEMM takes: by its operands' dtype, the block tile's model, and the knobs.

float32, float64   the CUDA cores (simt)
float32, TF32      mma.sync in TF32 (or the warp groups)
float16, bfloat16  the warp groups (wgmma) where the code is for sm_90 alone, else mma.sync
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil, prod
from typing import Any

from .block_tiles import (
    MOST_PARTIAL,
    GemmSize,
    Plan,
    blocks_per_sm,
    efficiency,
    group_tiles,
    plans,
    seconds,
    simt_tiles,
    stage_bytes,
    tensor_tiles,
)
from .contraction import HALVES, Contraction
from .core import BlockTile, Core
from .device import MAX_REGISTERS, Gpu
from .epilogue import staged_elements
from .loads import ELEMENT, copy_cost, refuses_copies
from .mma import MmaCore
from .simt import SimtCore
from .wgmma import WgmmaCore

CORES: dict[str, type[Core]] = {"simt": SimtCore, "mma": MmaCore, "wgmma": WgmmaCore}

_TILE = re.compile(r"(simt|mma|wgmma)-(\d+)x(\d+)x(\d+)-(\d+)x(\d+)")


def cores_for(found: Contraction, gpu: Gpu, tf32: bool) -> tuple[str, ...]:
    """The cores that may multiply, the preferred first."""
    if found.dtype != "float32" or found.operand not in (*HALVES, "float32"):
        return ("simt",)
    if found.operand == "float32" and not tf32:
        return ("simt",)
    return ("wgmma", "mma") if gpu.warp_group else ("mma",)


def core_of(name: str, tile: BlockTile, found: Contraction) -> Core:
    """The core of that name for `found`."""
    return CORES[name](tile, found.operand, found.dtype)


def size_of(found: Contraction) -> GemmSize:
    """The sizes that the model looks at."""
    batch, m, n, k = (found.size(letter) for letter in ("batch", "m", "n", "k"))
    element = ELEMENT[found.operand]
    rows = batch * m * k * element
    load = found.a.load
    held = rows if load is None else min(rows, prod(int(extent) for extent in load.source.shape) * element)
    return GemmSize(batch, m, n, k, element, ELEMENT[str(found.result.buffer.dtype)], held)


def tiles_of(name: str, found: Contraction, gpu: Gpu) -> Iterator[BlockTile]:
    """The block tiles that the core `name` offers for `found`."""
    element = ELEMENT[found.operand]
    offered = {"simt": simt_tiles, "mma": tensor_tiles, "wgmma": group_tiles}[name](element)
    for tile in offered:
        if refuses(name, tile, found, gpu) is None:
            yield tile


def refuses(name: str, tile: BlockTile, found: Contraction, gpu: Gpu) -> str | None:
    """Why the core `name` cannot have `tile` for `found`, in one clause, or None."""
    return CORES[name].refuses(tile, found.operand, found.dtype, gpu) or refuses_copies(found, tile, gpu)


def rate_of(name: str, found: Contraction, gpu: Gpu) -> float:
    """Multiply-adds a second of the whole GPU on a core."""
    if name == "simt":
        return gpu.fma if found.dtype == "float32" else gpu.fma / 2
    peak = gpu.half if found.operand in HALVES else gpu.tf32
    # mma.sync reaches about 0.62 of what the warp groups of sm_90 do.
    return peak * 0.62 if name == "mma" and gpu.capability >= (9, 0) else peak


def shared_bytes(name: str, tile: BlockTile, found: Contraction) -> int:
    """Shared memory of a block, with the sums on their way to the output."""
    core = core_of(name, tile, found)
    stages = tile.stages * stage_bytes(core, ELEMENT[found.operand]) + 2 * core.alignment * tile.stages
    return max(stages, staged_elements(core) * ELEMENT[found.dtype] if name != "simt" else 0)


def candidates(found: Contraction, gpu: Gpu, tf32: bool) -> list[tuple[float, str, Plan]]:
    """Every core and plan that fits, with the model's seconds, the fastest first."""
    size = size_of(found)
    result: list[tuple[float, str, Plan]] = []
    for name in cores_for(found, gpu, tf32):
        for offered in tiles_of(name, found, gpu):
            tile = fitted(name, offered, found, gpu)
            if tile is None:
                continue
            extra, issued = copy_cost(found, tile, gpu)
            needed = CORES[name].registers(tile) + extra
            if needed > MAX_REGISTERS:
                continue
            fit = blocks_per_sm(tile, needed, shared_bytes(name, tile, found), gpu)
            rate = rate_of(name, found, gpu) * efficiency(name, tile)
            result += [(seconds(size, plan, fit, rate, gpu, issued), name, plan) for plan in plans(size, tile) if fit]
    result.sort(key=lambda entry: entry[0])
    return result


def fitted(name: str, tile: BlockTile, found: Contraction, gpu: Gpu) -> BlockTile | None:
    """The tile with as many of its stages as fit into shared memory; None where too few do."""
    for stages in range(tile.stages, least_stages(name) - 1, -1):
        fitting = replace(tile, stages=stages)
        if shared_bytes(name, fitting, found) <= gpu.shared_per_block:
            return fitting
    return None


def least_stages(name: str) -> int:
    """Stages that a core needs: one that is copied to, one that is multiplied, and those that it still reads."""
    return 2 + CORES[name].in_flight


def choose(found: Contraction, gpu: Gpu, knobs: Mapping[str, Any], tf32: bool) -> tuple[Plan, str]:
    """The plan and the name of the core: the model's first choice, where no knob says otherwise.

    `tile` fixes the core and the block tile, the others what they are named after; of `stages`, `split_k` and `raster`
    a GEMM takes as much as it can have, so that every value goes with every tile. ValueError for a tile that no core
    can have here, and for what is no positive whole number.
    """
    ranked = candidates(found, gpu, tf32)
    assert ranked, "the smallest tiles fit every GPU"
    asked = knobs.get("tile")
    if asked is not None:
        name, tile = parse_tile(asked, found, gpu, tf32)
        plan = next((p for _, n, p in ranked if n == name and tile_name(n, p.tile) == asked), Plan(tile))
    else:
        _, name, plan = ranked[0]
    if (stages := positive(knobs, "stages")) is not None:
        most = fitted(name, replace(plan.tile, stages=max(stages, least_stages(name))), found, gpu)
        assert most is not None, "the plan's own tile fits with its fewest stages"
        plan = replace(plan, tile=most)
    if (split := positive(knobs, "split_k")) is not None:
        sums = found.size("batch") * found.size("m") * found.size("n")
        split = max(1, min(split, (MOST_PARTIAL - 1) // sums))
        plan = replace(plan, split=possible_split(split, found.size("k"), plan.tile.bk))
    if (raster := positive(knobs, "raster")) is not None:
        columns = ceil(found.size("n") / plan.tile.bn)
        plan = replace(plan, raster=max(w for w in range(1, min(raster, columns) + 1) if columns % w == 0))
    return plan, name


def possible_split(asked: int, k: int, bk: int) -> int:
    """The number of parts, none of them empty, that `asked` parts of whole stages make."""
    stages = ceil(k / bk)
    return ceil(stages / ceil(stages / min(asked, stages)))


def tile_name(core: str, tile: BlockTile) -> str:
    """The value of the knob `tile`: `"mma-128x128x32-2x4"`, core, bm x bn x bk, warps."""
    return f"{core}-{tile.bm}x{tile.bn}x{tile.bk}-{tile.warps_m}x{tile.warps_n}"


def parse_tile(text: Any, found: Contraction, gpu: Gpu, tf32: bool) -> tuple[str, BlockTile]:
    """Core and tile behind `tile_name`, with as many stages as fit, 4 at most; ValueError where that cannot be had."""
    match = _TILE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[1] not in cores_for(found, gpu, tf32):
        wanted = f"{'|'.join(cores_for(found, gpu, tf32))}-bm x bn x bk-warps, for example"
        first = candidates(found, gpu, tf32)[0]
        raise ValueError(f"the knob tile must be {wanted} {tile_name(first[1], first[2].tile)}, found {text!r}")
    bm, bn, bk, warps_m, warps_n = (int(match[i]) for i in range(2, 7))
    tile = BlockTile(bm, bn, bk, warps_m, warps_n, stages=4)
    reason = "no extent of it may be 0" if 0 in (bm, bn, bk, warps_m, warps_n) else None
    reason = reason or refuses(match[1], tile, found, gpu)
    fitting = None if reason else fitted(match[1], tile, found, gpu)
    if fitting is None:
        raise ValueError(f"the knob tile cannot be {text!r}: {reason or 'its stages do not fit into shared memory'}")
    return match[1], fitting


def positive(knobs: Mapping[str, Any], name: str) -> int | None:
    """The knob `name`, None where it is not given; ValueError where it is no whole number above 0."""
    value = knobs.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"the knob {name} must be a whole number of at least 1, found {value!r}")
    return value
