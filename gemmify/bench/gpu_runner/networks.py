"""Whole networks: ours on the virtual machine of TVM's runtime, beside the same network in PyTorch, both as graphs."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from . import arrays, weights
from .box import Array, Box
from .ffi import CPU, CUDA, Device, Module, Tensor
from .layers import OURS
from .loaded import Entry, Libraries
from .timing import Contestant, in_turns
from .torch_graph import TorchGraph, fuse, unknown_operators

_POOLED = 2  # the virtual machine's allocator that keeps what it took


def measure(box: Box, libraries: Libraries, entry: Entry, seed: int, share: float = 1.0) -> dict[str, Any]:
    """`{times, ratio, error, right, images}` of one network; `ratio` is the faster of PyTorch's over ours."""
    with open(os.path.join(box.folder, entry["graph"]), encoding="utf-8") as file:
        graph = json.load(file)
    drawn = {w["name"]: weights.draw(w, entry["seed"]) for w in graph["weights"]}
    network = Network(box, libraries, entry, drawn)
    running: dict[str, Contestant] = {}
    try:
        network.data.draw(seed, entry["id"], scale=2 * 3**0.5)  # of mean square 1, as the weights expect
        got = network.run()
        box.synchronize()
        running[OURS] = network.contestant()
        result: dict[str, Any] = {"failed": {}}
        if box.torch is not None:
            result.update(_peers(box, graph, entry, drawn, network, got, running))
        else:
            finite = bool(np.isfinite(got).all())
            result.update(error=None, right=finite, why="" if finite else "outputs are not finite")
        times = in_turns(box.cuda, running, 3 * share)
        box.synchronize()
    finally:
        for contestant in running.values():
            contestant.close()
        network.close()
        if box.torch is not None:
            box.torch.cuda.empty_cache()
    peers = [found["median"] for name, found in times.items() if name != OURS]
    if peers:
        result["ratio"] = min(peers) / times[OURS]["median"]
    ours = times[OURS]["median"]
    return {**result, "times": times, "images": entry["batch"] / ours, "gflops": 2 * entry["macs"] / ours / 1e9}


class Network:
    """A compiled network with its weights on the GPU."""

    def __init__(self, box: Box, libraries: Libraries, entry: Entry, drawn: dict[str, np.ndarray]) -> None:
        self.box, self.arrays = box, list[Array]()
        self.result: Any = None
        shape, dtype = entry["input"]
        self.data = self._array(tuple(shape), dtype)
        parameters = [self._parameter(libraries, entry, p, drawn) for p in entry["parameters"]]
        self.arguments: list[Any] = [self.data.tensor, *(array.tensor for array in parameters)]
        machine = libraries[entry["library"]]["vm_load_executable"]()
        assert isinstance(machine, Module)
        self.machine = box.runtime.bound(machine)
        self.machine["vm_initialization"](CUDA, 0, _POOLED, CPU, 0, _POOLED)
        *arena, main = entry["entries"]
        self.main = self.machine[main]
        if arena:  # the memory between the kernels, which all runs share
            self.arguments.insert(0, self.machine[arena[0]]())
        self.output_dtype = entry["output"][1]

    def _array(self, shape: tuple[int, ...], dtype: str) -> Array:
        self.arrays.append(self.box.array(shape, dtype))
        return self.arrays[-1]

    def _parameter(self, libraries: Libraries, entry: Entry, recipe: Entry, drawn: dict[str, np.ndarray]) -> Array:
        """A weight as the kernels read it; the stages of its lowering run here, once."""
        shape, dtype = recipe["source"]
        source = self._array(tuple(shape), dtype)
        source.put(weights.arranged(drawn[recipe["weight"]], recipe, dtype))
        if not recipe["stages"]:
            return self._seen_as(source, recipe)
        known = {"weight": source}
        for stage in recipe["stages"]:
            for name, (stage_shape, stage_dtype) in stage["writes"].items():
                known[name] = self._array(tuple(stage_shape), stage_dtype)
            function = libraries[entry["weight_library"]][stage["symbol"]]
            function(*(known[name].tensor for name in stage["arguments"]))
        self.box.cuda.synchronize()
        return self._seen_as(known[recipe["result"]], recipe)

    def _seen_as(self, array: Array, recipe: Entry) -> Array:
        """The array in the shape that the network takes; its memory is the same."""
        array.shape = tuple(recipe["shape"])
        array.tensor = self.box.runtime.tensor(array.memory.address, array.shape, array.dtype, Device(CUDA))
        return array

    def launch(self) -> None:
        """Launch the network once; the output stays on the GPU."""
        self.result = None  # back to the pool
        self.result = self.main(*self.arguments)

    def run(self) -> np.ndarray:
        """Run it once; the first output in float64."""
        self.launch()
        self.box.cuda.synchronize()
        found = self.result[0] if isinstance(self.result, list) else self.result
        assert isinstance(found, Tensor)
        stored = self.box.cuda.download(found.data, found.shape, arrays.STORED[self.output_dtype])
        return arrays.widen(stored, self.output_dtype)

    def contestant(self) -> Contestant:
        """A run as a graph. It writes to the arena and the output that the virtual machine had when it was captured,
        so `result` must live as long as the graph. The machine still holds the output of the run before: with one more
        run there is memory for two, and none is allocated while recording."""
        self.launch()
        self.box.cuda.synchronize()
        graph = self.box.cuda.capture(self.launch)
        return Contestant(graph.launch, self.box.cuda.stream, 1, graph.close)

    def close(self) -> None:
        self.box.cuda.synchronize()
        self.result, self.arguments = None, []
        for array in self.arrays:
            array.close()
        self.arrays = []


def _peers(
    box: Box,
    graph: dict[str, Any],
    entry: Entry,
    drawn: dict[str, np.ndarray],
    network: Network,
    got: np.ndarray,
    running: dict[str, Contestant],
) -> dict[str, Any]:
    """Add PyTorch's graphs to `running`; how far ours is from it in float32."""
    from .peers import captured, set_precision

    torch = box.torch
    if unknown := unknown_operators(graph["nodes"]):
        return {
            "failed": {"torch": f"no operator {', '.join(unknown)} in the comparison"},
            "error": None,
            "right": True,
        }
    dtype = entry["input"][1]
    data = network.data.as_torch().contiguous(memory_format=torch.channels_last)
    set_precision(torch, "float32")
    with torch.inference_mode():
        exact = _in_torch(torch, graph, drawn, "float32", graph["nodes"])
        (want,) = exact.run({graph["inputs"][0]: data.float()})
    reached = _difference(got, want.double().cpu().numpy())
    del exact
    set_precision(torch, entry["precision"])
    failed: dict[str, str] = {}
    forms = {"eager": graph["nodes"], "fused": fuse(graph["nodes"], graph["outputs"])}
    for name, nodes in forms.items():
        try:
            model = _in_torch(torch, graph, drawn, dtype, nodes)
            given = {graph["inputs"][0]: data}
            running[name] = captured(box, lambda model=model, given=given: model.run(given), lambda seconds: 1)  # type: ignore[misc]
        except Exception as err:  # what this version of cuDNN does not take
            failed[name] = f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"
    limit = float(entry["limit"])
    right = reached <= limit
    why = "" if right else f"off by {reached:.1e} of the largest output, {limit:.1e} is allowed"
    error = reached if np.isfinite(reached) else None
    return {"failed": failed, "error": error, "limit": limit, "right": right, "why": why}


def _in_torch(
    torch: Any, graph: dict[str, Any], drawn: dict[str, np.ndarray], dtype: str, nodes: list[Any]
) -> TorchGraph:
    values = {name: torch.from_numpy(array).to("cuda", getattr(torch, dtype)) for name, array in drawn.items()}
    for name, value in values.items():
        if value.dim() == 4:
            values[name] = value.contiguous(memory_format=torch.channels_last)
    return TorchGraph(torch, nodes, graph["outputs"], values)


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-30))
