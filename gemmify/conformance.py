"""Does a lowering compute its layers, in the bytes that it says? The check that every lowering has to pass.

Numbers are compared with float64; everything that a kernel writes is NaN beforehand, so that an element left out shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from lowering import LOWERINGS, Lowering, Problem, Reason
from lowering.epilogue import EpilogueOp
from lowering.problem import accumulator
from lowering.registry import check_attributes
from schedules import AnyMachine, Gpu, machine_of

from .accuracy import UNIT, amplification
from .dtypes import refusal
from .errors import CheckError, InputError
from .kernels import LayerKernels, layer_kernels, on_machine, operand_shape, tile_for
from .layer import LayerKernel
from .layer_reference import apply_epilogue, channels_first, magnitude, random_arrays, reference
from .pipeline import resolve_target
from .pipeline_build import TIR_PIPELINE, kernel_workspace_bytes
from .random_layers import accepted, random_layers

Case = tuple[Problem, tuple[EpilogueOp, ...]]

EPILOGUES: tuple[tuple[EpilogueOp, ...], ...] = (
    (),
    (EpilogueOp("bias", 0), EpilogueOp("relu")),
    (EpilogueOp("bias", 0), EpilogueOp("add", 1), EpilogueOp("relu")),
    (EpilogueOp("scale", 0), EpilogueOp("bias", 1), EpilogueOp("silu")),
)
REFUSALS = 500
"""Random layers on which a lowering's reasons are looked at."""
ON_STACK = 2048
"""TVM keeps buffers of up to 1 KiB on the stack, where they are not counted: so much may be missing."""
SHOWN = 3
"""Failures that the error names."""


@dataclass(frozen=True)
class Conformance:
    """What `check_lowering` found in order: the lowering's key and the layers that were compiled and compared."""

    key: str
    problems: tuple[Problem, ...]


def check_lowering(
    lowering: Lowering, problems: Sequence[Problem] | None = None, *, target: Any = "llvm", count: int = 24
) -> Conformance:
    """Compile `lowering` for each of `problems` and compare it with float64, and its bytes with its `cost`.

    It need not be registered. `problems` defaults to the first `count` random layers that it accepts: odd sizes,
    strides, pads, groups, float32, float64 and (where the target converts it) float16, with epilogues of every kind.
    Checked are: `applicable` gives None or a Reason; `cost` is pure; the stages form a chain whose workspaces are those
    of the cost; every element of the output is written and is right; the bytes of workspaces, weights and scratch
    inside the kernels equal the cost's.

    The code runs in this process: what writes outside its tensors can end it. Raises CheckError that names what fails,
    what the lowering raises included, InputError where a problem is given that it refuses or none is found that it
    accepts, and TypeError or
    ValueError for an object that is no complete lowering.
    """
    check_attributes(lowering)
    resolved = resolve_target(target)
    machine = machine_of(resolved)
    failures = list(_odd_answers(lowering, problems or ()))
    if problems is None:
        found = [] if failures else accepted(lowering, count)
        problems = [problem for problem in found if refusal(problem.dtype, machine) is None]
        if not problems and not failures:
            raise InputError(f"{lowering.key} accepts none of many random layers; give problems that it accepts")
    for problem in problems if not failures else ():
        if (reason := lowering.applicable(problem)) is not None:
            raise InputError(f"{lowering.key} does not apply to {problem}: {reason}; give problems that it accepts")
    cases = [(problem, EPILOGUES[i % len(EPILOGUES)]) for i, problem in enumerate(problems)]
    for problem, _ in cases if not failures else ():
        try:
            failures += _contract(lowering, problem, machine)
        except Exception as error:  # whatever the lowering's own code raises is a fault of the lowering
            failures.append(f"{problem}: {_raised(lowering, error)}")
    if not failures:
        try:
            layers = compile_cases(cases, machine, resolved, [lowering])
        except Exception as error:
            raise CheckError(f"{lowering.key} fails its check: compiling it raises {_said(error)}") from error
        for layer, (_, ops) in zip(layers, cases, strict=True):
            failures += [found for found in (check(layer, ops), scratch_differs(layer, resolved)) if found is not None]
    if failures:
        more = f"; and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        raise CheckError(f"{lowering.key} fails its check: {'; '.join(failures[:SHOWN])}{more}")
    return Conformance(lowering.key, tuple(problems))


def _odd_answers(lowering: Lowering, given: Sequence[Problem]) -> Iterator[str]:
    """What `applicable` answers that is neither None nor a Reason of some words."""
    layers = random_layers(1)
    for problem in (*given, *(next(layers) for _ in range(REFUSALS))):
        try:
            answer = lowering.applicable(problem)
        except Exception as error:
            yield f"{problem}: {_raised(lowering, error)}"
            return
        if answer is not None and not (isinstance(answer, Reason) and answer.text.strip()):
            yield f"applicable answers {answer!r} to {problem}, neither None nor a Reason"
            return


def _raised(lowering: Lowering, error: Exception) -> str:
    """What a method of `lowering` raised, and which one it was."""
    step, names = error.__traceback__, ["applicable", "axes", "cost", "build"]
    found = "it"
    while step is not None:
        code = step.tb_frame
        if code.f_code.co_name in names and code.f_locals.get("self") is lowering:
            found = code.f_code.co_name
        step = step.tb_next
    return f"{found} raises {_said(error)}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _contract(lowering: Lowering, problem: Problem, machine: AnyMachine) -> Iterator[str]:
    """What cost and stages say that contradicts each other or changes from call to call."""
    problem, tile = on_machine(problem, machine), tile_for(lowering, problem, machine)
    cost, stages = lowering.cost(problem, tile), lowering.build(problem, tile)
    where = f"{tile} {problem}"
    if cost != lowering.cost(problem, tile):
        yield f"{where}: cost differs from call to call"
    if cost.workspace_bytes != sum(cost.workspace.values()):
        total = sum(cost.workspace.values())
        yield f"{where}: workspace_bytes is {cost.workspace_bytes}, the workspaces sum to {total}"
    known = {"data", "weight"}
    for stage in stages:
        if not set(stage.reads) <= known or stage.name in known:
            yield f"{where}: stage {stage.name} reads {stage.reads}, known before it are {sorted(known)}"
        known.add(stage.name)
    if [stage.kind == "output" for stage in stages] != [False] * (len(stages) - 1) + [True]:
        yield f"{where}: the last stage, and no other, must be of kind output, found {[s.kind for s in stages]}"
    workspaces = {stage.name for stage in stages if stage.kind == "workspace"}
    if workspaces != set(cost.workspace):
        yield f"{where}: the stages hold the workspaces {sorted(workspaces)}, the cost {sorted(cost.workspace)}"


def scratch_differs(layer: LayerKernel, target: tvm.target.Target) -> str | None:
    """How the scratch inside the kernels, on one thread, differs from what `cost` says; None where it does not."""
    kernels = layer.kernels
    funcs = {f"f{i}": k.func for i, k in enumerate(kernels.kernels) if k.kind != "weight"}
    hidden = sum(kernel_workspace_bytes(tvm.IRModule(funcs), target, 1).values())
    said = kernels.cost.scratch(1) - kernels.cost.workspace_bytes
    if 0 <= said - hidden <= ON_STACK:
        return None
    where = f"{kernels.lowering.key} {kernels.tile} {kernels.problem}"
    return f"{where}: cost says {said} bytes of scratch inside the kernels on one thread, {hidden} are allocated"


class _Function:
    """One kernel of a module that holds many, where a LayerKernel asks for `main`."""

    def __init__(self, module: Any, name: str) -> None:
        self._module, self._name = module, name

    def __getitem__(self, _: str) -> Any:
        return self._module[self._name]


def compile_cases(
    cases: Sequence[Case], machine: AnyMachine, target: tvm.target.Target, lowerings: Sequence[Lowering] | None = None
) -> list[LayerKernel]:
    """Every one of `lowerings` (default: the catalogue) that applies to every case, in one module."""
    built: list[LayerKernels] = []
    for problem, ops in cases:
        asked = LOWERINGS.values() if lowerings is None else lowerings
        usable = [lowering for lowering in asked if lowering.applicable(on_machine(problem, machine)) is None]
        built += [layer_kernels(lowering, problem, machine, ops) for lowering in usable]
    names = [[f"f{i}_{j}" for j in range(len(b.kernels))] for i, b in enumerate(built)]
    functions = {
        name: kernel.func.with_attr("global_symbol", name)
        for b, own in zip(built, names, strict=True)
        for kernel, name in zip(b.kernels, own, strict=True)
    }
    with target:  # device code is compiled for the enclosing target
        module = tvm.compile(tvm.IRModule(functions), target=target, tir_pipeline=TIR_PIPELINE)
    device = tvm.cuda(0) if isinstance(machine, Gpu) else tvm.cpu()
    functions_of = [[_Function(module, name) for name in own] for own in names]
    return [LayerKernel(b, own, device) for b, own in zip(built, functions_of, strict=True)]


@dataclass(frozen=True, eq=False)
class Expected:
    """What a case computes: its arrays (channels last), the float64 result, and the largest `sum |a| |b|`."""

    data: np.ndarray
    weight: np.ndarray
    operands: list[np.ndarray]
    result: np.ndarray
    peak: float


@lru_cache(maxsize=64)
def expected(problem: Problem, ops: tuple[EpilogueOp, ...]) -> Expected:
    data, weight = random_arrays(problem, 7)
    rng = np.random.default_rng(11)
    shapes = [operand_shape(op, problem, "NHWC") for op in ops if op.operand is not None]
    operands = [rng.standard_normal(shape).astype(problem.dtype) for shape in shapes]
    result = apply_epilogue(reference(problem, data, weight), ops, operands)
    return Expected(data, weight, operands, result, float(magnitude(problem, data, weight).max()))


def check(layer: LayerKernel, ops: tuple[EpilogueOp, ...]) -> str | None:
    """What is wrong with a compiled layer, or None."""
    problem, lowering, cost = layer.kernels.problem, layer.kernels.lowering, layer.kernels.cost
    want = expected(problem, ops)
    if lowering.layout == "NCHW":
        operands = [channels_first(o) if o.ndim > 1 else o for o in want.operands]
        got = np.moveaxis(layer.run(channels_first(want.data), want.weight, operands), 1, -1)
    else:
        got = layer.run(want.data, want.weight, want.operands)
    packed = sum(kernel.bytes for kernel in layer.kernels.kernels if kernel.kind == "weight")
    where = f"{lowering.key} {layer.kernels.tile} {problem} {ops}"
    # What a staged problem needs between launches is allocated beside its workspaces, what a CPU needs in its kernels.
    said = cost.scratch(1) if getattr(problem, "staged", False) else cost.workspace_bytes
    if layer.workspace_bytes != said:
        return f"{where}: cost says {said} bytes of workspace, {layer.workspace_bytes} are allocated"
    if packed != cost.weight_bytes:
        return f"{where}: cost says {cost.weight_bytes} bytes of weights, {packed} are stored"
    if faults := layer.faults():
        return f"{where}: {'; '.join(faults)}"
    limit = tolerance(problem.dtype, want, growth_of(layer.kernels), ops)
    worst = float(np.max(np.abs(got.astype("float64") - want.result)))
    # A NaN compares as False: it must fail.
    return None if worst <= limit else f"{where}: error {worst:.2e}, limit {limit:.2e}"


def growth_of(kernels: LayerKernels) -> float:
    """How the rounding errors of a layer grow, in units of its arithmetic, those of rounded factors included."""
    cost, dtype = kernels.cost, kernels.problem.dtype
    if kernels.multiplied is None:
        return cost.error_growth
    return cost.error_growth + amplification(cost) * UNIT[kernels.multiplied] / UNIT[accumulator(dtype)]


def tolerance(dtype: str, want: Expected, growth: float, ops: Sequence[EpilogueOp]) -> float:
    """The largest absolute error allowed: rounding of the sum, carried through the epilogue, the epilogue's own, and
    that of the output where it is stored in half precision."""
    unit, peak = UNIT[accumulator(dtype)], want.peak
    error = 2 * unit * (growth + 2) * peak
    for op in ops:
        size = float(np.abs(want.operands[op.operand]).max()) if op.operand is not None else 1.0
        # No other step has a slope above 1.5 (hardswish), none maps |v| beyond |v| + 1.
        error = (error * size if op.kind in ("scale", "mul") else 1.5 * error) + 8 * unit * (peak + size)
        peak = peak * size if op.kind in ("scale", "mul") else peak + size
    if accumulator(dtype) != dtype:
        # Stored in fewer digits, once: half a step of the largest output, or of a number too small for all its digits.
        least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
        error += UNIT[dtype] * (float(np.abs(want.result).max()) + error) + least
    return error
