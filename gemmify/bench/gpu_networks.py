"""The GPU suite's networks: libraries without their weights, which the runner draws from a seed, and the graphs that it
runs in PyTorch.

A network of the zoo is built with its batch norms folded into its convolutions. PyTorch then has no batch norm to run
either, which is the best that it can be given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt, prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import numpy_helper
from tvm import relax

from gemmify.bench.gpu_build import compile_library
from gemmify.bench.gpu_problems import WantedNetwork, dtype_of
from gemmify.bench.gpu_runner import weights as runner
from gemmify.errors import GemmifyError
from gemmify.fold import evaluate
from gemmify.frontend.graph import attributes
from gemmify.zoo import ZOO
from gemmify.zoo.builder import Builder, Tensor
from lowering.graph._rewrite import Emitter, Graph, array_of, is_const, substitute

EMBEDDED = 16384
"""Bytes up to which a constant stays in the library: biases, tables."""
LIMITS = {"float32": 1e-3, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 1.5e-1}
"""The largest difference of a network's output from PyTorch's in float32, over the largest output."""
SEED = 20260101
PICTURE = (3, 224, 224)
"""Channels, rows and columns of what the networks of the zoo look at."""


class FoldedBuilder(Builder):
    """A builder that notes each weight instead of drawing it, and folds a batch norm into the convolution before it."""

    def __init__(self, name: str) -> None:
        super().__init__(name, seed=0)
        self.weights: dict[str, runner.Weight] = {}
        self._last = ""

    def uniform(self, name: str, shape: tuple[int, ...], low: float, high: float) -> str:
        self.weights[name] = {"name": name, "shape": list(shape), "low": float(low), "high": float(high)}
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        self.weights[name] = {"name": name, "shape": list(values.shape), "values": values.tolist()}
        return name

    def conv(
        self, name: str, x: Tensor, m: int, k: int, stride: int = 1, pad: int = 0, groups: int = 1, bias: bool = True
    ) -> Tensor:
        self._last = name
        return super().conv(name, x, m, k, stride, pad, groups, bias=True)

    def batch_norm(self, name: str, x: Tensor, scale: float = 1.0) -> Tensor:
        assert x.name == f"{self._last}_out", f"{name} does not stand behind a convolution"
        weight = self.weights[f"{self._last}_weight"]
        for end in ("low", "high"):
            weight[end] *= scale / x.power**0.5
        return Tensor(x.name, x.shape, scale * scale, x.rectified)


@dataclass
class Source:
    """A network before it is compiled: the ONNX model with its weights, and the graph that the runner is given."""

    model: onnx.ModelProto
    graph: dict[str, Any]
    drawn: dict[str, np.ndarray]


def source_of(name: str, batch: int) -> Source:
    """The network of the zoo in float32, its weights drawn as the runner draws them."""
    builder = FoldedBuilder(name)
    output = ZOO[name](builder, builder.input("data", (batch, *PICTURE)))
    model = builder.finish(output)
    drawn = {key: runner.draw(weight, SEED) for key, weight in builder.weights.items()}
    for key, array in drawn.items():
        model.graph.initializer.append(numpy_helper.from_array(array, key))
    return Source(model, graph_of(model, builder.weights), drawn)


def graph_of(model: onnx.ModelProto, weights: Mapping[str, runner.Weight]) -> dict[str, Any]:
    """The nodes as the runner's interpreter takes them; bounds of Clip become attributes."""
    nodes = []
    for node in model.graph.node:
        found = {"op": node.op_type, "inputs": list(node.input), "outputs": list(node.output)}
        values = attributes(node)
        if node.op_type == "Clip":
            for end, given in zip(("min", "max"), node.input[1:3], strict=False):
                values[end] = float(np.asarray(weights[given]["values"]))
            found["inputs"] = [node.input[0]]
        nodes.append({**found, "attributes": values})
    read = {name for node in nodes for name in node["inputs"]}
    return {
        "inputs": [i.name for i in model.graph.input],
        "outputs": [o.name for o in model.graph.output],
        "weights": [weight for name, weight in weights.items() if name in read],
        "nodes": nodes,
    }


def build_network(wanted: WantedNetwork, target: str, folder: Path) -> dict[str, Any]:
    """Compile a network into `folder`; returns the runner's entry. Raises GemmifyError where a weight of it cannot be
    traced back to one of the graph's, and whatever compiling raises."""
    from gemmify.export import write_library
    from gemmify.frontend import import_model
    from gemmify.lower import lower_layers
    from gemmify.pipeline import fuse_rest, lowering_graph, resolve_target
    from gemmify.pipeline_build import build_executable
    from gemmify.scratch import allocate_scratch
    from gemmify.select import Policy
    from gemmify.tuning.choice import Chooser
    from gemmify.tuning.use import open_logs
    from schedules import machine_of, schedule_module

    resolved = resolve_target(f"{target} -tf32" if wanted.precision == "tf32" else target)
    machine, dtype = machine_of(resolved), dtype_of(wanted.precision)
    source = source_of(wanted.name, wanted.batch)
    imported = import_model(source.model, dtype=dtype)
    chooser = Chooser(machine, Policy(), open_logs(resolved, 1, None), False)
    mod, layers = lower_layers(lowering_graph(imported.mod), chooser)
    traced = Traced(source, dtype, layers)
    mod = allocate_scratch(schedule_module(fuse_rest(mod, resolved), machine))
    mod, parameters = outside(mod, traced)
    executable, memory = build_executable(mod, resolved)
    stem = wanted.id.removeprefix("network/").replace("/", "_")
    write_library(executable, resolved, folder / f"libraries/{stem}.so")
    weight_library = ""
    if traced.functions:
        weight_library = f"libraries/{stem}_weights.so"
        compile_library(traced.functions, target, folder / weight_library)
    graph = f"graphs/{wanted.name}.json"
    (folder / "graphs").mkdir(exist_ok=True)
    (folder / graph).write_text(json.dumps(source.graph), encoding="utf-8")
    return {
        "id": wanted.id,
        "section": "network",
        "name": wanted.name,
        "precision": wanted.precision,
        "batch": wanted.batch,
        "library": f"libraries/{stem}.so",
        "weight_library": weight_library,
        "graph": graph,
        "seed": SEED,
        "input": [list(imported.inputs[0].shape), imported.inputs[0].dtype],
        "output": [list(imported.outputs[0].shape), imported.outputs[0].dtype],
        "parameters": parameters,
        "entries": _entries(memory),
        "limit": LIMITS[wanted.precision],
        "macs": sum(layer.site.problem.macs for layer in layers),
        "bytes": memory.weight_bytes,
        "workspace_bytes": memory.workspace_peak,
        "lowering": ", ".join(sorted({layer.choice.lowering.key for layer in layers})),
    }


def _entries(memory: Any) -> list[str]:
    """The functions of the virtual machine: one that allocates the arena and one that runs in it, or one for both."""
    if not memory.arena_bytes:
        return ["main"]
    from gemmify.cuda.names import ARENA, RUN

    return [ARENA, RUN]


@dataclass
class Traced:
    """Where the constants of a compiled network come from: by their bytes, a recipe each (see `runner.arranged`).

    `functions` are the weight stages that a recipe needs, which are run on the machine itself."""

    source: Source
    dtype: str
    layers: list[Any]
    functions: dict[str, Any] = field(default_factory=dict)
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in self.source.drawn.items():
            for shape, axes in arrangements(array.shape, self._channels()):
                recipe = {"weight": name, "as": list(shape), "axes": list(axes), "stages": []}
                found = runner.arranged(array, recipe, self.dtype)
                recipe["source"] = [list(found.shape), self.dtype]
                self.recipes.setdefault(key_of(found), recipe)
        for number, layer in enumerate(self.layers):
            self._add_stages(number, layer)

    def _channels(self) -> set[int]:
        shapes = [weight["shape"] for weight in self.source.graph["weights"]]
        return {shape[0] for shape in shapes if len(shape) == 4}

    def _add_stages(self, number: int, layer: Any) -> None:
        """The recipes of what a layer's weight stages compute, where they do more than move."""
        from tvm import te

        stages = [stage for stage in layer.choice.lowering.stages(layer.kernels.problem, layer.choice.tile)]
        scheduled = {kernel.name: kernel for kernel in layer.kernels.kernels}
        if not isinstance(layer.site.weight, np.ndarray):
            return
        base = self.recipes.get(key_of(layer.site.weight))
        arrays, steps = {"weight": layer.site.weight}, list[dict[str, Any]]()
        for stage in stages:
            if stage.kind != "weight" or not all(name in arrays for name in stage.reads):
                continue
            inputs = [te.placeholder(arrays[r].shape, str(arrays[r].dtype), name=r) for r in stage.reads]
            known = {t: arrays[r] for t, r in zip(inputs, stage.reads, strict=True)}
            arrays[stage.name] = evaluate(stage.compute(*inputs), known)
            kernel, symbol = scheduled[stage.name], f"l{number}_{len(steps)}"
            writes = {f"{stage.name} scratch {i}": [list(s), d] for i, (s, d) in enumerate(kernel.scratch)}
            writes[stage.name] = [list(kernel.shape), kernel.dtype]
            steps.append({"symbol": symbol, "arguments": [*stage.reads, *writes], "writes": writes})
            key = key_of(arrays[stage.name])
            if base is None or key in self.recipes:
                continue
            for step, done in zip(steps, [s for s in stages if s.kind == "weight"], strict=False):
                self.functions[step["symbol"]] = scheduled[done.name].func
            self.recipes[key] = {**base, "stages": [dict(step) for step in steps], "result": stage.name}


def arrangements(shape: tuple[int, ...], channels: set[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(shape to see it in, axes) of every way in which a weight may be arranged: its axes permuted; the columns behind
    a flattened picture in the order of channels last."""
    if len(shape) == 4:
        yield from ((shape, axes) for axes in ((0, 2, 3, 1), (0, 1, 2, 3), (2, 3, 1, 0), (2, 3, 0, 1)))
        return
    yield shape, tuple(range(len(shape)))
    if len(shape) == 2:
        yield shape, (1, 0)
        for c in sorted(channels):
            side = isqrt(shape[1] // c)
            if c * side * side == shape[1] and side > 1:
                yield (shape[0], c, side, side), (0, 2, 3, 1)
                yield (shape[0], c, side, side), (2, 3, 1, 0)


def key_of(array: np.ndarray) -> str:
    """What tells arrays apart, whatever their shape."""
    flat = np.ascontiguousarray(array)
    return hashlib.sha1(flat.reshape(-1).view(np.uint8).data).hexdigest() + str(flat.nbytes)


def outside(mod: tvm.IRModule, traced: Traced) -> tuple[tvm.IRModule, list[dict[str, Any]]]:
    """`mod` with every constant of more than EMBEDDED bytes as a further parameter of `main`, and their recipes in the
    order of these parameters. Raises GemmifyError for a constant that no recipe makes."""
    graph, out = Graph(mod["main"]), Emitter()
    parameters: dict[str, relax.Var] = {}
    recipes: list[dict[str, Any]] = []

    def lifted(expr: Any) -> Any:
        if not is_const(expr):
            return expr
        array = array_of(expr)
        if array.nbytes <= EMBEDDED:
            return expr
        key = key_of(array) + str(array.shape)
        if key not in parameters:
            recipe = traced.recipes.get(key_of(array))
            if recipe is None:
                raise GemmifyError(
                    f"a constant of shape {array.shape} is no weight of the network that could be traced"
                )
            recipes.append({**recipe, "shape": list(array.shape), "dtype": str(array.dtype)})
            parameters[key] = relax.Var(f"weight{len(parameters)}", expr.ty)
        return parameters[key]

    for var, value in graph.bindings:
        out.env[var] = out.emit(_with_constants(substitute(value, out.lookup), lifted), var.name)
    mod = mod.clone()
    outputs = [substitute(o, out.lookup) for o in graph.outputs]
    graph.params += list(parameters.values())
    mod["main"] = out.finish(graph, outputs)
    assert all(prod(r["shape"]) for r in recipes)
    return relax.transform.Normalize()(mod), recipes


def _with_constants(value: Any, lifted: Any) -> Any:
    if isinstance(value, relax.Call):
        args = [_with_constants(arg, lifted) for arg in value.args]
        return relax.Call(value.op, args, value.attrs, value.ty_args)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_with_constants(item, lifted) for item in value.fields])
    return lifted(value)
