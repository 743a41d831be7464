"""Numbers that describe one point of one task, so that what was measured on one layer says something about another.

`vector` gives the fixed part, from formulas alone: the layer's sizes, its GEMM, the tile and what of it is wasted,
modelled cycles, bytes, the lowering. `knob_values` gives the free sizes and knobs by name, because plugins and later
versions add names: `table` puts those of a vocabulary behind the fixed part. What a point does not set is NaN, which
the trees of XGBoost take for "by default".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log2, prod

import numpy as np

from lowering import LOWERINGS, ConvProblem, DenseProblem, Lowering, LoweringCost, Problem, Tile
from lowering.problem import accumulator
from schedules import AnyMachine, Gpu, Machine
from schedules.cpu.tile import TileRequest, modelled_cycles

from ..kernels import on_machine, tile_request
from ..select import modelled_time
from .point import Knobs, Point, Value
from .task import Task

DIMS = 3


def _log(value: float) -> float:
    """A logarithm that 0 has too."""
    return log2(1.0 + value)


@lru_cache(maxsize=65536)
def _formulas(task: Task, key: str, sizes: Knobs, tile: Tile, machine: AnyMachine) -> np.ndarray:
    problem = on_machine(task.problem, machine)
    lowering = Point(key, tile, sizes).configured()
    if (reason := lowering.applicable(problem)) is not None:
        raise ValueError(f"{key} does not apply: {reason}")
    lowering.require_sizes(problem)
    cost, request = lowering.cost(problem, tile), tile_request(lowering, problem)
    values = [*_task_features(task)]
    if isinstance(machine, Machine):
        values += _tile_features(request, tile, machine)
    values += _cost_features(lowering, problem, tile, cost, machine)
    values += [float(key == known) for known in LOWERINGS]
    return np.array(values, np.float32)


@lru_cache(maxsize=4096)
def _task_features(task: Task) -> tuple[float, ...]:
    """The layer: kind, sizes as logarithms, epilogue."""
    p = task.problem
    kind = (float(isinstance(p, ConvProblem)), float(isinstance(p, DenseProblem)))
    if isinstance(p, DenseProblem):
        windows: list[tuple[int, ...]] = [(1,) * DIMS] * 5
        groups, pixels, taps = 1, 1, 1
    else:
        windows = [_padded(side) for side in (p.size, p.kernel, p.stride, p.dilation, p.out_size)]
        groups, pixels, taps = p.groups, p.pixels, p.taps
    sizes = (
        p.n,
        p.c,
        p.m,
        groups,
        pixels,
        taps,
        p.macs,
        p.element,
        p.scratch_element,
        *(v for w in windows for v in w),
    )
    tensors = sum(op.operand is not None for op in task.epilogue)
    return (*kind, *map(_log, sizes), float(len(task.epilogue)), float(tensors))


def _padded(side: tuple[int, ...]) -> tuple[int, ...]:
    """One entry for each of three dimensions, outer ones that are missing as 1."""
    return (*(1,) * (DIMS - len(side)), *side)


def _tile_features(request: TileRequest, tile: Tile, machine: Machine) -> list[float]:
    """The register tile and what of it lies past the edges; the axes it was chosen for."""
    lanes = machine.lanes(request.dtype)
    vectors = max(1, tile.nr // lanes)
    rows, columns = -(-request.inner // tile.mr) * tile.mr, -(-request.n // tile.nr) * tile.nr
    cycles = modelled_cycles(request, machine, tile.mr, tile.nr)
    ideal = request.outer * request.inner * request.n * request.k * request.groups / (lanes * machine.fma_ports)
    axes = (request.outer, request.inner, request.n, request.k, request.groups, request.row_bytes)
    panels = request.outer * (rows // tile.mr) * (columns // tile.nr) * request.groups
    return [
        *map(_log, axes),
        *map(_log, (tile.mr, tile.nr, vectors, tile.mr * vectors, panels)),
        tile.mr * vectors / machine.vector_registers,
        rows / request.inner,
        columns / request.n,
        cycles / ideal,
        _log(cycles),
        _log(request.k * tile.nr * 4),
    ]


def _cost_features(
    lowering: Lowering, problem: Problem, tile: Tile, cost: LoweringCost, machine: AnyMachine
) -> list[float]:
    """What the formulas say of the whole layer: work, bytes, scratch, GEMM sizes, modelled time."""
    gemm = max(cost.gemms, key=lambda g: g.macs)
    moved = cost.bytes_moved + 2 * cost.workspace_bytes
    time = modelled_time(lowering, problem, machine, tile, cost)
    scratch = (cost.workspace_bytes, cost.weight_bytes, cost.thread_bytes, cost.shared_bytes, moved)
    tasks = cost.tasks or 0
    return [
        *map(_log, (gemm.m, gemm.n, gemm.k, gemm.count, cost.macs, cost.extra_flops, *scratch, cost.weight_reads)),
        cost.macs / problem.macs,
        cost.macs / max(1, moved),
        cost.weight_bytes / machine.l2_bytes,
        cost.thread_bytes / machine.l2_bytes,
        cost.read_factor,
        _log(tasks),
        _log(time),
        time * _macs_a_unit(problem, machine) / problem.macs,
    ]


def _macs_a_unit(problem: Problem, machine: AnyMachine) -> float:
    """Multiply-adds that the machine does in one unit of `modelled_time`: a cycle of a CPU, 1 ns of a GPU."""
    if isinstance(machine, Gpu):
        return 1e-9 * (machine.half if accumulator(problem.dtype) != problem.dtype else machine.fma)
    return float(machine.cores * machine.fma_ports * machine.lanes(accumulator(problem.dtype)))


def vector(task: Task, point: Point, machine: AnyMachine) -> np.ndarray:
    """The fixed part for one point, float32, of the same length for all; ValueError for a lowering that
    is not known or does not apply, and for sizes that do not fit."""
    return _formulas(task, point.lowering, point.sizes, point.tile, machine)


def knob_values(point: Point) -> dict[str, float]:
    """The free sizes and knobs that a point sets, by name: numbers as logarithms, a word as 1 under `name=word`, a
    tuple as the logarithm of its product and of its last entry, sizes such as "128x64x32" as that of each."""
    found: dict[str, float] = {}
    for name, value in (*point.sizes, *point.schedule):
        found |= _knob(name, value)
    return found


def _knob(name: str, value: Value) -> dict[str, float]:
    if isinstance(value, bool):
        return {name: float(value)}
    if isinstance(value, str):
        sides = value.split("x")
        if len(sides) > 1 and all(side.isdigit() for side in sides):
            return {f"{name}[{place}]": _log(int(side)) for place, side in enumerate(sides)}
        return {f"{name}={value}": 1.0}
    if isinstance(value, tuple):
        return {name: _log(abs(prod(value))), f"{name}[-1]": _log(abs(value[-1])) if value else 0.0}
    return {name: _log(abs(value))}


def table(fixed: Sequence[np.ndarray], knobs: Sequence[dict[str, float]], names: Sequence[str]) -> np.ndarray:
    """`(points, fixed part + names)` in float32 from `vector` and `knob_values` of each point."""
    column = {name: index for index, name in enumerate(names)}
    part = np.full((len(fixed), len(names)), np.nan, np.float32)
    for row, values in enumerate(knobs):
        for name, value in values.items():
            if name in column:
                part[row, column[name]] = value
    return np.hstack([np.stack(fixed), part])
