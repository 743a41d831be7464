"""Single layers against this machine's limits: `run_suite`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tvm.target import Target

from gemmify import measure
from gemmify.bench.header import header
from gemmify.bench.shapes import select_shapes
from gemmify.bench.turns import measure_in_turn
from gemmify.errors import CheckError, InputError
from gemmify.layer import LayerKernel, compile_layer
from gemmify.policy import did_you_mean
from gemmify.select import Policy, choose
from gemmify.threads import default_threads
from lowering import LOWERINGS, ConvProblem, Lowering, Problem
from lowering.base import activation_shape, output_shape, weight_shape
from lowering.dense import as_dense
from lowering.epilogue import EpilogueOp
from schedules import Machine, TargetError, parse_target

EPILOGUE = (EpilogueOp("bias", 0), EpilogueOp("relu"))  # what follows a layer in the networks
PLAIN = "plain"
PLAIN_KEYS = ("dense", "pointwise", "depthwise", "implicit-gemm")
"""`plain` takes the first of these that applies: they do the definition's multiply-adds, so the peak is their limit."""
DEFAULT_REPEAT = 15
QUICK_REPEAT, QUICK_SHAPES = 5, 12

Report = Callable[[str], None]


def run_suite(
    suite: str,
    *,
    layer: str | None = None,
    lowerings: Sequence[str] | None = None,
    threads: int | None = None,
    target: Any = None,
    repeat: int | None = None,
    quick: bool = False,
    progress: Report = lambda line: None,
) -> dict[str, Any]:
    """Time every layer of `suite` ("layers" or "gemm") with bias and ReLU, and compare with the peak beside it.

    `layer` keeps the names that match it; `lowerings` are keys, each tried on each layer, taking turns: "auto" is what
    `compile` would take, "plain" (default) the GEMM form that does just the definition's multiply-adds. `quick` takes
    few shapes, spread over the suite, and fewer runs. Operands stay where the call before left them, as in a network's
    inner layers. `progress` is told a line a layer.

    The multiply-add peak is measured before and after each layer, and the larger of the two is the layer's limit,
    because clocks drift. Returns a dict that is ready for JSON: times in seconds, GFLOP/s by the definition's
    multiply-adds (Winograd may exceed the peak), `peak_share` their ratio; a row whose limit is the memory has a
    `bound`, `bytes` (input, weight and output once each) and `bandwidth_share`, and is not in `geomean`; a lowering
    that does not apply has a `reason` instead. Raises InputError for an unknown suite, layer, lowering or target.
    """
    if suite == "lowerings":
        raise InputError("the suite 'lowerings' compares all lowerings: call run_lowerings")
    keys = _checked(lowerings)
    threads = threads or default_threads()
    measure.set_threads(threads)
    try:
        resolved = parse_target("llvm" if target is None else target)
    except TargetError as error:
        raise InputError(str(error)) from error
    everything = select_shapes(suite, layer)
    shapes = spread(everything, QUICK_SHAPES) if quick else everything
    repeat = repeat or (QUICK_REPEAT if quick else DEFAULT_REPEAT)
    result = header("suite", threads, resolved)
    samples = [measure.multiply_add_peak(threads, "float32", resolved)]
    bandwidth = measure_bandwidth(threads)
    progress(f"peak {samples[0]:.0f} GFLOP/s, memory read {bandwidth['read']:.1f} GB/s, {threads} threads")
    rows: list[dict[str, Any]] = []
    for index, (name, problem) in enumerate(shapes.items(), 1):
        measured = _measure(name, problem, keys, resolved, repeat)
        samples.append(measure.multiply_add_peak(threads, "float32", resolved))
        for row in measured:
            _compare(row, problem, max(samples[-2:]))
        rows += measured
        said = dict.fromkeys(_said(row) for row in measured)
        progress(f"{index}/{len(shapes)} {name}: {', '.join(said)}")
    _find_bounds(suite, rows, shapes, max(samples), bandwidth["read"])
    result.update(suite=suite, shapes=len(shapes), of=len(everything), bandwidth=bandwidth, rows=rows)
    result["peak"] = {"gflops": max(samples), "samples": samples}
    result.update(_means(rows, keys))
    return result


def _checked(lowerings: Sequence[str] | None) -> list[str]:
    keys = list(dict.fromkeys(lowerings or (PLAIN,)))
    for key in keys:
        if key not in ("auto", PLAIN) and key not in LOWERINGS:
            hint = did_you_mean(key, LOWERINGS)
            raise InputError(f"unknown lowering {key!r}; {hint}choose from auto, {PLAIN}, {', '.join(LOWERINGS)}")
    return keys


def spread(shapes: Mapping[str, Problem], limit: int) -> dict[str, Problem]:
    """At most `limit` of the shapes, at even distances in their order."""
    names = list(shapes)
    count = min(limit, len(names))
    return {name: shapes[name] for name in (names[i * len(names) // count] for i in range(count))}


def measure_bandwidth(threads: int) -> dict[str, float]:
    """`{"read", "triad"}` in GB/s."""
    return {kind: measure.memory_bandwidth(threads, kind) for kind in ("read", "triad")}


def resolve_key(key: str, name: str, problem: Problem, target: Target) -> Lowering:
    """The lowering that `key` stands for on `problem`; "plain" and "auto" always find one that applies."""
    if key == "auto":
        return choose(name, problem, Machine.from_target(target), Policy()).lowering
    if key == PLAIN:
        return next(LOWERINGS[k] for k in PLAIN_KEYS if LOWERINGS[k].applicable(problem) is None)
    return LOWERINGS[key]


def _measure(name: str, problem: Problem, keys: Sequence[str], target: Target, repeat: int) -> list[dict[str, Any]]:
    """The rows of one layer, one a key, without the shares; keys that come to the same lowering share its times."""
    rows: list[dict[str, Any]] = []
    kernels: dict[str, LayerKernel] = {}
    for key in keys:
        lowering = resolve_key(key, name, problem, target)
        row: dict[str, Any] = {"name": name, "asked": key, "problem": asdict(problem), "macs": problem.macs}
        row["op"] = problem.op
        row["lowering"] = lowering.key
        rows.append(row)
        if (reason := lowering.applicable(problem)) is not None:
            row["reason"] = str(reason)
            continue
        if lowering.key not in kernels:
            kernels[lowering.key] = compile_layer(problem, lowering.key, target, epilogue=EPILOGUE)
            _bind(kernels[lowering.key], problem)
        kernel = kernels[lowering.key]
        gemm = kernel.kernels.cost.gemms[0]
        row.update(gemm=[gemm.m, gemm.n, gemm.k], count=gemm.count, workspace_bytes=kernel.workspace_bytes)
    times = measure_in_turn(kernels, repeat)
    for key, kernel in kernels.items():
        if not np.isfinite(kernel.output()).all():
            raise CheckError(f"layer {name} in lowering {key} leaves parts of its output unwritten")
    return [{**row, **times.get(row["lowering"], {})} for row in rows]


def _bind(kernel: LayerKernel, problem: Problem) -> None:
    """Seeded data; the weights are transformed here, before anything is timed."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.random(shape, dtype=np.float32) - np.float32(0.5)).astype(problem.dtype)

    data = draw(activation_shape(problem, kernel.kernels.lowering.layout))
    kernel.bind(data, draw(weight_shape(problem)), [draw((problem.m,))])


def _compare(row: dict[str, Any], problem: Problem, peak: float) -> None:
    if "best" not in row:
        return
    row["gflops"] = 2 * problem.macs / row["best"] / 1e9
    row["gflops_median"] = 2 * problem.macs / row["median"] / 1e9
    row["peak"] = peak
    row["peak_share"] = row["gflops"] / peak
    row["peak_share_median"] = row["gflops_median"] / peak


def _said(row: Mapping[str, Any]) -> str:
    if "best" not in row:
        return f"{row['lowering']} does not apply"
    return f"{row['lowering']} {row['best'] * 1e6:.1f} us, {row['gflops']:.0f} GFLOP/s, {100 * row['peak_share']:.0f} %"


def compulsory_bytes(problem: Problem) -> int:
    """Bytes of the input, the weight and the output, each moved once: A, B and C of a GEMM."""
    shapes = (activation_shape(problem), weight_shape(problem), output_shape(problem))
    return problem.element * sum(math.prod(shape) for shape in shapes)


def memory_bound(suite: str, problem: Problem, balance: float) -> str | None:
    """Why the memory and not the multiply-adds limits a layer, where `balance` is the machine's flops a byte."""
    if isinstance(problem, ConvProblem) and problem.depthwise:
        return "depthwise"
    dense = as_dense(problem)
    if dense is not None and min(dense.n, dense.m) == 1:
        return "matrix-vector"
    intensity = 2 * problem.macs / compulsory_bytes(problem)
    if suite == "gemm" and intensity < balance:
        return f"{intensity:.1f} flop/byte, below {balance:.1f}"
    return None


def _find_bounds(
    suite: str, rows: Sequence[dict[str, Any]], shapes: Mapping[str, Problem], peak: float, bandwidth: float
) -> None:
    """Give each measured row its bytes and intensity, and those bound by memory their bound and bandwidth share."""
    for row in rows:
        if "best" not in row:
            continue
        problem = shapes[row["name"]]
        moved = compulsory_bytes(problem)
        row.update(bytes=moved, intensity=2 * problem.macs / moved)
        if (bound := memory_bound(suite, problem, peak / bandwidth)) is not None:
            rate = moved / row["best"] / 1e9
            row.update(bound=bound, gbytes=rate, bandwidth_share=rate / bandwidth)


def _means(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Geometric means by key: of the shares of the peak (best, median), and of the bandwidth for the other rows."""

    def mean(key: str, name: str, memory: bool) -> float | None:
        mine = [r for r in rows if r["asked"] == key and "best" in r and ("bound" in r) == memory]
        return measure.geomean([row[name] for row in mine])

    return {
        "geomean": {key: mean(key, "peak_share", False) for key in keys},
        "geomean_median": {key: mean(key, "peak_share_median", False) for key in keys},
        "geomean_bandwidth": {key: mean(key, "bandwidth_share", True) for key in keys},
    }
