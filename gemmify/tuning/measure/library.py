"""A candidate as one shared library, for a machine that is not this one, with all that is needed to run it beside it.

The library holds every kernel of the layer: those of its weight stages, so that a transformed weight need not travel,
and those of one call, with the conversions that a network puts around the lowering. One entry of it, `layer`, calls the
latter in order, so that TVM's own `time_evaluator` on the device times the whole layer. The input is its first
argument: TVM's `cache_flush_cpu_non_first_arg` then leaves the input, and it alone, in the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import cloudpickle
import tvm
from tvm import tirx

from lowering import Lowering
from lowering.base import activation_shape, weight_shape
from lowering.problem import dtype_bytes
from schedules import machine_of, parse_target

from ...conformance import growth_of
from ...export import write_library
from ...kernels import layer_kernels, on_machine, operand_shape, scratch_of, too_large
from ...pipeline_build import TIR_PIPELINE
from ..point import Point
from ..task import Task
from .candidate import Step, operand_name, steps_of

ENTRY = "layer"
FLUSH = "cache_flush_cpu_non_first_arg"
"""TVM's function that drives all arguments of a call but the first out of the caches."""


@dataclass(frozen=True)
class Call:
    """One kernel: its name in the library, the tensors that it reads in order, the one that it writes, and what it
    needs between its launches."""

    symbol: str
    reads: tuple[str, ...]
    writes: str
    scratch: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The tensors that it is called with, in order."""
        return (*self.reads, *self.scratch, self.writes)


@dataclass(frozen=True)
class LibrarySpec:
    """How a library is run.

    `tensors` holds shape and dtype of every tensor by name; those that no call writes are given: data, weight, the
    epilogue's operands (channels last). `weights` are the calls that are made once, in order: they transform the
    weight, or fill a table of offsets and read nothing. `calls` are those of one run of the layer, and `entry` names
    the arguments of ENTRY, which makes them; `output` is what it leaves. `views` are tensors of another shape in the
    memory of one that a call writes: (shape, that one). `growth` says how its
    rounding errors grow, those of rounded factors included (`conformance.growth_of`).
    """

    tensors: dict[str, tuple[tuple[int, ...], str]]
    weights: tuple[Call, ...]
    calls: tuple[Call, ...]
    entry: tuple[str, ...]
    output: str
    growth: float
    views: dict[str, tuple[tuple[int, ...], str]]

    @property
    def given(self) -> tuple[str, ...]:
        """The tensors that must be supplied, in the order of their names."""
        return tuple(sorted(set(self.tensors) - set(self.written)))

    @property
    def written(self) -> tuple[str, ...]:
        """The tensors that the calls fill, scratch included."""
        calls = (*self.weights, *self.calls)
        return tuple(dict.fromkeys(name for call in calls for name in (*call.scratch, call.writes)))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(prod(shape) * dtype_bytes(dtype) for shape, dtype in self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LibrarySpec:
        """The specification that `to_dict` wrote, perhaps through JSON."""

        def calls(items: Sequence[Any]) -> tuple[Call, ...]:
            return tuple(Call(i["symbol"], tuple(i["reads"]), i["writes"], tuple(i["scratch"])) for i in items)

        tensors = {name: (tuple(shape), str(dtype)) for name, (shape, dtype) in data["tensors"].items()}
        steps = calls(data["weights"]), calls(data["calls"])
        views = {name: (tuple(shape), str(of)) for name, (shape, of) in data["views"].items()}
        return cls(tensors, *steps, tuple(data["entry"]), data["output"], float(data["growth"]), views)


def build_pickled(_tell: Any, payload: bytes, target: str, path: str) -> LibrarySpec:
    """`build_library` in a `helper.Helper`; `payload` is what `payload_of` made."""
    task, point, lowering = cloudpickle.loads(payload)
    return build_library(task, point, target, path, lowering)


def payload_of(task: Task, point: Point) -> bytes:
    """A candidate with its lowering itself, because the process that builds it knows none that was registered here.
    Raises ValueError as `Point.configured`."""
    payload: bytes = cloudpickle.dumps((task, point, point.configured()))
    return payload


def build_library(task: Task, point: Point, target: str, path: str, lowering: Lowering | None = None) -> LibrarySpec:
    """Write the candidate as the shared library `path`; returns how it is run. `lowering` stands for that of `point`.

    `target` is what `schedules.parse_target` takes; it may be for another architecture. Raises ValueError where the
    point does not apply to the task, GemmifyError where it cannot be linked, and whatever the compiler raises.
    """
    resolved = parse_target(target)
    machine = machine_of(resolved)
    lowering, problem = lowering or point.configured(), on_machine(task.problem, machine)
    reason = lowering.applicable(problem) or too_large(lowering, problem, lowering.cost(problem, point.tile))
    if reason is not None:
        raise ValueError(f"{lowering.key} does not apply: {reason}")
    kernels = layer_kernels(lowering, problem, machine, task.epilogue, point.tile, point.schedule)
    weight_stages = {kernel.name for kernel in kernels.kernels if kernel.kind == "weight"}
    steps = list(steps_of(kernels, task.epilogue, {}, machine))
    symbols = [f"kernel{i}" for i in range(len(steps))]
    funcs = {name: step.func.with_attr("global_symbol", name) for name, step in zip(symbols, steps, strict=True)}
    tensors, views = _tensors(task, steps), dict[str, tuple[tuple[int, ...], str]]()
    calls = []
    for name, step in zip(symbols, steps, strict=True):
        reads = step.reads  # none where a weight stage is a table of what the shapes alone say
        if step.given and tensors[reads[0]][0] != step.given:
            views[f"{reads[0]}, reshaped"] = (step.given, reads[0])
            reads = (f"{reads[0]}, reshaped", *reads[1:])
        calls.append(Call(name, reads, step.writes, scratch_names(step)))
    weights = tuple(call for call in calls if call.writes in weight_stages)
    acting = tuple(call for call in calls if call.writes not in weight_stages)
    entry = tuple(dict.fromkeys(["data", *(name for call in acting for name in call.arguments)]))
    growth = growth_of(kernels)
    spec = LibrarySpec(tensors, weights, acting, entry, acting[-1].writes, growth, views)
    funcs[ENTRY] = _entry(spec)
    executable = tvm.compile(tvm.IRModule(funcs), target=resolved, tir_pipeline=TIR_PIPELINE)
    write_library(executable, resolved, path)
    return spec


def _tensors(task: Task, steps: Sequence[Step]) -> dict[str, tuple[tuple[int, ...], str]]:
    problem, dtype = task.problem, task.problem.dtype
    found = {"data": (activation_shape(problem), dtype), "weight": (weight_shape(problem), dtype)}
    for op in task.epilogue:
        if op.operand is not None:
            found[operand_name(op.operand)] = (operand_shape(op, problem, "NHWC"), dtype)
    for step in steps:
        found |= dict(zip(scratch_names(step), scratch_of(step.func), strict=True))
        found[step.writes] = (step.shape, step.dtype)
    return found


def scratch_names(step: Step) -> tuple[str, ...]:
    """What a library calls the scratch of a step."""
    return tuple(f"scratch {i} of {step.writes}" for i in range(len(scratch_of(step.func))))


def _entry(spec: LibrarySpec) -> tirx.PrimFunc:
    """The function that calls the kernels of one call in order. It passes its arguments on as they are."""
    handles = {name: tirx.Var(f"argument{i}", "handle") for i, name in enumerate(spec.entry)}
    calls = [
        tirx.Evaluate(tirx.call_cpacked(call.symbol, *(handles[name] for name in call.arguments)))
        for call in spec.calls
    ]
    body = calls[0] if len(calls) == 1 else tirx.SeqStmt(calls)
    return tirx.PrimFunc(list(handles.values()), body).with_attr("global_symbol", ENTRY)
