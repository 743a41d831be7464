"""Running a compiled network: loading, judging whether this machine can run it, and the `Model` that users hold."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import host
from .engine import Engine, Watch
from .errors import GemmifyError, IncompatibleError, InputError
from .loading import check_graph, check_host, check_versions, link_here, load_module, map_library, runtime_for
from .manifest import Manifest, TensorSpec, read_manifest
from .threads import (
    check_fork,
    check_threads,
    default_threads,
    import_tvm,
    require_one_thread,
    use_threads,
    without_scope_lines,
)

__all__ = ["Model", "check_host", "compile_to_model", "load", "load_module", "random_inputs"]

Inputs = Mapping[str, Any] | Sequence[Any] | np.ndarray
_NO_KERNELS = ("vm.builtin.", "gemmify_rebase", "gemmify_arena", "gemmify_run")


def random_inputs(specs: Sequence[TensorSpec], seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded arrays that fit `specs`: normal deviates for floats, 0 or 1 for integers and booleans."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        whole = dtype.kind in "iub"
        values = rng.integers(0, 2, spec.shape) if whole else rng.standard_normal(spec.shape)
        arrays[spec.name] = np.asarray(values).astype(dtype)
    return arrays


class Model:
    """A compiled network, ready to run. Made by `gemmify.compile` and `gemmify.load`.

    Runs of one Model take turns (it owns one virtual machine and one set of input buffers); threads that should run
    at the same moment load a Model each, and divide the cores with `set_threads`.
    """

    def __init__(
        self,
        manifest: Manifest,
        threads: int | None = None,
        *,
        module: Any = None,
        executable: Any = None,
        path: Path | None = None,
    ) -> None:
        """Over a loaded library's `module` and its `path`, or over the `executable` (VMExecutable) of a compilation."""
        import_tvm()
        self._module, self._executable, self._path = module, executable, path
        self.manifest = manifest
        self._lock = threading.RLock()
        self._threads = 1 if manifest.archs else default_threads()
        self._graph = manifest.cuda_graph
        self._engine: Engine | None = None
        self._watched: tuple[Engine, Watch] | None = None
        if threads is not None:
            self.set_threads(threads)

    def _new_engine(self, graph: bool = False) -> Engine:
        """A virtual machine over the code. Made at the first run, so that a network compiled for another machine can
        still be exported; IncompatibleError where this machine cannot run it."""
        if self._module is None:
            check_host(self.manifest)
            self._module = link_here(self._executable, self.manifest)
        return Engine(self._module, self.manifest, graph=graph)

    def _ready(self) -> Engine:
        """The virtual machine of ordinary runs, with the input buffers. Call with the lock held."""
        if self._engine is None:
            self._engine = self._new_engine(self._graph)
        return self._engine

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape and dtype of each input, in the model's order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape and dtype of each output, in the model's order."""
        return self.manifest.outputs

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Per layer: name, op, problem, lowering, reason, gemm (m, n, k), macs, workspace_bytes, weight_bytes, tile,
        sizes and schedule where they are not the default's, tuned (what a log says of it, else None) ..."""
        return [dict(layer) for layer in self.manifest.layers]

    def memory(self) -> dict[str, int]:
        """Bytes by kind: weights, arena (activations and workspace, reused), workspace (the part of the arena at its
        peak), outputs (allocated at each run), kernels (scratch inside the kernels of all threads, the largest).

        A run holds weights + arena + outputs + kernels at most. A layer's `workspace_bytes` is its workspace in the
        arena plus, for each thread, its scratch inside the kernels. On a GPU all of it is the GPU's memory, and the
        arena is kept between the runs.
        """
        return dict(self.manifest.memory)

    @property
    def threads(self) -> int:
        """CPU threads that a run uses; 1, which launches the kernels, on a GPU."""
        return self._threads

    @property
    def device(self) -> str:
        """What a run takes place on, for people: "2 threads", or the GPU and its architecture."""
        if not self.manifest.archs:
            return f"{self._threads} threads"
        from .cuda.device import gpu_here

        return str(gpu_here() or f"a GPU ({', '.join(self.manifest.archs)})")

    def set_threads(self, threads: int) -> None:
        """Run on `threads` CPU threads from now on.

        Raises InputError for a number below 1 or above the CPUs that the process may use, and for one above the size
        of TVM's pool where that was fixed already: by other code that ran TVM first in this Python thread. On a GPU
        there is nothing to choose: for any number but 1.
        """
        if self.manifest.archs:
            require_one_thread(threads)
            return
        check_threads(threads)
        with self._lock:
            used = use_threads(threads)
            if used < threads:
                raise InputError(
                    f"{threads} threads were asked for, but this process already fixed TVM's pool at {used}; "
                    f"set TVM_NUM_THREADS={threads} before starting"
                )
            self._threads = threads

    def _checked(self, inputs: Inputs) -> list[np.ndarray]:
        """The input arrays in the model's order, contiguous; InputError where one is missing, unknown or no fit."""
        specs = self.inputs
        wanted = ", ".join(map(str, specs)) or "none"
        if not isinstance(inputs, Mapping):
            if not isinstance(inputs, list | tuple) and not hasattr(inputs, "__array__"):
                raise InputError(
                    f"the inputs must be {{name: array}}, an array, or a list of arrays, got {type(inputs).__name__}; "
                    f"the model takes {wanted}"
                )
            values = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
            if len(values) != len(specs):
                raise InputError(f"the model takes {len(specs)} inputs ({wanted}), {len(values)} were given")
            inputs = {spec.name: value for spec, value in zip(specs, values, strict=True)}
        unknown = sorted(set(inputs) - {s.name for s in specs}, key=str)
        missing = [s.name for s in specs if s.name not in inputs]
        if unknown or missing:
            said = [f"unknown input {', '.join(map(str, unknown))}"] if unknown else []
            said += [f"missing input {', '.join(missing)}"] if missing else []
            raise InputError(f"{' and '.join(said)}; the model takes {wanted}")
        return [_fit(spec, inputs[spec.name]) for spec in specs]

    def _place(self, inputs: Inputs) -> Engine:
        """Copy the inputs into the model's own aligned buffers. Call with the lock held."""
        arrays = self._checked(inputs)
        engine = self._ready()
        engine.place(arrays)
        if not self.manifest.archs:
            use_threads(self._threads)
        return engine

    def run(self, inputs: Inputs) -> list[np.ndarray]:
        """Run once on `{name: array}` (or the arrays in order); returns the outputs in the model's order, as copies.

        Raises InputError, naming what is required, for an unknown or missing name, another shape or another dtype;
        GemmifyError in a process forked from one that had run already.
        """
        check_fork()
        with self._lock:
            return self._place(inputs).outputs()

    def __call__(self, *arrays: Any) -> Any:
        """Run on the input arrays in order; returns the array of a model with one output, else the list."""
        results = self.run(arrays)
        return results[0] if len(results) == 1 else results

    def time(self, inputs: Inputs | None = None, repeat: int = 10, warmup: int = 3) -> list[float]:
        """Seconds of each of `repeat` runs after `warmup` untimed ones, without the copies in and out of numpy; on a
        GPU from the first launch until the last kernel is done."""
        check_fork()
        with self._lock:
            engine = self._place(random_inputs(self.inputs) if inputs is None else inputs)
            return _timed(engine, repeat, warmup)

    def profile(self, inputs: Inputs | None = None, repeat: int = 5) -> list[tuple[str, float]]:
        """(kernel name, seconds) of each kernel in the order of the calls: the median over `repeat` runs.

        The virtual machine's own bookkeeping calls are left out. Measured on a virtual machine of its own, because an
        instrument cannot be taken out of one again; it is kept for the next call. On a GPU each kernel is waited for,
        so that the sum is more than a run takes.
        """
        check_fork()
        with self._lock:
            arrays = self._checked(random_inputs(self.inputs) if inputs is None else inputs)
            if self._watched is None:
                engine = self._new_engine()
                self._watched = engine, engine.watch()
            engine, watch = self._watched
            engine.place(arrays)
            if not self.manifest.archs:
                use_threads(self._threads)
            watch.runs.clear()
            _timed(engine, repeat, 1, lambda: watch.runs.append([]))
        calls = [[c for c in run if not c[0].startswith(_NO_KERNELS)] for run in watch.runs]
        return [(same[0][0], float(np.median([s for _, s in same]))) for same in zip(*calls, strict=True)]

    def __repr__(self) -> str:
        told = [f"{', '.join(map(str, specs)) or 'none'}" for specs in (self.inputs, self.outputs)]
        layers = len(self.manifest.layers)
        return f"<gemmify.Model {self.manifest.model}: {told[0]} -> {told[1]}; {layers} layers, {self.device}>"

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """Refuse pickle and copy with a TypeError: machine code and a virtual machine do not travel that way."""
        raise TypeError("a Model cannot be pickled or copied: export it, and gemmify.load the file where it is needed")

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the network as one shared library, and its manifest as readable JSON beside it (`<path>.json`).

        Written beside its place and renamed: a failure leaves the old file or none. Raises InputError for a path that
        cannot be one, GemmifyError where writing or linking fails.
        """
        from .export import copy_library, export_executable

        if self._executable is not None:
            return export_executable(self._executable, self.manifest, path)
        assert self._path is not None
        return copy_library(self._path, self.manifest, path)


def _timed(engine: Engine, repeat: int, warmup: int, started: Callable[[], None] | None = None) -> list[float]:
    """Seconds of each of `repeat` runs of what was placed, after `warmup`; `started` is called before each of them."""
    if repeat < 1 or warmup < 0:
        raise InputError(f"repeat must be at least 1 and warmup at least 0, got {repeat} and {warmup}")
    seconds = []
    for i in range(warmup + repeat):
        if i >= warmup and started is not None:
            started()
        begin = time.perf_counter()
        engine.run()
        seconds.append(time.perf_counter() - begin)
    return seconds[warmup:]


def _fit(spec: TensorSpec, value: Any) -> np.ndarray:
    """`value` as a C-contiguous array of exactly `spec`."""
    array = np.asarray(value)
    if str(array.dtype) != spec.dtype:
        raise InputError(
            f"input {spec.name} must be {spec.dtype}, got {array.dtype}; convert it, e.g. x.astype({spec.dtype!r})"
        )
    if array.shape != spec.shape:
        hint = ""
        if math.prod(array.shape) == math.prod(spec.shape):
            hint = "; it has as many elements: reshape or transpose it"
        raise InputError(
            f"input {spec.name} must have shape {spec.shape}, got {array.shape}{hint or '; compile with other shapes'}"
        )
    return np.ascontiguousarray(array).reshape(spec.shape)


def load(path: str | os.PathLike[str], threads: int | None = None, cuda_graph: bool | None = None) -> Model:
    """Load an exported library (see `gemmify.load`)."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"the library must be given as the path of a file, got {path!r}")
    place = Path(path)
    manifest = read_manifest(place)
    if cuda_graph is not None:
        manifest = replace(manifest, cuda_graph=check_graph(cuda_graph, bool(manifest.archs)))
    arch = host.elf_arch(place)
    if arch != host.host_arch():
        raise IncompatibleError(f"{place} holds code for {arch}, this machine is {host.host_arch()}")
    check_host(manifest, str(place))
    tvm = runtime_for(manifest)
    check_versions(tvm, manifest, str(place))
    try:
        with without_scope_lines():
            model = Model(manifest, threads, module=map_library(tvm, place), path=place)
            model._ready()
            return model
    except GemmifyError:
        raise
    except Exception as err:
        said = str(err).strip().splitlines()
        raise InputError(f"cannot load {place}: {said[-1] if said else type(err).__name__}; export it again") from err


def compile_to_model(model: Any, *, threads: int | None = None, **options: Any) -> Model:
    """Compile (see `gemmify.compile`) and hold the result ready to run."""
    if threads is not None:
        check_threads(threads)
    import_tvm(compiler=True)
    from .pipeline import compile_model

    compilation = compile_model(model, threads=threads, **options)
    count = None if compilation.manifest.archs else compilation.manifest.threads
    return Model(compilation.manifest, count, executable=compilation.executable)
