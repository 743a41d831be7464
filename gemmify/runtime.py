"""Running a compiled network: loading, judging whether this machine can run it, and the `Model` that users hold."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import host
from .errors import GemmifyError, GemmifyWarning, IncompatibleError, InputError
from .manifest import Manifest, TensorSpec, read_manifest
from .threads import check_fork, check_threads, default_threads, import_tvm, use_threads, without_scope_lines

Inputs = Mapping[str, Any] | Sequence[Any] | np.ndarray


def check_host(manifest: Manifest, source: str = "this network") -> None:
    """IncompatibleError where this machine or this TVM cannot run what `manifest` describes; runs none of its code."""
    kind = manifest.target.get("kind", "llvm")
    if kind not in ("llvm", "c"):
        raise IncompatibleError(f"{source} is made for target {kind}, this version runs CPU code only")
    arch = host.arch_of(manifest.triple)
    if arch != host.host_arch():
        raise IncompatibleError(
            f"{source} holds code for {arch}, this machine is {host.host_arch()}; compile it with --target for this one"
        )
    flags = host.cpu_flags()
    if flags is None:
        if manifest.cpu_features:
            warnings.warn(f"cannot tell whether this CPU has what {source} needs", GemmifyWarning, stacklevel=2)
        return
    missing = [f for f in manifest.cpu_features if f not in flags]
    if missing:
        raise IncompatibleError(
            f"{source} needs CPU features that this machine lacks: {', '.join(missing)}; compile it on this machine, "
            'or for an older CPU, e.g. --target "llvm -mcpu=x86-64-v3"'
        )


def _check_versions(tvm: Any, manifest: Manifest, source: str) -> None:
    """Two TVM releases do not share the format of the bytecode, nor the calling convention: major.minor must agree."""
    import tvm_ffi

    found = {"apache-tvm": (manifest.tvm, tvm.__version__), "apache-tvm-ffi": (manifest.tvm_ffi, tvm_ffi.__version__)}
    for package, (made, here) in found.items():
        if str(made).split(".")[:2] != str(here).split(".")[:2]:
            raise IncompatibleError(
                f"{source} was made with {package} {made}, here is {here}; install {package}=={made} or compile again"
            )


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


def _flatten(value: Any) -> list[Any]:
    """The tensors of a virtual machine's result, whether one tensor or nested tuples."""
    return [value] if hasattr(value, "numpy") else [t for item in value for t in _flatten(item)]


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
        self._tvm = import_tvm()
        self._module, self._executable, self._path = module, executable, path
        self.manifest = manifest
        self._lock = threading.RLock()
        self._threads = default_threads()
        self._vm: Any = None
        self._instrumented: _Instrumented | None = None
        self._buffers: list[Any] = []
        if threads is not None:
            self.set_threads(threads)

    def _new_vm(self) -> Any:
        """A virtual machine over the code. Made at the first run, so that a network compiled for another CPU can still
        be exported; IncompatibleError where this machine cannot run it."""
        if self._module is None:
            check_host(self.manifest)
            self._module = self._executable.jit()
        return self._tvm.runtime.vm.VirtualMachine(self._module, self._tvm.cpu())

    def _machine(self) -> Any:
        """The virtual machine of ordinary runs, with the input buffers. Call with the lock held."""
        if self._vm is None:
            self._vm = self._new_vm()
            self._buffers = [self._tvm.runtime.empty(s.shape, s.dtype, self._tvm.cpu()) for s in self.inputs]
        return self._vm

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
        arena plus, for each thread, its scratch inside the kernels.
        """
        return dict(self.manifest.memory)

    @property
    def threads(self) -> int:
        """CPU threads that a run uses."""
        return self._threads

    def set_threads(self, threads: int) -> None:
        """Run on `threads` CPU threads from now on.

        Raises InputError for a number below 1 or above the CPUs that the process may use, and for one above the size
        of TVM's pool where that was fixed already: by other code that ran TVM first in this Python thread.
        """
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

    def _place(self, inputs: Inputs) -> list[Any]:
        """Copy the inputs into the model's own aligned buffers. Call with the lock held."""
        arrays = self._checked(inputs)
        self._machine()
        for buffer, array in zip(self._buffers, arrays, strict=True):
            buffer.copyfrom(array)
        use_threads(self._threads)
        return self._buffers

    def run(self, inputs: Inputs) -> list[np.ndarray]:
        """Run once on `{name: array}` (or the arrays in order); returns the outputs in the model's order, as copies.

        Raises InputError, naming what is required, for an unknown or missing name, another shape or another dtype;
        GemmifyError in a process forked from one that had run already.
        """
        check_fork()
        with self._lock:
            placed = self._place(inputs)
            result = self._vm["main"](*placed)
            return [np.array(t.numpy(), copy=True) for t in _flatten(result)]

    def __call__(self, *arrays: Any) -> Any:
        """Run on the input arrays in order; returns the array of a model with one output, else the list."""
        results = self.run(arrays)
        return results[0] if len(results) == 1 else results

    def time(self, inputs: Inputs | None = None, repeat: int = 10, warmup: int = 3) -> list[float]:
        """Seconds of each of `repeat` runs after `warmup` untimed ones, without the copies in and out of numpy."""
        return self._timed(inputs, repeat, warmup, self._machine, lambda: None)

    def _timed(
        self, inputs: Inputs | None, repeat: int, warmup: int, vm: Callable[[], Any], started: Callable[[], None]
    ) -> list[float]:
        if repeat < 1 or warmup < 0:
            raise InputError(f"repeat must be at least 1 and warmup at least 0, got {repeat} and {warmup}")
        check_fork()
        with self._lock:
            placed = self._place(random_inputs(self.inputs) if inputs is None else inputs)
            main, seconds = vm()["main"], []
            for i in range(warmup + repeat):
                if i >= warmup:
                    started()
                begin = time.perf_counter()
                main(*placed)
                seconds.append(time.perf_counter() - begin)
            return seconds[warmup:]

    def profile(self, inputs: Inputs | None = None, repeat: int = 5) -> list[tuple[str, float]]:
        """(kernel name, seconds) of each kernel in the order of the calls: the median over `repeat` runs.

        The virtual machine's own bookkeeping calls are left out. Measured on a virtual machine of its own, because an
        instrument cannot be taken out of one again; it is kept for the next call.
        """
        if self._instrumented is None:
            self._instrumented = _Instrumented(self._new_vm())
        watched = self._instrumented
        watched.runs.clear()
        self._timed(inputs, repeat, 1, lambda: watched.vm, lambda: watched.runs.append([]))
        calls = [[c for c in run if not c[0].startswith("vm.builtin.")] for run in watched.runs]
        return [(same[0][0], float(np.median([s for _, s in same]))) for same in zip(*calls, strict=True)]

    def __repr__(self) -> str:
        told = [f"{', '.join(map(str, specs)) or 'none'}" for specs in (self.inputs, self.outputs)]
        layers, threads = len(self.manifest.layers), self._threads
        return f"<gemmify.Model {self.manifest.model}: {told[0]} -> {told[1]}; {layers} layers, {threads} threads>"

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


class _Instrumented:
    """A virtual machine that notes (kernel, seconds) of each call in the last of `runs`, where there is one."""

    def __init__(self, vm: Any) -> None:
        self.vm, self.runs = vm, list[list[tuple[str, float]]]()
        self._begun: list[float] = []
        vm.set_instrument(self._note)

    def _note(self, _func: Any, name: str, before: bool, _result: Any, *_args: Any) -> int:
        now = time.perf_counter()
        if before:
            self._begun.append(time.perf_counter())
        elif self._begun:
            seconds = now - self._begun.pop()
            if self.runs:
                self.runs[-1].append((str(name), seconds))
        return 0


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


def load(path: str | os.PathLike[str], threads: int | None = None) -> Model:
    """Load an exported library (see `gemmify.load`)."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"the library must be given as the path of a file, got {path!r}")
    place = Path(path)
    manifest = read_manifest(place)
    arch = host.elf_arch(place)
    if arch != host.host_arch():
        raise IncompatibleError(f"{place} holds code for {arch}, this machine is {host.host_arch()}")
    check_host(manifest, str(place))
    tvm = import_tvm()
    _check_versions(tvm, manifest, str(place))
    try:
        with without_scope_lines():
            # Not tvm.runtime.load_module: it goes by the file's extension, and a library may have been renamed.
            module = tvm.get_global_func("ffi.Module.load_from_file.so")(str(place.resolve()), "so")
            model = Model(manifest, threads, module=module, path=place)
            model._machine()
            return model
    except GemmifyError:
        raise
    except Exception as err:
        said = str(err).strip().splitlines()
        raise InputError(f"cannot load {place}: {said[-1] if said else type(err).__name__}; export it again") from err


def compile_to_model(model: Any, *, threads: int | None = None, **options: Any) -> Model:
    """Compile (see `gemmify.compile`) and hold the result ready to run."""
    count = default_threads() if threads is None else check_threads(threads)
    import_tvm(compiler=True)
    from .pipeline import compile_model

    compilation = compile_model(model, threads=count, **options)
    return Model(compilation.manifest, count, executable=compilation.executable)
