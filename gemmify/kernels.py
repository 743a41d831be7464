"""One layer to its kernels: a lowering's stages, each compiled to a scheduled PrimFunc of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod

from tvm import te, tirx

from lowering import Lowering, LoweringCost, Problem, Reason, Stage, Tile
from lowering.backward import GradientProblem
from lowering.base import operand_shapes, output_shape
from lowering.epilogue import PER_CHANNEL, EpilogueOp, make_epilogue
from lowering.problem import accumulator, dtype_bytes
from schedules import Machine, schedule_func
from schedules.cpu.tile import TileRequest, choose_tile

from .errors import InputError

ScheduleKnobs = tuple[tuple[str, int | str], ...]
"""Sorted (name, value) pairs of `schedules.knob_space`."""
MOST_TILE = 4096
"""Elements of a register tile: every one is written out in the code, and compiled."""
MOST_ELEMENTS = 2**31
"""Kernels index with 32 bits."""


@dataclass(frozen=True)
class Kernel:
    """One stage, scheduled. `reads` names the stages (or `data`, `weight`) that are its first arguments; the output
    stage also takes the epilogue's operands, then every kernel takes the tensor that it writes, of shape `shape` and of
    dtype `dtype`: that of the problem, or an integer type for a table of offsets."""

    name: str
    reads: tuple[str, ...]
    func: tirx.PrimFunc
    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of the tensor that it writes."""
        return prod(self.shape) * dtype_bytes(self.dtype)


@dataclass(frozen=True)
class LayerKernels:
    """A layer in one lowering: its kernels in order, the tile that they were built for, and the cost by formula."""

    lowering: Lowering
    problem: Problem
    tile: Tile
    cost: LoweringCost
    kernels: tuple[Kernel, ...]


def tile_request(lowering: Lowering, problem: Problem) -> TileRequest:
    """What the tile model is asked for a lowering of `problem`."""
    return TileRequest(dtype=accumulator(problem.dtype), **asdict(lowering.axes(problem)))


@lru_cache(maxsize=4096)
def tile_for(lowering: Lowering, problem: Problem, machine: Machine) -> Tile:
    """The default register tile of a lowering of `problem` on `machine`."""
    return Tile(*choose_tile(tile_request(lowering, problem), machine))


def too_large(lowering: Lowering, problem: Problem | GradientProblem, cost: LoweringCost) -> Reason | None:
    """Why `lowering` cannot index all tensors of `problem` with 32 bits, or None: operands, output and workspaces."""
    found = {name: prod(shape) for name, shape in operand_shapes(problem, lowering.layout).items()}
    found["output"] = prod(output_shape(problem, lowering.layout))
    element = dtype_bytes(accumulator(problem.dtype))
    found |= {name: size // element for name, size in cost.workspace.items()}
    found |= {"transformed weight": cost.weight_bytes // element, "scratch": cost.shared_bytes // element}
    name = max(found, key=lambda key: found[key])
    if found[name] < MOST_ELEMENTS:
        return None
    return Reason(f"needs tensors of fewer than 2^31 elements, got {found[name]} in its {name}")


def require_tile(lowering: Lowering, problem: Problem, tile: Tile) -> None:
    """InputError for a tile that a lowering of `problem` cannot be built for."""
    if tile.mr * tile.nr > MOST_TILE:
        raise InputError(
            f"a register tile holds at most {MOST_TILE} elements, more than any CPU has registers for; got {tile.mr} x "
            f"{tile.nr}"
        )
    axes = lowering.axes(problem)
    sides = (("mr", tile.mr, axes.inner, axes.mr_divides), ("nr", tile.nr, axes.n, axes.nr_divides))
    for name, given, extent, divides in sides:
        if divides and extent % given:
            raise InputError(f"{lowering.key} needs a tile whose {name} divides {extent} on this layer, got {given}")


def require_sizes(lowering: Lowering, problem: Problem | GradientProblem) -> None:
    """InputError for free sizes that were fixed to values that do not fit `problem`."""
    try:
        lowering.require_sizes(problem)
    except ValueError as err:
        raise InputError(f"{err}; leave it out for the default") from err


def operand_shape(op: EpilogueOp, problem: Problem, layout: str) -> tuple[int, ...]:
    """Shape of an epilogue operand in the lowering's layout: `(M,)`, or the output's shape."""
    return (problem.m,) if op.kind in PER_CHANNEL else output_shape(problem, layout)


@lru_cache(maxsize=1024)
def layer_kernels(
    lowering: Lowering,
    problem: Problem,
    machine: Machine,
    ops: tuple[EpilogueOp, ...] = (),
    tile: Tile | None = None,
    schedule: ScheduleKnobs = (),
) -> LayerKernels:
    """Build and schedule every stage of `lowering` for `problem`. Equal arguments give the same kernels.

    The operands are numbered as in `ops`; those of kind bias/scale have shape `(M,)`, the others the output's.
    `schedule` holds (name, value) pairs of `schedules.knob_space`; each kernel takes those that it knows.
    """
    require_sizes(lowering, problem)
    if tile is None:
        tile = tile_for(lowering, problem, machine)
    else:
        require_tile(lowering, problem, tile)
    operands = _operand_placeholders(lowering, problem, ops)
    stages = lowering.stages(problem, tile, make_epilogue(ops, operands, lowering.layout))
    given = operand_shapes(problem, lowering.layout)
    known = {name: (shape, problem.dtype) for name, shape in given.items()}
    kernels = []
    for stage in stages:
        kernel = _stage_kernel(stage, known, operands if stage.kind == "output" else (), machine, dict(schedule))
        known[stage.name] = (kernel.shape, kernel.dtype)
        kernels.append(kernel)
    return LayerKernels(lowering, problem, tile, lowering.cost(problem, tile), tuple(kernels))


def _operand_placeholders(lowering: Lowering, problem: Problem, ops: Sequence[EpilogueOp]) -> list[te.Tensor]:
    by_index = {op.operand: op for op in ops if op.operand is not None}
    return [
        te.placeholder(operand_shape(by_index[i], problem, lowering.layout), problem.dtype, name=f"operand{i}")
        for i in sorted(by_index)
    ]


def _stage_kernel(
    stage: Stage,
    known: dict[str, tuple[tuple[int, ...], str]],
    operands: Sequence[te.Tensor],
    machine: Machine,
    knobs: dict[str, int | str],
) -> Kernel:
    inputs = [te.placeholder(*known[name], name=name) for name in stage.reads]
    output = stage.compute(*inputs)
    func = te.create_prim_func([*inputs, *operands, output])
    shape = tuple(int(extent) for extent in output.shape)
    func = schedule_func(func, machine, knobs)
    if stage.kind == "workspace":
        func = func.with_attr("gemmify.workspace", 1)
    return Kernel(stage.name, stage.reads, func, stage.kind, shape, str(output.dtype))
