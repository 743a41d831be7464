"""A whole network against other engines in the same run: `run_model`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gemmify
from gemmify import measure
from gemmify.bench import metaschedule
from gemmify.bench.header import header
from gemmify.bench.peers import ENGINES, OURS, check_peers
from gemmify.bench.rounds import agreement, measure_engines
from gemmify.cuda.device import require_gpu
from gemmify.errors import InputError
from gemmify.frontend import import_model
from gemmify.manifest import target_dict
from gemmify.pipeline import resolve_target
from gemmify.runtime import random_inputs
from gemmify.threads import check_threads, default_threads, require_one_thread
from schedules import Gpu, machine_of

DEFAULT_REPEAT = 40
TOLERANCE = 1e-3
"""Engines agree where no output differs by more than this share of the largest: a fast wrong one is no comparison."""
# Words in a kernel's name, in order of precedence -> what the kernel does, for kernels that belong to no layer.
_KIND_WORDS = (
    ("lrn", ("lrn", "local_response")),
    ("pooling", ("pool",)),
    ("softmax", ("softmax",)),
    ("concat", ("concat",)),
    ("conv", ("conv2d", "conv1d", "conv3d", "conv_")),
    ("fc", ("matmul", "dense")),
)


def run_model(
    model: Any,
    *,
    peers: Sequence[str] = (),
    threads: int | None = None,
    repeat: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    lowering: Any = "auto",
    max_error: float | None = None,
    target: Any = "llvm",
    tuning_minutes: float | None = None,
    logs: Any = None,
    frozen: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time `model` compiled by us, and by each of `peers` ("onnxruntime", "openvino", "metaschedule", which tunes for
    `tuning_minutes` first; "torch" for a `.pt2` file).

    Ours is exported and loaded by a fresh process that has TVM's runtime only; every engine has a process of its own,
    `threads` threads and the same seeded inputs, and they take turns (see `measure_engines`). The limits of the machine
    are measured first, the peak between the rounds too. `progress` is told a line a step. `dtype` converts the model as
    `compile` does. Returns a dict that is ready for JSON: per engine seconds (best, median, p90, all), GFLOP/s and
    share of the multiply-add peak of this run, `ratio` (its median over ours: above 1 we are faster), its outputs'
    difference from ours; per kernel, per layer and per kind the seconds of ours, and `conv_fc_share`, the share of the
    convolutions and fully connected layers in them. On a GPU there are no peers, the limits are those of its data
    sheet, and a time holds the copies of inputs and outputs; the suite `gpu` compares without them. Raises InputError
    for an unknown or missing peer, for a model that a peer cannot read, for peers of a model that is converted and for
    a GPU that is not here, GemmifyError where an engine fails.
    """
    check_peers(peers)
    if dtype is not None and peers:
        raise InputError(
            f"the peers run a model as it is, this one would be converted to {dtype}; leave one of them out"
        )
    minutes = metaschedule.check_minutes(tuning_minutes, peers)
    gpu = _gpu(target, peers)
    if gpu is not None:
        require_one_thread(threads)
        threads = 1
    threads = default_threads() if threads is None else check_threads(threads)
    source = _source(model, peers, shapes)
    result = header("model", threads, target)
    options = {"lowering": lowering, "max_error": max_error, "logs": logs, "frozen": frozen}
    bandwidth, peak = _limits(gpu, threads, target)
    peaks = [peak()]
    progress(f"peak {peaks[0]:.0f} GFLOP/s, memory read {bandwidth['read']:.1f} GB/s, {threads} threads")
    with tempfile.TemporaryDirectory(prefix="gemmify-bench-") as folder:
        begin = time.perf_counter()
        compiled = gemmify.compile(model, target=target, shapes=shapes, dtype=dtype, threads=threads, **options)
        inputs = random_inputs(compiled.inputs)
        files = {OURS: Path(compiled.export(Path(folder) / "ours.so"))}
        progress(f"{compiled.manifest.model} compiled in {time.perf_counter() - begin:.1f} s")
        if peers:
            path = _peer_file(source, inputs, Path(folder))
            files.update({peer: path for peer in peers})
        if metaschedule.PEER in peers:
            files[metaschedule.PEER], result["metaschedule"] = metaschedule.tuned_library(
                path,
                Path(folder),
                target=target_dict(resolve_target(target)),
                threads=threads,
                minutes=minutes,
                progress=progress,
            )
        found = measure_engines(
            files,
            inputs,
            threads,
            repeat=repeat or DEFAULT_REPEAT,
            profile=OURS,
            between=lambda: peaks.append(peak()),
            progress=progress,
        )
    layers, macs = compiled.layers, sum(int(layer["macs"]) for layer in compiled.layers)
    result.update(bandwidth=bandwidth, peak={"gflops": max(peaks), "samples": peaks}, tolerance=TOLERANCE)
    if gpu is not None:
        result["device"] = compiled.device
    result["model"] = {
        "name": compiled.manifest.model,
        "macs": macs,
        "layers": len(layers),
        "inputs": {spec.name: list(spec.shape) for spec in compiled.inputs},
        "memory": compiled.memory(),
        "tuning": compiled.manifest.tuning,
    }
    result["engines"] = compare_engines(found, macs, max(peaks))
    result["kernels"] = kernel_rows(found["kernels"], layers)
    result.update(breakdown(result["kernels"], layers, max(peaks)))
    return result


def _gpu(target: Any, peers: Sequence[str]) -> Gpu | None:
    """The GPU of `target`, which is here; None for a CPU. InputError where it is not here, or peers were named."""
    resolved = resolve_target(target)
    machine = machine_of(resolved)
    if not isinstance(machine, Gpu):
        return None
    if peers:
        raise InputError(f"the peers ({', '.join(peers)}) run on the CPU; for a GPU use --suite gpu, which has cuDNN")
    require_gpu(resolved)
    return machine


def _limits(gpu: Gpu | None, threads: int, target: Any) -> tuple[dict[str, float], Callable[[], float]]:
    """GB/s of memory by kind, and what gives the GFLOP/s of multiply-adds: measured now on a CPU, else the board's."""
    if gpu is not None:
        nominal = 2 * gpu.fma / 1e9
        return dict.fromkeys(("read", "triad"), gpu.bandwidth / 1e9), lambda: nominal
    bandwidth = {kind: measure.memory_bandwidth(threads, kind) for kind in ("read", "triad")}
    return bandwidth, lambda: measure.multiply_add_peak(threads, "float32", target)


def breakdown(rows: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]], peak: float) -> dict[str, Any]:
    """`{kinds, conv_fc_share, layers}` of the rows of `kernel_rows`, the layers in their order with their shares."""
    found = kinds(rows)
    total = sum(row["seconds"] for row in rows) or 1.0
    spent = layer_seconds(rows)
    table = []
    for layer in layers:
        seconds = spent.get(layer["name"], 0.0)
        gflops = 2 * layer["macs"] / seconds / 1e9 if seconds else 0.0
        row = {name: layer.get(name) for name in ("name", "op", "problem", "lowering", "gemm", "macs")}
        row.update(seconds=seconds, share=seconds / total, gflops=gflops, peak_share=gflops / peak)
        table.append(row)
    share = sum(entry["share"] for entry in found if entry["kind"] in ("conv", "fc"))
    return {"kinds": found, "conv_fc_share": share, "layers": table}


def compare_engines(found: Mapping[str, Any], macs: int, peak: float) -> dict[str, dict[str, Any]]:
    """The engines of `measure_engines` with their GFLOP/s, share of `peak`, and ratio and agreement with ours."""
    engines: dict[str, dict[str, Any]] = {}
    ours = found["engines"][OURS]
    for name, engine in found["engines"].items():
        gflops = 2 * macs / engine["median"] / 1e9
        row = {**engine, "gflops": gflops, "peak_share": gflops / peak, "ratio": engine["median"] / ours["median"]}
        row["ratio_best"] = engine["best"] / ours["best"]
        if name != OURS:
            row["difference"] = agreement(found["outputs"][OURS], found["outputs"][name], name)
            relative = row["difference"]["relative"]
            row["agrees"] = relative is not None and relative <= TOLERANCE
        engines[name] = row
    return engines


def _source(model: Any, peers: Sequence[str], shapes: Mapping[str, Sequence[int]] | None) -> Any:
    """What the peers read: an ONNX ModelProto, or the path of a `.pt2` file; None without peers."""
    if not peers:
        return None
    if isinstance(model, str | os.PathLike) and Path(model).suffix.lower() == ".pt2":
        source: Any = Path(model)
    else:
        source = import_model(model, shapes).source
    ending = ".pt2" if isinstance(source, Path) else ".onnx" if source is not None else ""
    for peer in peers:
        if ENGINES[peer][3] != ending:
            raise InputError(
                f"peer {peer!r} reads {ENGINES[peer][3]} files, and this model is not one: "
                "give an ONNX file or a zoo name for onnxruntime, openvino and metaschedule, a .pt2 file for torch"
            )
    return source


def _peer_file(source: Any, inputs: Mapping[str, np.ndarray], folder: Path) -> Path:
    """The file that the peers load, its input shapes fixed to those of `inputs`."""
    if isinstance(source, Path):
        return source
    import onnx

    fix_inputs(source, inputs)
    path = folder / "model.onnx"
    onnx.save_model(source, str(path), save_as_external_data=source.ByteSize() > 1 << 30, location="weights.bin")
    return path


def fix_inputs(model: Any, inputs: Mapping[str, np.ndarray]) -> None:
    """Give the graph's inputs the shapes of `inputs`, and drop initializers from the inputs.

    An initializer that is an input too could be overridden at each run: an engine may not fold it into its neighbours.
    """
    graph = model.graph
    weights = {i.name for i in graph.initializer}
    kept = [i for i in graph.input if i.name not in weights]
    missing = sorted({i.name for i in kept} ^ set(inputs))
    if missing:
        raise InputError(f"the peers' model and ours differ in their inputs: {', '.join(missing)}")
    for value in kept:
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        for size in inputs[value.name].shape:
            dims.add().dim_value = size
    del graph.input[:]
    graph.input.extend(kept)


def kernel_rows(kernels: Sequence[Sequence[Any]], layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`[{kernel, seconds, share, kind, layer, lowering}]` from (kernel, seconds) in the order of execution.

    Equal layers share a kernel, so a call belongs to the first layer that still waits for it. `layer` is None for a
    kernel of the rest of the network.
    """
    total = sum(float(seconds) for _, seconds in kernels) or 1.0
    waiting = [(layer, list(layer.get("kernels", ()))) for layer in layers]
    rows = []
    for name, seconds in kernels:
        found = next(((layer, left) for layer, left in waiting if left and left[0] == name), None)
        if found is not None:
            found[1].pop(0)
        layer = found[0] if found is not None else None
        rows.append(
            {
                "kernel": name,
                "seconds": float(seconds),
                "share": float(seconds) / total,
                "kind": _layer_kind(layer) if layer else kernel_kind(name),
                "layer": layer["name"] if layer else None,
                "lowering": layer["lowering"] if layer else None,
            }
        )
    return rows


def layer_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each layer by name, all its kernels together, from the rows of `kernel_rows`."""
    spent: dict[str, float] = {}
    for row in rows:
        if row["layer"] is not None:
            spent[row["layer"]] = spent.get(row["layer"], 0.0) + row["seconds"]
    return spent


def _layer_kind(layer: Mapping[str, Any]) -> str:
    return "fc" if layer["op"] == "dense" else "conv"


def kernel_kind(name: str) -> str:
    """What a kernel outside the layers does, by its name: lrn, pooling, softmax, concat, conv, fc, or other."""
    lower = name.lower()
    return next((kind for kind, words in _KIND_WORDS if any(word in lower for word in words)), "other")


def kinds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`[{kind, seconds, share, calls}]`, the largest first."""
    total = sum(row["seconds"] for row in rows) or 1.0
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault(row["kind"], {"kind": row["kind"], "seconds": 0.0, "calls": 0})
        entry["seconds"] += row["seconds"]
        entry["calls"] += 1
    for entry in found.values():
        entry["share"] = entry["seconds"] / total
    return sorted(found.values(), key=lambda entry: -entry["seconds"])
