"""Every lowering of the catalogue on the named layers, with its true cost: `run_lowerings`."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import tvm
from tvm.target import Target

from gemmify import measure
from gemmify.accuracy import expected_error
from gemmify.bench.exact import Exact
from gemmify.bench.header import header
from gemmify.bench.lowerings_summary import summarize_lowerings
from gemmify.bench.shapes import representatives, select_shapes
from gemmify.bench.suites import EPILOGUE, spread
from gemmify.bench.turns import measure_in_turn
from gemmify.errors import InputError
from gemmify.layer import LayerKernel, compile_layer
from gemmify.pipeline_build import kernel_workspace_bytes
from gemmify.policy import did_you_mean
from gemmify.select import Policy, choose
from gemmify.threads import check_threads, default_threads
from lowering import Problem, catalogue
from schedules import Machine, TargetError, parse_target

SUITE = "lowerings"
REPEAT, QUICK_REPEAT = 15, 5
QUICK_SHAPES = 4
TURN_SECONDS, QUICK_TURN_SECONDS = 1.0, 0.2
"""What one lowering of one layer is timed for, where `repeat` measurements take longer than that."""
ERROR_SLACK = 4.0
"""A result is wrong where its error exceeds this many times what is expected of its lowering (`accuracy.py`); one
misplaced element is a thousand times that."""

Report = Callable[[str], None]
Row = dict[str, Any]


def run_lowerings(
    *,
    layer: str | None = None,
    lowerings: Sequence[str] | None = None,
    threads: int | None = None,
    target: Any = None,
    repeat: int | None = None,
    quick: bool = False,
    seed: int | None = None,
    progress: Report = lambda line: None,
) -> dict[str, Any]:
    """Time, check and weigh each applicable lowering on the layers of AlexNet, VGG-16, GoogLeNet and ResNet-50, with
    bias and ReLU, on one thread and on `threads` (default: all), each scheduled for that many cores.

    Without `layer` one layer stands for those of its network with the same kernel, stride and output size; `layer` is
    a name or a pattern, "*" takes all. `lowerings` are keys (default: the whole catalogue). `quick` takes a few layers
    and fewer runs. The lowerings of a layer are timed in turn (`turns.py`). `progress` is told a line a layer.

    Each result is compared with float64 on inputs drawn from `seed` (default: a new one each run): every output, before
    and after the timing. Workspace is what is allocated, tensors and scratch inside the kernels, and must equal the
    lowering's formula. Returns a dict that is ready for JSON: `asked` (the keys, where some were given), `rows` (one a
    layer, lowering and number of threads; all `times`, GFLOP/s by the definition's multiply-adds and its share of the
    peak measured beside it), `layers` (which lowerings do not apply and why, which one `auto` takes), `failures`, and
    the summary of `summarize_lowerings`.
    A lowering that fails stands in `failures` with what went wrong; the others go on. Raises InputError for an unknown
    layer, lowering, target or number of threads, and where no lowering that was asked for applies to any layer.
    """
    keys = check_keys(lowerings)
    most = default_threads() if threads is None else check_threads(threads)
    try:
        resolved = parse_target("llvm" if target is None else target)
    except TargetError as error:
        raise InputError(str(error)) from error
    if resolved.kind.name != "llvm":
        raise InputError(f"the suite {SUITE} is for a CPU (llvm), got {resolved.kind.name}; for a GPU use --suite gpu")
    everything = select_shapes(SUITE, layer)
    shapes = choose_shapes(everything, layer, quick)
    check_some_apply(keys, shapes)
    counts = sorted({1, most})
    limits = [_limit(count, with_cores(resolved, count)) for count in counts]
    progress(
        "peak " + ", ".join(f"{limit['gflops']:.0f} GFLOP/s on {count_text(limit['threads'])}" for limit in limits)
    )
    bench = _Bench(keys, counts, resolved, repeat, quick, secrets.randbits(32) if seed is None else seed, limits)
    for index, (name, problem) in enumerate(shapes.items(), 1):
        bench.layer(name, problem)
        progress(f"{index}/{len(shapes)} {name}: {said(bench.rows, bench.failures, name)}")
    result = header(SUITE, most, resolved)
    result.update(
        suite=SUITE,
        asked=keys if lowerings else [],
        quick=quick,
        shapes=len(shapes),
        of=len(select_shapes(SUITE)),
        seed=bench.seed,
    )
    result.update(threads=counts, limits=limits, layers=bench.layers, rows=bench.rows, failures=bench.failures)
    return {**result, **summarize_lowerings(bench.rows, bench.layers, counts)}


def check_keys(lowerings: Sequence[str] | None) -> list[str]:
    """The keys to be tried, in the catalogue's order. Raises InputError for one that is not in it."""
    known = list(catalogue())
    for key in lowerings or ():
        if key not in known:
            raise InputError(f"unknown lowering {key!r}; {did_you_mean(key, known)}choose from {', '.join(known)}")
    return [key for key in known if not lowerings or key in lowerings]


def check_some_apply(keys: Sequence[str], shapes: Mapping[str, Problem]) -> None:
    """InputError, with the reasons, where none of `keys` applies to any of the layers."""
    reasons: dict[str, str] = {}
    for name, problem in shapes.items():
        for key in keys:
            if (reason := catalogue()[key].applicable(problem)) is None:
                return
            reasons.setdefault(key, f"{key} {reason} ({name})")
    asked = "the layer" if len(shapes) == 1 else f"any of the {len(shapes)} layers"
    raise InputError(f"no lowering that was asked for applies to {asked}: {'; '.join(reasons.values())}")


def choose_shapes(shapes: Mapping[str, Problem], layer: str | None, quick: bool) -> dict[str, Problem]:
    """The layers to be measured: all that were named, else representatives; a few of them for `quick`."""
    chosen = dict(shapes) if layer is not None else representatives(shapes)
    return spread(chosen, QUICK_SHAPES) if quick else chosen


def count_text(threads: int) -> str:
    """A number of threads in words."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def with_cores(target: Target, cores: int) -> Target:
    """The same machine, of which `cores` cores are to be used."""
    return Target({**target.export(), "num-cores": cores})


def _limit(threads: int, target: Target) -> dict[str, Any]:
    peak = measure.multiply_add_peak(threads, "float32", target)
    return {"threads": threads, "gflops": peak, "samples": [peak]}


def said(rows: Sequence[Row], failures: Sequence[Row], name: str) -> str:
    """The line of progress of a layer that is done."""
    mine = [row for row in rows if row["name"] == name and "best" in row]
    parts = []
    for threads in sorted({row["threads"] for row in mine}):
        best = min((row for row in mine if row["threads"] == threads), key=lambda row: float(row["best"]))
        share = f"{best['lowering']} {best['best'] * 1e3:.3f} ms ({100 * best['peak_share']:.0f} %)"
        parts.append(f"fastest on {threads}: {share}")
    failed = list(dict.fromkeys(row["lowering"] for row in failures if row["name"] == name))
    tried = len({row["lowering"] for row in mine})
    return "; ".join(
        [f"{tried} lowering{'s' * (tried != 1)}", *parts, *([f"FAILED: {', '.join(failed)}"] if failed else [])]
    )


class _Bench:
    """A run: what is asked, and what was found so far."""

    def __init__(
        self,
        keys: Sequence[str],
        counts: Sequence[int],
        target: Target,
        repeat: int | None,
        quick: bool,
        seed: int,
        limits: Sequence[dict[str, Any]],
    ) -> None:
        self.keys, self.seed = keys, seed
        self.repeat = repeat or (QUICK_REPEAT if quick else REPEAT)
        self.seconds = QUICK_TURN_SECONDS if quick else TURN_SECONDS
        self.targets = {count: with_cores(target, count) for count in counts}
        self.limits = {limit["threads"]: limit for limit in limits}
        self.rng = np.random.default_rng(seed)
        self.layers: list[Row] = []
        self.rows: list[Row] = []
        self.failures: list[Row] = []

    def layer(self, name: str, problem: Problem) -> None:
        """Measure one layer, and add its rows."""
        reasons = {key: catalogue()[key].applicable(problem) for key in self.keys}
        usable = [key for key in self.keys if reasons[key] is None]
        auto = {
            str(threads): choose(name, problem, Machine.from_target(target), Policy()).lowering.key
            for threads, target in self.targets.items()
        }
        exact = Exact.draw(problem, self.rng)
        entry: Row = {"name": name, "op": problem.op}
        entry.update(problem=asdict(problem), macs=problem.macs, largest=exact.largest, auto=auto)
        entry["inapplicable"] = {key: str(reason) for key, reason in reasons.items() if reason is not None}
        self.layers.append(entry)
        for threads, target in self.targets.items():
            self.rows += self._measure(name, problem, usable, threads, target, exact)

    def _measure(
        self, name: str, problem: Problem, keys: Sequence[str], threads: int, target: Target, exact: Exact
    ) -> list[Row]:
        """The rows of one layer on one number of threads."""
        measure.set_threads(threads)
        rows: dict[str, Row] = {}
        kernels: dict[str, LayerKernel] = {}
        for key in keys:
            row: Row = {"name": name, "lowering": key, "threads": threads}
            try:
                kernel = compile_layer(problem, key, target, epilogue=EPILOGUE)
                row.update(cost_of(kernel, target, threads))
                row["error"] = finite(exact.error(kernel))
            except Exception as error:  # whatever one lowering does, the others are still to be measured
                self._fail(row, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
                continue
            wrong = _error_text(row["error"], row["error_limit"])
            row["right"] = not wrong
            for what in [*wrong, *disagreements(row)]:
                self._fail(row, what)
            rows[key] = row
            kernels[key] = kernel
        peaks = [self._peak(threads)]
        times = measure_in_turn(kernels, self.repeat, self.seconds)
        peaks.append(self._peak(threads))
        for key, row in rows.items():
            row.update(times[key])
            row.update(rates(problem.macs, row["best"], row["median"], max(peaks)))
            row["error_after"] = finite(exact.error_after_relu(kernels[key]))
            for what in _error_text(row["error_after"], row["error_limit"]) if row["right"] else []:
                row["right"] = False
                self._fail(row, f"after the timing: {what}")
        return list(rows.values())

    def _fail(self, row: Row, what: str) -> None:
        self.failures.append(
            {"name": row["name"], "lowering": row["lowering"], "threads": row["threads"], "what": what}
        )

    def _peak(self, threads: int) -> float:
        limit = self.limits[threads]
        peak = measure.multiply_add_peak(threads, "float32", self.targets[threads])
        limit["samples"].append(peak)
        limit["gflops"] = max(limit["gflops"], peak)
        return peak


def rates(macs: int, best: float, median: float, peak: float) -> Row:
    """GFLOP/s by the definition's multiply-adds, whatever the lowering does, and their shares of `peak`."""
    gflops, gflops_median = 2 * macs / best / 1e9, 2 * macs / median / 1e9
    return {
        "gflops": gflops,
        "gflops_median": gflops_median,
        "peak": peak,
        "peak_share": gflops / peak,
        "peak_share_median": gflops_median / peak,
    }


def cost_of(kernel: LayerKernel, target: Target, threads: int) -> Row:
    """What a compiled layer allocates, in bytes, beside what its lowering's formulas say.

    `workspace_bytes` is `tensor_bytes` (the workspace tensors) plus `scratch_bytes` (what the kernels take from the
    pool of each of the threads that have work).
    """
    built, cost = kernel.kernels, kernel.kernels.cost
    busy = threads if cost.tasks is None else min(threads, cost.tasks)
    functions = {f"f{index}": k.func for index, k in enumerate(built.kernels) if k.kind != "weight"}
    hidden = sum(kernel_workspace_bytes(tvm.IRModule(functions), target, busy).values())
    gemm = cost.gemms[0]
    return {
        "gemm": [gemm.m, gemm.n, gemm.k],
        "count": gemm.count,
        "tile": [built.tile.mr, built.tile.nr],
        "executed_macs": cost.macs,
        "workspace_bytes": kernel.workspace_bytes + hidden,
        "tensor_bytes": kernel.workspace_bytes,
        "scratch_bytes": hidden,
        "workspace_formula_bytes": cost.scratch(threads),
        "weight_bytes": sum(k.bytes for k in built.kernels if k.kind == "weight"),
        "weight_formula_bytes": cost.weight_bytes,
        "expected_error": expected_error(cost, built.problem.dtype),
        "error_limit": ERROR_SLACK * expected_error(cost, built.problem.dtype),
    }


def disagreements(row: Mapping[str, Any]) -> list[str]:
    """What a row allocates otherwise than its lowering's formula says."""
    return [
        f"allocates {row[f'{what}_bytes']} bytes of {what}, its formula says {row[f'{what}_formula_bytes']}"
        for what in ("workspace", "weight")
        if row[f"{what}_bytes"] != row[f"{what}_formula_bytes"]
    ]


def finite(error: float) -> float | None:
    """None for an error that is no number: JSON has none."""
    return error if math.isfinite(error) else None


def _error_text(error: float | None, limit: float) -> list[str]:
    if error is None:
        return ["wrong: parts of the output are not written, or not finite"]
    return [f"wrong: differs from float64 by {error:.1e} of the largest output, {limit:.1e} is allowed"] * (
        error > limit
    )
