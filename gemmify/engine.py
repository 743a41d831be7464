"""The virtual machine of one network on its device, with the buffers of its inputs: what a `Model` runs on.

On a GPU everything stays on CUDA's default stream, in the order of the calls; the memory between the kernels (the
arena) is allocated once, with the weights, and the launches of a run can be recorded as one graph.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .errors import GemmifyError
from .manifest import Manifest
from .threads import import_tvm


def flatten(value: Any) -> list[Any]:
    """The tensors of a virtual machine's result, whether one tensor or nested tuples."""
    return [value] if hasattr(value, "numpy") else [t for item in value for t in flatten(item)]


class Engine:
    """Runs the code of `module`, which `manifest` describes. Not safe for several threads at once."""

    def __init__(self, module: Any, manifest: Manifest, *, graph: bool = False) -> None:
        """`graph`: on a GPU, record the launches at the first run and repeat them as one CUDA graph.

        Raises GemmifyError where the GPU has too little memory.
        """
        self._on_gpu, self._process = bool(manifest.archs), os.getpid()
        self._graph = graph and self._on_gpu
        self._captured: Any = None
        with self._gpu_errors(manifest):
            self._allocate(module, manifest)
        self._manifest = manifest

    def _allocate(self, module: Any, manifest: Manifest) -> None:
        tvm = import_tvm()
        self._device = tvm.cuda(0) if self._on_gpu else tvm.cpu()
        self._vm = tvm.runtime.vm.VirtualMachine(module, self._device)
        self._buffers = [tvm.runtime.empty(s.shape, s.dtype, self._device) for s in manifest.inputs]
        self._main, self._first = self._vm["main"], list[Any]()
        if self._on_gpu and manifest.memory.get("arena"):
            from .cuda.names import ARENA, RUN

            self._main, self._first = self._vm[RUN], [self._vm[ARENA]()]

    @contextlib.contextmanager
    def _gpu_errors(self, manifest: Manifest) -> Iterator[None]:
        """What a GPU's driver complains of, as a GemmifyError."""
        try:
            yield
        except GemmifyError:
            raise
        except Exception as err:
            if not self._on_gpu:
                raise
            raise _failed(err, manifest) from err

    def place(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy the inputs into the buffers, which stay where they are. Raises GemmifyError in a process forked from the
        one that made this: a GPU's driver does not come along."""
        if self._on_gpu and os.getpid() != self._process:
            raise GemmifyError(
                "this process was forked after a network had been loaded on the GPU, which does not come along; start "
                "it with multiprocessing's spawn method, or load and run the network only in the child"
            )
        for buffer, array in zip(self._buffers, arrays, strict=True):
            buffer.copyfrom(array)

    def _launch(self) -> Any:
        return self._main(*self._first, *self._buffers)

    def run(self) -> Any:
        """Run once on what was placed; the result is on the device, complete, and good until the next run. Raises
        GemmifyError where the GPU fails."""
        with self._gpu_errors(self._manifest):
            return self._run()

    def _run(self) -> Any:
        if self._graph:
            if self._captured is None:
                from .cuda.graph import CapturedRun

                self._captured = CapturedRun(self._device, self._launch)
            return self._captured()
        result = self._launch()
        self._sync()
        return result

    def outputs(self) -> list[np.ndarray]:
        """Run once; the outputs as arrays of their own."""
        return [np.array(tensor.numpy(), copy=True) for tensor in flatten(self.run())]

    def _sync(self) -> None:
        if self._on_gpu:
            self._device.sync()

    def watch(self) -> Watch:
        """An observer of every kernel from now on; it cannot be taken off again."""
        return Watch(self._vm, self._sync)


def _failed(err: Exception, manifest: Manifest) -> GemmifyError:
    from .cuda.device import gpu_here

    lines = str(err).strip().splitlines() or [type(err).__name__]
    said = next((line.strip() for line in lines if "CUDA" in line), lines[-1].strip())
    if "OUT_OF_MEMORY" in said.upper() or "out of memory" in said:
        needed = sum(manifest.memory.get(kind, 0) for kind in ("weights", "arena", "outputs"))
        here = gpu_here()
        has = f"has {here.memory_bytes / 2**20:.0f} MiB in all" if here is not None else "has less"
        return GemmifyError(
            f"the network needs {needed / 2**20:.0f} MiB of the GPU's memory, which {has}: {said}; end what else uses "
            "it, or compile for a smaller batch"
        )
    return GemmifyError(f"the GPU failed: {said[:300]}")


class Watch:
    """Notes (kernel, seconds) of each call in the last of `runs`, where there is one; waits for a GPU after each."""

    def __init__(self, vm: Any, sync: Any) -> None:
        self.runs: list[list[tuple[str, float]]] = []
        self._begun: list[float] = []
        self._sync = sync
        vm.set_instrument(self._note)

    def _note(self, _func: Any, name: str, before: bool, _result: Any, *_args: Any) -> int:
        if not before:
            self._sync()
        now = time.perf_counter()
        if before:
            self._begun.append(time.perf_counter())
        elif self._begun:
            seconds = now - self._begun.pop()
            if self.runs:
                self.runs[-1].append((str(name), seconds))
        return 0
