"""The kernels of a layer before they are scheduled: what the knobs of a schedule are read from."""

from __future__ import annotations

from tvm import te, tirx

from lowering import Lowering, Problem, Tile
from lowering.base import operand_shapes
from lowering.epilogue import EpilogueOp, make_epilogue
from schedules import AnyMachine

from ..kernels import TF32, multiplied_in, on_machine, operand_shape


def unscheduled(
    lowering: Lowering, problem: Problem, ops: tuple[EpilogueOp, ...], tile: Tile, machine: AnyMachine
) -> tuple[tirx.PrimFunc, ...]:
    """The functions of the activation stages of `lowering`, in order; those of the weights are folded and need no
    schedule."""
    problem = on_machine(problem, machine)
    attrs = {TF32: 1} if multiplied_in(lowering, problem.dtype, machine) else {}
    by_index = {op.operand: op for op in ops if op.operand is not None}
    operands = [
        te.placeholder(operand_shape(by_index[i], problem, lowering.layout), problem.dtype, name=f"operand{i}")
        for i in sorted(by_index)
    ]
    known = {name: (shape, problem.dtype) for name, shape in operand_shapes(problem, lowering.layout).items()}
    functions = []
    for stage in lowering.stages(problem, tile, make_epilogue(ops, operands, lowering.layout)):
        inputs = [te.placeholder(*known[name], name=name) for name in stage.reads]
        output = stage.compute(*inputs)
        known[stage.name] = (tuple(int(extent) for extent in output.shape), str(output.dtype))
        if stage.kind != "weight":
            taken = operands if stage.kind == "output" else []
            func = te.create_prim_func([*inputs, *taken, output])
            functions.append(func.with_attrs(attrs) if attrs else func)
    return tuple(functions)
