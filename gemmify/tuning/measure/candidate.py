"""A candidate in the process that builds it, checks it and runs it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import te, tirx

from lowering import ConvProblem, Lowering, LoweringCost, Problem
from lowering.base import activation_shape, output_shape
from lowering.epilogue import PER_CHANNEL, EpilogueOp
from schedules import AnyMachine, Machine, schedule_func

from ...conformance import Expected, tolerance
from ...fold import evaluate
from ...guarded import ZONE_BYTES, Guarded, poison
from ...kernels import LayerKernels, layer_kernels
from ...pipeline_build import TIR_PIPELINE
from .flush import LINE_BYTES
from .job import Job

Arrays = dict[str, np.ndarray]
_FIRST = "channels first "
_OUTPUT = "channels last output"


@dataclass(frozen=True)
class Step:
    """One kernel of a call: the tensors that it reads in order, the one that it writes, and that one's shape. `given`
    is the shape as which it reads its only tensor, where that was written in another."""

    func: tirx.PrimFunc
    reads: tuple[str, ...]
    writes: str
    shape: tuple[int, ...]
    dtype: str
    given: tuple[int, ...] | None = None


@dataclass
class Candidate:
    """A layer that is compiled and, after `bind`, has its tensors. It reads and writes channels last whatever its
    lowering does: the conversions that a network puts around it are steps of it, and part of its time."""

    problem: Problem
    ops: tuple[EpilogueOp, ...]
    cost: LoweringCost
    steps: list[Step]
    functions: list[Callable[..., None]]
    packed: Arrays
    _memory: dict[str, Placed] = field(default_factory=dict)
    _calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)

    def __call__(self) -> None:
        """Run all activation stages once."""
        for function, arguments in self._calls:
            function(*arguments)

    def bind(self, want: Expected) -> None:
        """Copy the arrays that the steps read into memory of TVM's own, as a network's tensors are, poison all that
        they write, and fix the calls."""
        given = {"data": want.data, "weight": want.weight, **self.packed}
        given |= {operand_name(i): operand for i, operand in enumerate(want.operands)}
        read = {name for step in self.steps for name in step.reads}
        self._memory = {name: placed(array.shape, array) for name, array in given.items() if name in read}
        self._memory |= {step.writes: placed(step.shape, poison(step.dtype), step.dtype) for step in self.steps}
        self._calls = []
        for step, function in zip(self.steps, self.functions, strict=True):
            tensors = [self._memory[name].tensor for name in (*step.reads, step.writes)]
            if step.given is not None:
                tensors[0] = tvm.runtime.from_dlpack(self._memory[step.reads[0]].view.reshape(step.given))
            self._calls.append((function, tuple(tensors)))

    @property
    def recent(self) -> list[np.ndarray]:
        """The memory that a network has used lately when it comes to this layer, the input last: its activations and
        workspaces lie in an arena that every layer uses. Not the weights."""
        operands = [operand_name(op.operand) for op in self.ops if op.operand is not None]
        written = [step.writes for step in reversed(self.steps)]
        return [self._memory[name].view for name in dict.fromkeys([*written, *operands, "data"])]

    def faults(self) -> list[str]:
        """Where the calls wrote outside their tensors, or left poison in a workspace."""
        wrong = [f"{name}: written outside" for name, guarded in self._memory.items() if not guarded.intact]
        between = [step.writes for step in self.steps[:-1]]
        return wrong + [f"{name}: not filled" for name in between if not self._memory[name].filled]

    def compare(self, want: Expected) -> tuple[float, str | None]:
        """The largest deviation of the output relative to the largest result, and what is wrong with it or None."""
        got = self._memory[self.steps[-1].writes].view.reshape(want.result.shape)
        largest = float(np.abs(want.result).max()) or 1.0
        worst = float(np.max(np.abs(got - want.result)))
        limit = tolerance(self.problem.dtype, want, self.cost.error_growth, self.ops)
        if worst <= limit:  # a NaN compares as False: it must fail
            return worst / largest, None
        if not np.isfinite(worst):
            return float("inf"), f"{int((~np.isfinite(got)).sum())} of {got.size} output elements are not finite"
        return worst / largest, f"off by {worst / largest:.1e} of the largest output, {limit / largest:.1e} is allowed"


@dataclass(frozen=True)
class Placed(Guarded):
    """A tensor between zones of poison, with the array that shares its memory."""

    view: np.ndarray


def placed(shape: Sequence[int], value: Any, dtype: str | None = None) -> Placed:
    """A tensor filled with `value` in memory that TVM allocated. numpy's own large arrays lie in huge pages where the
    system leaves that to the program; a network's tensors do not."""
    kind = np.dtype(dtype or value.dtype)
    zone, size = ZONE_BYTES // kind.itemsize, prod(shape)
    memory = np.from_dlpack(tvm.runtime.empty((size + 2 * zone + LINE_BYTES // kind.itemsize,), str(kind), tvm.cpu()))
    start = zone + (-memory.ctypes.data % LINE_BYTES) // kind.itemsize
    memory[:start] = memory[start + size :] = poison(str(kind))
    view = memory[start : start + size].reshape(tuple(shape))
    view[...] = value
    return Placed(tvm.runtime.from_dlpack(view), (memory[:start], memory[start + size :]), view)


def build(job: Job, machine: Machine, target: tvm.target.Target) -> Candidate:
    """Schedule and compile the candidate, and fold its weight stages. Whatever its lowering or TVM raises passes."""
    lowering, problem, ops = job.lowering, job.task.problem, job.task.epilogue
    assert lowering is not None and job.tile is not None, "a candidate has a lowering and a tile"
    if (reason := lowering.applicable(problem)) is not None:
        raise ValueError(f"{lowering.key} does not apply: {reason}")
    kernels = layer_kernels(lowering, problem, machine, ops, job.tile, job.schedule)
    packed = fold_weights(lowering, problem, kernels, Path(job.folder))
    steps = list(steps_of(kernels, ops, packed, machine))
    names = [f"kernel{i}" for i in range(len(steps))]
    funcs = {name: step.func.with_attr("global_symbol", name) for name, step in zip(names, steps, strict=True)}
    module = tvm.compile(tvm.IRModule(funcs), target=target, tir_pipeline=TIR_PIPELINE)
    # Looking a function up makes its machine code.
    return Candidate(problem, ops, kernels.cost, steps, [module[name] for name in names], packed)


def steps_of(kernels: LayerKernels, ops: Sequence[EpilogueOp], packed: Arrays, machine: AnyMachine) -> Iterator[Step]:
    """The kernels of one call in order, with the conversions that `gemmify.lower` puts around the lowering."""
    problem = kernels.problem
    operands = {op.operand: op for op in ops if op.operand is not None}
    names = [operand_name(i) for i in sorted(operands)]
    data = "data"
    converts = kernels.lowering.layout == "NCHW" and isinstance(problem, ConvProblem)
    if converts:
        yield _conversion(data, _FIRST + data, activation_shape(problem), True, problem.dtype, machine)
        data = _FIRST + data
        for i, index in enumerate(sorted(operands)):
            if operands[index].kind not in PER_CHANNEL:
                yield _conversion(names[i], _FIRST + names[i], output_shape(problem), True, problem.dtype, machine)
                names[i] = _FIRST + names[i]
    for kernel in kernels.kernels:
        if kernel.name not in packed:
            reads = tuple(data if name == "data" else name for name in kernel.reads)
            extra = tuple(names) if kernel.kind == "output" else ()
            yield Step(kernel.func, (*reads, *extra), kernel.name, kernel.shape, kernel.dtype)
    if converts:
        shape = output_shape(problem, "NCHW")
        yield _conversion(kernels.kernels[-1].name, _OUTPUT, shape, False, problem.dtype, machine)


def operand_name(index: int) -> str:
    """What a step calls the epilogue's operand `index`."""
    return f"operand {index}"


def _conversion(
    source: str, result: str, shape: tuple[int, ...], to_first: bool, dtype: str, machine: AnyMachine
) -> Step:
    rank = len(shape)
    order = [0, rank - 1, *range(1, rank - 1)] if to_first else [0, *range(2, rank), 1]
    given = te.placeholder(shape, dtype, name="given")
    moved = tuple(shape[i] for i in order)
    place = [order.index(i) for i in range(rank)]
    turned = te.compute(moved, lambda *index: given(*(index[p] for p in place)), name="turned")
    return Step(schedule_func(te.create_prim_func([given, turned]), machine), (source,), result, moved, dtype, shape)


def fold_weights(lowering: Lowering, problem: Problem, kernels: LayerKernels, folder: Path) -> Arrays:
    """The weight stages evaluated on the task's weight, by stage name.

    Each result is kept in `folder` under a hash of the expression that made it, so that candidates which differ in
    their schedule only share it; where the folder is full it is made anew.
    """
    arrays: Arrays = {"weight": np.load(folder / "weight.npy", mmap_mode="r")}
    keys = {"weight": "weight"}
    for stage in lowering.stages(problem, kernels.tile):
        if stage.kind != "weight" or not all(r in arrays for r in stage.reads):
            continue
        inputs = [te.placeholder(arrays[r].shape, str(arrays[r].dtype), name=r) for r in stage.reads]
        output = stage.compute(*inputs)
        text = te.create_prim_func([*inputs, output]).script() + " ".join(keys[r] for r in stage.reads)
        keys[stage.name] = hashlib.sha256(text.encode()).hexdigest()[:32]
        path = folder / f"packed-{keys[stage.name]}.npy"
        if path.exists():
            arrays[stage.name] = np.load(path, mmap_mode="r")
        else:
            arrays[stage.name] = evaluate(output, {t: arrays[r] for t, r in zip(inputs, stage.reads, strict=True)})
            _keep(path, arrays[stage.name])
    return {name: array for name, array in arrays.items() if name != "weight"}


def _keep(path: Path, array: np.ndarray) -> None:
    """Write `array`, complete or not at all: another candidate may look for it at the same moment."""
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.save(file, array)
        beside.rename(path)
    except OSError:
        beside.unlink(missing_ok=True)
