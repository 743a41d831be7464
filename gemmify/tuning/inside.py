"""Layers timed where they will run: inside their network, several variants of it in turns.

A layer alone meets its input and its weights in other caches than in the network. So the last word on the finalists is
spoken there: the network is compiled once a variant, each variant runs in a process of its own, and they take turns.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bench.network import kernel_rows, layer_seconds
from ..bench.peers import OURS
from ..bench.process import WorkerProcess
from ..bench.rounds import SETTLE_SECONDS, agreement, outputs_of
from ..errors import CheckError
from ..runtime import compile_to_model, random_inputs
from .layers import Network
from .point import Point

PROFILED = 5
"""Runs of one turn, of which a kernel's median counts."""
BURST = 5
TOLERANCE = 1e-3
"""Outputs of two variants differ by no more than this share of the largest."""

Choice = Mapping[str, Point]
"""Layer name -> point; a layer that is not named is compiled untuned."""


@dataclass(frozen=True)
class Inside:
    """Seconds by variant: of each layer, one entry a round, and of the whole network, one entry a run."""

    layers: tuple[dict[str, list[float]], ...]
    network: tuple[list[float], ...]


class Variants:
    """Variants of one network, compiled as they are added, timed together; a context manager that owns their files."""

    def __init__(self, net: Network, target: Any, threads: int, bounds: Mapping[str, Any] | None = None) -> None:
        """`bounds`: the `max_workspace` and `max_error` that the points were found under."""
        self.net, self.target, self.threads, self.bounds = net, target, threads, dict(bounds or {})
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gemmify-variants-")))
        self._made: list[tuple[Path, list[dict[str, Any]]]] = []
        self._inputs = self._folder / "inputs.npz"
        self.compile_seconds = 0.0

    def add(self, choice: Choice) -> None:
        """Compile the network with `choice` and keep the library. Errors as `gemmify.compile`, InputError also for a
        point that does not apply: what is measured must be what it is logged as."""
        from ..plan import Plan

        begin = time.perf_counter()
        plan = Plan({name: point.lowering for name, point in choice.items()}, dict(choice))
        options = {
            "shapes": self.net.shapes,
            "dtype": self.net.dtype,
            "plan": plan,
            "logs": False,
            "strict": True,
            **self.bounds,
        }
        model = compile_to_model(self.net.source, threads=self.threads, target=self.target, **options)
        path = self._folder / f"variant{len(self._made)}.so"
        model.export(path)
        if not self._made:
            np.savez(self._inputs, **random_inputs(model.inputs))  # type: ignore[arg-type]
        self._made.append((path, model.layers))
        self.compile_seconds = max(self.compile_seconds, time.perf_counter() - begin)

    def __len__(self) -> int:
        """How many variants were added."""
        return len(self._made)

    def measure(self, rounds: int, which: Sequence[int] | None = None) -> Inside:
        """Time the variants `which` (default: all) in turns, odd rounds backwards; the result is in that order. Raises
        CheckError where their outputs differ, GemmifyError where one cannot run."""
        made = [self._made[i] for i in (range(len(self._made)) if which is None else which)]
        with ExitStack() as stack:
            workers = [stack.enter_context(WorkerProcess(f"variant {i}")) for i in range(len(made))]
            outputs = []
            for i, (worker, (path, _)) in enumerate(zip(workers, made, strict=True)):
                worker.ask("load", engine=OURS, model=str(path), threads=self.threads, inputs=str(self._inputs))
                outputs.append(outputs_of(worker, self._folder / f"out{i}.npz"))
                worker.pause()
            self._compare(outputs)
            layers: list[dict[str, list[float]]] = [{} for _ in workers]
            network: list[list[float]] = [[] for _ in workers]
            order = list(range(len(workers)))
            for index in range(rounds):
                for i in order if index % 2 == 0 else reversed(order):
                    time.sleep(SETTLE_SECONDS)
                    network[i] += workers[i].ask("burst", runs=BURST, drop=2)["seconds"]
                    kernels = workers[i].ask("profile", repeat=PROFILED)["kernels"]
                    workers[i].pause()
                    for name, seconds in layer_seconds(kernel_rows(kernels, made[i][1])).items():
                        layers[i].setdefault(name, []).append(seconds)
        return Inside(tuple(layers), tuple(network))

    def _compare(self, outputs: Sequence[list[np.ndarray]]) -> None:
        for i, found in enumerate(outputs[1:], 1):
            relative = agreement(outputs[0], found, f"variant {i}")["relative"]
            if relative is None or relative > TOLERANCE:
                raise CheckError(
                    f"{self.net.name}: variant {i} of the tuned network differs from the untuned one by {relative} of "
                    f"the largest output, the bound is {TOLERANCE:g}; nothing of it was kept"
                )

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Variants:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
