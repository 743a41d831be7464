"""One layer to its kernels: a lowering's stages, each compiled to a scheduled PrimFunc of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from tvm import te, tirx

from lowering import Lowering, LoweringCost, Problem, Reason, Stage, Tile
from lowering.backward import GradientProblem
from lowering.base import operand_shapes, output_shape
from lowering.epilogue import PER_CHANNEL, EpilogueOp, make_epilogue
from lowering.problem import accumulator, dtype_bytes
from lowering.staged import as_staged
from schedules import AnyMachine, Gpu, schedule_func
from schedules.cpu.tile import TileRequest, choose_tile

from .errors import InputError

ScheduleKnobs = tuple[tuple[str, int | str], ...]
"""Sorted (name, value) pairs of `schedules.knob_space`."""
MOST_TILE = 4096
"""Elements of a register tile: every one is written out in the code, and compiled."""
MOST_ELEMENTS = 2**31
"""Kernels index with 32 bits."""
GPU_TILE = Tile(1, 1)
"""What layers are built for on a GPU: how a block divides its GEMM is the schedule's matter, and nothing is padded."""
SCRATCH, TF32 = "gemmify.scratch", "gemmify.tf32"
"""Attributes of kernels: how many tensors it needs between its launches; whether float32 may be rounded to TF32."""


@dataclass(frozen=True)
class Kernel:
    """One stage, scheduled. `reads` names the stages (or `data`, `weight`) that are its first arguments; the output
    stage also takes the epilogue's operands, then every kernel takes its `scratch`, and last the tensor that it writes,
    of shape `shape` and of dtype `dtype`: that of the problem, or an integer type for a table of offsets."""

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

    @property
    def scratch(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """(shape, dtype) of each tensor that it needs between its launches; none on a CPU."""
        return scratch_of(self.func)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of all its scratch."""
        return sum(prod(shape) * dtype_bytes(dtype) for shape, dtype in self.scratch)


def scratch_count(func: tirx.PrimFunc) -> int:
    """How many of a scheduled function's parameters, just before the last, are scratch."""
    return int(func.attrs[SCRATCH]) if func.attrs and SCRATCH in func.attrs else 0


def scratch_of(func: tirx.PrimFunc) -> tuple[tuple[tuple[int, ...], str], ...]:
    """(shape, dtype) of each of these parameters."""
    params = list(func.params)[len(func.params) - 1 - scratch_count(func) : -1]
    return tuple((tuple(int(extent) for extent in p.shape), str(p.dtype)) for p in params)


def on_machine(problem: Any, machine: AnyMachine) -> Any:
    """The problem in the terms in which layers are built on `machine`: staged on a GPU (`lowering.staged`)."""
    return as_staged(problem) if isinstance(machine, Gpu) else problem


@dataclass(frozen=True)
class LayerKernels:
    """A layer in one lowering: its kernels in order, the tile that they were built for, and the cost by formula, to
    which what the kernels need between their launches is added (`shared_bytes`). `problem` is that of `on_machine`,
    `multiplied` what the factors of the products are rounded to (`multiplied_in`)."""

    lowering: Lowering
    problem: Problem
    tile: Tile
    cost: LoweringCost
    kernels: tuple[Kernel, ...]
    multiplied: str | None = None


def tile_request(lowering: Lowering, problem: Problem) -> TileRequest:
    """What the tile model is asked for a lowering of `problem`."""
    return TileRequest(dtype=accumulator(problem.dtype), **asdict(lowering.axes(problem)))


@lru_cache(maxsize=4096)
def tile_for(lowering: Lowering, problem: Problem, machine: AnyMachine) -> Tile:
    """The default register tile of a lowering of `problem` on `machine`; GPU_TILE on every GPU."""
    if isinstance(machine, Gpu):
        return GPU_TILE
    return Tile(*choose_tile(tile_request(lowering, problem), machine))


def too_large(lowering: Lowering, problem: Problem | GradientProblem, cost: LoweringCost) -> Reason | None:
    """Why `lowering` cannot index all tensors of `problem` with 32 bits, or None: operands, output and workspaces.

    Where a staged problem is of half precision, a computed workspace, of float32, counts as if it were stored in half.
    """
    found = {name: prod(shape) for name, shape in operand_shapes(problem, lowering.layout).items()}
    found["output"] = prod(output_shape(problem, lowering.layout))
    staged = getattr(problem, "staged", False)
    element = dtype_bytes(problem.dtype if staged else accumulator(problem.dtype))
    found |= {name: size // element for name, size in cost.workspace.items()}
    found |= {"transformed weight": cost.weight_bytes // element, "scratch": cost.shared_bytes // element}
    name = max(found, key=lambda key: found[key])
    if found[name] < MOST_ELEMENTS:
        return None
    return Reason(f"needs tensors of fewer than 2^31 elements, got {found[name]} in its {name}")


def require_tile(lowering: Lowering, problem: Problem, tile: Tile, machine: AnyMachine | None = None) -> None:
    """InputError for a tile that a lowering of `problem` cannot be built for; a GPU has one tile only."""
    if isinstance(machine, Gpu) and tile != GPU_TILE:
        raise InputError(
            f"on a GPU layers are built for a register tile of 1 x 1 and the schedule's knobs divide the work; got "
            f"{tile.mr} x {tile.nr}; leave the tile out"
        )
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
    machine: AnyMachine,
    ops: tuple[EpilogueOp, ...] = (),
    tile: Tile | None = None,
    schedule: ScheduleKnobs = (),
) -> LayerKernels:
    """Build and schedule every stage of `lowering` for `problem`. Equal arguments give the same kernels.

    The operands are numbered as in `ops`; those of kind bias/scale have shape `(M,)`, the others the output's.
    `schedule` holds (name, value) pairs of `schedules.knob_space`; each kernel takes those that it knows.
    """
    problem = on_machine(problem, machine)
    require_sizes(lowering, problem)
    if tile is None:
        tile = tile_for(lowering, problem, machine)
    else:
        require_tile(lowering, problem, tile, machine)
    stages = stage_tensors(lowering, problem, ops, tile)
    kernels = [_stage_kernel(s, stage_func(lowering, problem, t, machine), t[-1], machine, schedule) for s, t in stages]
    multiplied = multiplied_in(lowering, problem.dtype, machine)
    scratch = sum(kernel.scratch_bytes for kernel in kernels if kernel.kind != "weight")
    cost = lowering.cost(problem, tile)
    cost = replace(cost, shared_bytes=cost.shared_bytes + scratch)
    return LayerKernels(lowering, problem, tile, cost, tuple(kernels), multiplied)


def multiplied_in(lowering: Lowering, dtype: str, machine: AnyMachine) -> str | None:
    """ "tf32" where the factors of a layer's products are rounded to that, else None: they are taken as stored.

    TF32 where the user allows it for float32 layers; and in layers of half precision, whose float32 scratch (Winograd's
    transforms) holds more digits than they are given in or asked for. Never by the definition itself.
    """
    if not isinstance(machine, Gpu) or not machine.bfloat16 or lowering.gemm_formula.startswith("none"):
        return None
    half = accumulator(dtype) != dtype
    rounded = lowering.computes_operands if half else dtype == "float32" and machine.allow_tf32
    return "tf32" if rounded else None


def stage_tensors(
    lowering: Lowering, problem: Problem, ops: tuple[EpilogueOp, ...], tile: Tile
) -> Iterator[tuple[Stage, list[te.Tensor]]]:
    """Every stage of `lowering` and the tensors of its function: those that it reads, the epilogue's operands where it
    writes the output, and last the one that it writes. `problem` is that of `on_machine`."""
    operands = _operand_placeholders(lowering, problem, ops)
    known = {name: (shape, problem.dtype) for name, shape in operand_shapes(problem, lowering.layout).items()}
    for stage in lowering.stages(problem, tile, make_epilogue(ops, operands, lowering.layout)):
        inputs = [te.placeholder(*known[name], name=name) for name in stage.reads]
        output = stage.compute(*inputs)
        known[stage.name] = (_sizes(output), str(output.dtype))
        yield stage, [*inputs, *(operands if stage.kind == "output" else ()), output]


def stage_func(
    lowering: Lowering, problem: Problem, tensors: Sequence[te.Tensor], machine: AnyMachine
) -> tirx.PrimFunc:
    """The function of a stage, not scheduled yet, with what the schedule must know of the layer's precision."""
    func = te.create_prim_func(list(tensors))
    return func.with_attr(TF32, 1) if multiplied_in(lowering, problem.dtype, machine) else func


def _operand_placeholders(lowering: Lowering, problem: Problem, ops: Sequence[EpilogueOp]) -> list[te.Tensor]:
    by_index = {op.operand: op for op in ops if op.operand is not None}
    return [
        te.placeholder(operand_shape(by_index[i], problem, lowering.layout), problem.dtype, name=f"operand{i}")
        for i in sorted(by_index)
    ]


def _stage_kernel(
    stage: Stage, func: tirx.PrimFunc, output: te.Tensor, machine: AnyMachine, schedule: ScheduleKnobs
) -> Kernel:
    func = schedule_func(func, machine, dict(schedule))
    if stage.kind == "workspace":
        func = func.with_attr("gemmify.workspace", 1)
    return Kernel(stage.name, stage.reads, func, stage.kind, _sizes(output), str(output.dtype))


def _sizes(tensor: te.Tensor) -> tuple[int, ...]:
    return tuple(int(extent) for extent in tensor.shape)
