"""The engines that a network is measured with, each behind the same three calls; runs inside a worker process.

An engine is loaded with a model, then asked for outputs or for times. All get numpy arrays and give numpy arrays, all
run float32, all use the same number of threads and one request at a time. Imports nothing of the compiler: `gemmify`
itself is measured as it is deployed, an exported library on TVM's runtime.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from gemmify.errors import InputError

OURS = "gemmify"
Arrays = Mapping[str, np.ndarray]


class Engine(Protocol):
    """A loaded model: `version`, the names and shapes of its inputs, and `run` (inputs by name -> outputs in order)."""

    version: str

    def run(self, inputs: Arrays) -> Sequence[np.ndarray]: ...


class Gemmify:
    """An exported library of ours, with TVM's runtime only."""

    def __init__(self, path: str, threads: int) -> None:
        import gemmify

        self.version = gemmify.__version__
        self._model = gemmify.load(path, threads=threads)

    def run(self, inputs: Arrays) -> Sequence[np.ndarray]:
        return self._model.run(dict(inputs))

    def profile(self, inputs: Arrays, repeat: int) -> list[tuple[str, float]]:
        """(kernel, seconds of one run) in the order of execution."""
        return [(str(name), float(seconds)) for name, seconds in self._model.profile(dict(inputs), repeat=repeat)]


class OnnxRuntime:
    """ONNX Runtime on its CPU provider: all graph optimisations, one operator at a time, its threads may spin."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime as ort

        self.version = str(ort.__version__)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Arrays) -> Sequence[np.ndarray]:
        return list(self._session.run(None, dict(inputs)))


class OpenVino:
    """OpenVINO on the CPU for latency, held to float32 (its default on newer CPUs is bfloat16: half the time)."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino as ov

        self.version = str(ov.__version__).split("-")[0]
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        self._compiled = ov.Core().compile_model(path, "CPU", settings)
        self._request = self._compiled.create_infer_request()

    def run(self, inputs: Arrays) -> Sequence[np.ndarray]:
        results = self._request.infer(dict(inputs))
        return [np.array(results[port]) for port in self._compiled.outputs]


class Torch:
    """PyTorch running a program saved by `torch.export` (a `.pt2` file), without gradients."""

    def __init__(self, path: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.version = str(torch.__version__)
        self._torch = torch
        self._module = torch.export.load(path).module()

    def run(self, inputs: Arrays) -> Sequence[np.ndarray]:
        with self._torch.inference_mode():
            found = self._module(*(self._torch.from_numpy(np.ascontiguousarray(a)) for a in inputs.values()))
        return [t.numpy() for t in (found if isinstance(found, tuple | list) else (found,))]


class MetaSchedule:
    """A network that stock MetaSchedule tuned (`bench.metaschedule`), on TVM's runtime only, as ours is."""

    def __init__(self, path: str, threads: int) -> None:
        from gemmify.threads import import_tvm, use_threads

        tvm = import_tvm()
        self._threads, self._use_threads, self._tensor = threads, use_threads, tvm.runtime.tensor
        use_threads(threads)
        self.version = f"(TVM {tvm.__version__})"
        self._vm = tvm.runtime.vm.VirtualMachine(tvm.runtime.load_module(path), tvm.cpu())
        # The weights in the layout that the tuned kernels read: made once, as ours are made when compiling.
        self._weights = list(self._vm["main_transform_params"]([]))

    def run(self, inputs: Arrays) -> Sequence[np.ndarray]:
        self._use_threads(self._threads)
        found = self._vm["main"](*(self._tensor(array) for array in inputs.values()), *self._weights)
        return [t.numpy() for t in ([found] if hasattr(found, "numpy") else found)]


# name -> (class, module that must be importable, the extra of ours that brings it, file name ending that it reads)
ENGINES: dict[str, tuple[type, str, str, str]] = {
    OURS: (Gemmify, "tvm", "", ".so"),
    "onnxruntime": (OnnxRuntime, "onnxruntime", "peers", ".onnx"),
    "openvino": (OpenVino, "openvino", "peers", ".onnx"),
    "torch": (Torch, "torch", "torch", ".pt2"),
    "metaschedule": (MetaSchedule, "xgboost", "tune", ".onnx"),
}
PEERS = tuple(name for name in ENGINES if name != OURS)


def check_peers(names: Sequence[str]) -> None:
    """Raise InputError for a peer that is unknown, named twice, or not installed (the message names the extra)."""
    for name in names:
        if name not in PEERS:
            raise InputError(f"unknown peer {name!r}; choose from {', '.join(PEERS)}")
        if list(names).count(name) > 1:
            raise InputError(f"peer {name!r} is named twice; name each engine once")
        _, module, extra, _ = ENGINES[name]
        if importlib.util.find_spec(module) is None:
            raise InputError(f"peer {name!r} is not installed; try: pip install 'gemmify[{extra}]'")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a benchmark's numbers depend on, for those that are installed."""
    found = {}
    for package in ("gemmify", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime", "openvino", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
