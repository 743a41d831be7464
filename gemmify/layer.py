"""One layer on its own: build it in one lowering, run it on arrays, time it. For benches, tests and tuning."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm

from lowering import Lowering, Problem, Tile
from lowering.backward import GradientProblem, lowerings_of
from lowering.base import operand_shapes, output_shape
from lowering.epilogue import EpilogueOp
from schedules import AnyMachine, Gpu, machine_of

from .dtypes import require_dtype
from .errors import InputError
from .guarded import Guarded
from .kernels import LayerKernels, ScheduleKnobs, layer_kernels, on_machine, require_sizes, tile_for, too_large
from .pipeline_build import TIR_PIPELINE
from .select import suitable


@dataclass
class LayerKernel:
    """A compiled layer. Workspaces belong to it, so that calling it again allocates nothing.

    `device` holds its tensors; where that is a GPU a call returns before the work is done (`wait`).
    """

    kernels: LayerKernels
    functions: list[tvm.runtime.Module]
    device: tvm.runtime.Device = field(default_factory=tvm.cpu)
    _tensors: dict[str, tvm.runtime.Tensor] = field(default_factory=dict)
    _guarded: dict[str, Guarded] = field(default_factory=dict)
    # Found once: to look a function up in its module takes ten times as long as to call it.
    _calls: list[tuple[Callable[..., object], tuple[tvm.runtime.Tensor, ...]]] = field(default_factory=list)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the workspace tensors that are really allocated, and of what kernels need between their launches."""
        stages = [kernel for kernel in self.kernels.kernels if kernel.kind != "weight"]
        between = sum(kernel.scratch_bytes for kernel in stages)
        return between + sum(kernel.bytes for kernel in stages if kernel.kind == "workspace")

    def bind(self, data: np.ndarray, weight: np.ndarray, operands: Sequence[np.ndarray] = ()) -> None:
        """Give the layer its tensors (in the lowering's layout) and transform the weight; everything it will write
        is poisoned: NaN, or the largest integer; so is the memory around each tensor (`faults`). `weight` is the second
        tensor whatever the problem calls it: the gradient of a layer by its weights takes the layer's input there.
        """
        names = operand_shapes(self.kernels.problem, self.kernels.lowering.layout)
        at, stages = self.device, self.kernels.kernels
        self._guarded = {name: Guarded.of(given, at) for name, given in zip(names, (data, weight), strict=True)}
        self._guarded |= {f"operand {i}": Guarded.of(operand, at) for i, operand in enumerate(operands)}
        self._guarded |= {k.name: Guarded.poisoned(k.shape, k.dtype, at) for k in stages}
        self._guarded |= {
            _between(k.name, i): Guarded.poisoned(*found, at) for k in stages for i, found in enumerate(k.scratch)
        }
        self._tensors = {name: guarded.tensor for name, guarded in self._guarded.items()}
        self._operands = [self._tensors[f"operand {i}"] for i in range(len(operands))]
        self._calls = []
        for kernel, function in zip(self.kernels.kernels, self.functions, strict=True):
            extra = self._operands if kernel.kind == "output" else []
            between = [self._tensors[_between(kernel.name, i)] for i in range(len(kernel.scratch))]
            arguments = (*(self._tensors[r] for r in kernel.reads), *extra, *between, self._tensors[kernel.name])
            if kernel.kind == "weight":
                function["main"](*arguments)
            else:
                self._calls.append((function["main"], arguments))

    def __call__(self) -> None:
        """Run the activation stages on the bound tensors."""
        for function, arguments in self._calls:
            function(*arguments)

    def wait(self) -> None:
        """Return when the work of all calls is done."""
        self.device.sync()

    def faults(self) -> list[str]:
        """What the calls did beside their tensors: memory around one written, or a workspace left with poison in it,
        because an element was not written or was computed from what lies outside another tensor."""
        wrong = [f"{name}: written outside" for name, guarded in self._guarded.items() if not guarded.intact]
        stages = [kernel.name for kernel in self.kernels.kernels if kernel.kind != "output"]
        return wrong + [f"{name}: not filled" for name in stages if not self._guarded[name].filled]

    def output(self) -> np.ndarray:
        """The output of the last call, in the lowering's layout."""
        last = self.kernels.kernels[-1].name
        shape = output_shape(self.kernels.problem, self.kernels.lowering.layout)
        return self._tensors[last].numpy().reshape(shape)

    def run(self, data: np.ndarray, weight: np.ndarray, operands: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Bind and run once."""
        self.bind(data, weight, operands)
        self()
        return self.output()

    def time(self, repeat: int = 15, warmup: int = 2, number: int = 1) -> list[float]:
        """Seconds of one call on the bound tensors, all activation stages included, in each of `repeat` measurements.

        A measurement is the mean of `number` calls in a row: more than one for a layer of microseconds, so that the
        clock is not measured. What stays is the call of a kernel (about 0.4 us), which a network pays as well.
        """
        for _ in range(warmup):
            self()
        seconds = []
        self.wait()
        for _ in range(repeat):
            start = time.perf_counter()
            for _ in range(number):
                self()
            self.wait()
            seconds.append((time.perf_counter() - start) / number)
        return seconds


def _between(stage: str, index: int) -> str:
    """The name of a kernel's scratch among the tensors."""
    return f"scratch {index} of {stage}"


def compile_layer(
    problem: Problem | GradientProblem,
    lowering: str | Lowering,
    target: tvm.target.Target,
    *,
    epilogue: Sequence[EpilogueOp] | None = None,
    tile: Tile | None = None,
    schedule: ScheduleKnobs = (),
) -> LayerKernel:
    """Compile one layer, or one gradient of a layer, in one lowering of its catalogue.

    `epilogue` defaults to bias and relu for a layer and to nothing for a gradient. Raises InputError where the lowering
    is unknown or does not apply, or a size fixed in it does not fit the layer.
    """
    if epilogue is None:
        epilogue = () if isinstance(problem, GradientProblem) else (EpilogueOp("bias", 0), EpilogueOp("relu"))
    if isinstance(lowering, str):
        known = lowerings_of(problem)
        if lowering not in known:
            raise InputError(f"lowering {lowering!r} is not one of {', '.join(known)}")
        lowering = known[lowering]
    machine = machine_of(target)
    problem = on_machine(problem, machine)
    reason = lowering.applicable(problem)
    if reason is None:
        require_sizes(lowering, problem)
        cost = lowering.cost(problem, tile or tile_for(lowering, problem, machine))
        reason = too_large(lowering, problem, cost)
    if reason is not None:
        raise InputError(f"lowering {lowering.key} does not apply: {reason}; {_what_works(problem, machine)}")
    require_dtype("the layer", problem.dtype, machine)
    kernels = layer_kernels(lowering, problem, machine, tuple(epilogue), tile, schedule)
    modules = [tvm.IRModule({"main": k.func.with_attr("global_symbol", "main")}) for k in kernels.kernels]
    with target:  # device code is compiled for the enclosing target
        functions = [tvm.compile(module, target=target, tir_pipeline=TIR_PIPELINE) for module in modules]
    return LayerKernel(kernels, functions, tvm.cuda(0) if isinstance(machine, Gpu) else tvm.cpu())


def _what_works(problem: Problem | GradientProblem, machine: AnyMachine) -> str:
    if not isinstance(problem, GradientProblem):
        return suitable(problem, machine)
    keys = [key for key, lowering in lowerings_of(problem).items() if lowering.applicable(problem) is None]
    return f"what works here: {', '.join(keys)}"
