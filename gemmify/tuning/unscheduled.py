"""The kernels of a layer before they are scheduled: what the knobs of a schedule are read from."""

from __future__ import annotations

from tvm import tirx

from lowering import Lowering, Problem, Tile
from lowering.epilogue import EpilogueOp
from schedules import AnyMachine

from ..kernels import on_machine, stage_func, stage_tensors


def unscheduled(
    lowering: Lowering, problem: Problem, ops: tuple[EpilogueOp, ...], tile: Tile, machine: AnyMachine
) -> tuple[tirx.PrimFunc, ...]:
    """The functions of the activation stages of `lowering`, in order; those of the weights are folded and need no
    schedule."""
    problem = on_machine(problem, machine)
    stages = stage_tensors(lowering, problem, ops, tile)
    return tuple(stage_func(lowering, problem, t, machine) for stage, t in stages if stage.kind != "weight")
