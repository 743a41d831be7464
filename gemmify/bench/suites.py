"""Single layers against this machine's limits: `run_suite`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from gemmify import measure
from gemmify.bench.header import header
from gemmify.bench.shapes import select_shapes
from gemmify.errors import CheckError, InputError
from gemmify.layer import LayerKernel, compile_layer
from gemmify.select import Policy, choose
from gemmify.threads import default_threads
from lowering import LOWERINGS, ConvProblem, Problem
from lowering.base import activation_shape, weight_shape
from lowering.epilogue import EpilogueOp
from schedules import Machine, TargetError, parse_target

EPILOGUE = (EpilogueOp("bias", 0), EpilogueOp("relu"))  # what follows a layer in the networks
DEFAULT_REPEAT = 15
MIN_SECONDS = 0.03  # a layer of microseconds is run more often than asked, until its best time is steady
MAX_SECONDS = 3.0  # and one of seconds (the definition itself) less often


def run_suite(
    suite: str,
    *,
    layer: str | None = None,
    lowerings: Sequence[str] | None = None,
    threads: int | None = None,
    target: Any = None,
    repeat: int | None = None,
) -> dict[str, Any]:
    """Time every layer of `suite` ("layers" or "gemm") with bias and ReLU, and compare with the peak beside it.

    `layer` keeps the names that match it; `lowerings` are keys ("auto" is what `compile` would take; default), each
    tried on each layer. The multiply-add peak is measured before and after each layer, and the larger of the two is
    the layer's limit, because clocks drift. Operands stay where the call before left them, as in a network's inner
    layers. Returns a dict that is ready for JSON: times in seconds, GFLOP/s by the definition's multiply-adds
    (Winograd may exceed the peak), `peak_share` their ratio; a lowering that does not apply has a `reason` instead.
    Raises InputError for an unknown suite, layer, lowering or target.
    """
    keys = _checked(lowerings)
    threads = threads or default_threads()
    measure.set_threads(threads)
    try:
        resolved = parse_target("llvm" if target is None else target)
    except TargetError as error:
        raise InputError(str(error)) from error
    shapes = select_shapes(suite, layer)
    machine = Machine.from_target(resolved)
    result = header("suite", threads, resolved)
    result["bandwidth"] = measure_bandwidth(threads)
    peak = _peaks(threads, resolved)
    samples = [peak()]
    rows = []
    for name, problem in shapes.items():
        for key in keys:
            row = _measure(name, problem, key, machine, resolved, repeat or DEFAULT_REPEAT)
            if "best" in row:
                samples.append(peak())
                _compare(row, problem, max(samples[-2:]))
            rows.append(row)
    result.update(suite=suite, peak={"gflops": max(samples), "samples": samples}, rows=rows)
    shares = {key: [row["peak_share"] for row in rows if row["asked"] == key and "best" in row] for key in keys}
    result["geomean"] = {key: measure.geomean(values) for key, values in shares.items()}
    return result


def _checked(lowerings: Sequence[str] | None) -> list[str]:
    keys = list(lowerings or ("auto",))
    for key in keys:
        if key != "auto" and key not in LOWERINGS:
            raise InputError(f"unknown lowering {key!r}; choose from auto, {', '.join(LOWERINGS)}")
    return keys


def measure_bandwidth(threads: int) -> dict[str, float]:
    """`{"read", "triad"}` in GB/s."""
    return {kind: measure.memory_bandwidth(threads, kind) for kind in ("read", "triad")}


def _peaks(threads: int, target: Any) -> Callable[[], float]:
    return lambda: measure.multiply_add_peak(threads, "float32", target)


def _measure(name: str, problem: Problem, key: str, machine: Machine, target: Any, repeat: int) -> dict[str, Any]:
    """One row of the table, without the shares."""
    row: dict[str, Any] = {"name": name, "asked": key, "problem": asdict(problem), "macs": problem.macs}
    row["op"] = f"conv{problem.dims}d" if isinstance(problem, ConvProblem) else "dense"
    lowering = choose(name, problem, machine, Policy()).lowering if key == "auto" else LOWERINGS[key]
    row["lowering"] = lowering.key
    if (reason := lowering.applicable(problem)) is not None:
        return {**row, "reason": str(reason)}
    kernel = compile_layer(problem, lowering.key, target, epilogue=EPILOGUE)
    gemm = kernel.kernels.cost.gemms[0] if kernel.kernels.cost.gemms else None
    row["gemm"] = [gemm.m, gemm.n, gemm.k] if gemm else None
    row["workspace_bytes"] = kernel.workspace_bytes
    times = _times(kernel, problem, repeat)
    if not np.isfinite(kernel.output()).all():
        raise CheckError(f"layer {name} in lowering {lowering.key} leaves parts of its output unwritten")
    return {**row, **measure.summarize(times)}


def _times(kernel: LayerKernel, problem: Problem, repeat: int) -> list[float]:
    """Seconds of the activation stages on seeded data; weights are transformed before."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.random(shape, dtype=np.float32) - np.float32(0.5)).astype(problem.dtype)

    data = draw(activation_shape(problem, kernel.kernels.lowering.layout))
    kernel.bind(data, draw(weight_shape(problem)), [draw((problem.m,))])
    once = max(min(kernel.time(repeat=1, warmup=0)), 1e-7)
    runs = max(repeat, min(2000, math.ceil(MIN_SECONDS / once)))
    return kernel.time(repeat=max(1, min(runs, math.ceil(MAX_SECONDS / once))), warmup=1)


def _compare(row: dict[str, Any], problem: Problem, peak: float) -> None:
    row["gflops"] = 2 * problem.macs / row["best"] / 1e9
    row["gflops_median"] = 2 * problem.macs / row["median"] / 1e9
    row["peak"] = peak
    row["peak_share"] = row["gflops"] / peak
