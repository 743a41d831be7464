"""Times and machine limits: how long a call takes, and what this machine can do at most in the same minute.

A time says little without the limit beside it: clocks drift, and a virtual machine shares its memory bus. So every
report of the project gives a share of `multiply_add_peak` and `memory_bandwidth`, measured in the run that it reports,
by kernels that TVM compiles for the same target as the code under test.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tvm
from tvm.script import tirx as T
from tvm.target import Target

from gemmify.errors import InputError
from gemmify.host import cpu_flags, kernel_names
from gemmify.threads import check_threads, use_threads
from schedules import Machine, TargetError, host_target, parse_target

PEAK_DTYPES = ("float32", "float64")
_PEAK_SECONDS = 0.004  # one timed call: long against the start of the threads, short against a scheduler's time slice
_PEAK_ROUNDS = 25
_BANDWIDTH_ROUNDS = 7
_MIN_STREAM_BYTES = 128 << 20


def set_threads(threads: int) -> None:
    """Make TVM's kernels run on exactly `threads` threads when this Python thread calls them.

    Raises InputError where `threads` is not positive, or TVM's pool of this Python thread is smaller (its size is fixed
    at its first use).
    """
    found = use_threads(check_threads(threads))
    if found != threads:
        raise InputError(
            f"asked for {threads} threads, but TVM's pool of this process holds {found}: "
            f"set TVM_NUM_THREADS={threads} before the program starts"
        )


def time_call(fn: Callable[[], object], repeat: int = 10, warmup: int = 1) -> list[float]:
    """Seconds of each of `repeat` calls of `fn`, after `warmup` calls that are not counted."""
    if repeat < 1:
        raise InputError(f"asked for {repeat} timed calls; at least 1 is required")
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return times


def summarize(times: Sequence[float]) -> dict[str, float | int]:
    """`{"best", "median", "p90", "runs"}` of times in seconds; p90 is the smallest time that 90 % do not exceed."""
    if not times:
        raise InputError("no times to summarize: at least 1 run is required")
    ordered = sorted(times)
    p90 = ordered[math.ceil(0.9 * len(ordered)) - 1]
    return {"best": ordered[0], "median": statistics.median(ordered), "p90": p90, "runs": len(ordered)}


def geomean(values: Sequence[float]) -> float | None:
    """The geometric mean of positive values; None of nothing."""
    return math.exp(math.fsum(math.log(v) for v in values) / len(values)) if values else None


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int = 10, warmup: int = 1) -> dict[str, list[float]]:
    """Times in seconds of several functions called in turn, so that a drift of the clock falls on all of them alike.

    Each round calls every function once; odd rounds go backwards, so that none always runs after the same neighbour.
    """
    if rounds < 1:
        raise InputError(f"asked for {rounds} rounds; at least 1 is required")
    for fn in calls.values():
        for _ in range(warmup):
            fn()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def multiply_add_peak(threads: int, dtype: str = "float32", target: Any = None) -> float:
    """The most multiply-adds that `threads` cores do, in GFLOP/s (two operations each), as `target`'s code does them.

    Each thread repeats `a = a x + y` on accumulators that stay in vector registers: enough of them that no addition
    waits for the one before (3/4 of the registers: 24 chains of AVX-512, where latency 4 on two ports needs 8). Best of
    several calls, about 0.1 s in all. `target` is as for `compile`, default this machine. Raises InputError for a
    dtype without vector multiply-adds here, and for a target whose code cannot run on this machine.
    """
    if dtype not in PEAK_DTYPES:
        raise InputError(f"multiply_add_peak needs dtype {' or '.join(PEAK_DTYPES)}, got {dtype!r}")
    parsed, machine = _runnable(target)
    lanes, chains = machine.lanes(dtype), max(8, machine.vector_registers * 3 // 4)
    kernel = _peak_kernel(threads, chains, lanes, dtype, str(parsed))["main"]
    set_threads(threads)
    factors = tvm.runtime.tensor(np.array([[0.999] * lanes, [0.001] * lanes], dtype))  # converges to 1: no denormals
    out = tvm.runtime.tensor(np.zeros((threads, chains, lanes), dtype))

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        kernel(factors, out, steps)
        return time.perf_counter() - start

    steps = 10_000
    seconds(steps)  # the first call starts the threads
    steps = max(steps, int(steps * _PEAK_SECONDS / seconds(steps)))
    best = min(seconds(steps) for _ in range(_PEAK_ROUNDS))
    return 2.0 * threads * chains * lanes * steps / best / 1e9


def memory_bandwidth(threads: int, kind: str = "read") -> float:
    """GB/s (1e9 bytes) between memory and `threads` cores of this machine, best of several passes.

    `read` sums a buffer of at least four times the last cache; `triad` does `a = b + 3 c` on three buffers of that size
    together and counts the three streams (the read of `a`'s lines before they are written is not counted, as in
    STREAM). Raises InputError for another kind.
    """
    if kind not in ("read", "triad"):
        raise InputError(f"memory_bandwidth measures 'read' or 'triad', got {kind!r}")
    machine = _runnable(None)[1]
    total = max(_MIN_STREAM_BYTES, 4 * machine.l3_bytes)
    lanes = machine.lanes("float32")
    step = 8 * lanes  # eight vectors a step: independent additions, and whole cache lines
    buffers = 1 if kind == "read" else 3
    steps = total // buffers // 4 // step // threads
    build = _read_kernel if kind == "read" else _triad_kernel
    kernel = build(threads, steps, lanes)["main"]
    set_threads(threads)
    shape = (threads, steps, 8, lanes)
    data = [tvm.runtime.tensor(np.full(shape, 0.5, "float32")) for _ in range(buffers)]
    if kind == "read":
        data.append(tvm.runtime.tensor(np.zeros((threads, 8, lanes), "float32")))
    best = min(time_call(lambda: kernel(*data), _BANDWIDTH_ROUNDS))
    return buffers * 4.0 * math.prod(shape) / best / 1e9


def _runnable(target: Any) -> tuple[Target, Machine]:
    """The target and its machine, where its code runs here. Raises InputError where it does not."""
    try:
        parsed = host_target() if target is None else parse_target(target)
    except TargetError as error:
        raise InputError(str(error)) from error
    if str(parsed.kind) != "llvm":
        raise InputError(f"a peak is measured for a CPU target (llvm), got {parsed.kind}; for a GPU use --suite gpu")
    machine, host = Machine.from_target(parsed), Machine.from_target(host_target())
    if machine.arch != host.arch:
        raise InputError(f"the target is for {machine.arch}, and this machine is {host.arch}: measure there")
    present = cpu_flags()
    missing = sorted(set(kernel_names(machine.arch, machine.features)) - present) if present is not None else []
    if missing:
        raise InputError(
            f"the target needs CPU features that this machine lacks ({', '.join(missing[:6])}): measure on a machine "
            "that has them, or give a smaller -mcpu"
        )
    return parsed, machine


@lru_cache(maxsize=8)
def _peak_kernel(threads: int, chains: int, lanes: int, dtype: str, target: str) -> Any:
    @T.prim_func
    def main(f: T.handle, o: T.handle, steps: T.int32) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        factors = T.match_buffer(f, (2, lanes), dtype)
        out = T.match_buffer(o, (threads, chains, lanes), dtype)
        for thread in T.parallel(threads):
            acc = T.alloc_buffer((chains, lanes), dtype, scope="local")
            for a in T.unroll(chains):
                for lane in T.vectorized(lanes):
                    acc[a, lane] = T.Cast(dtype, a)
            for _step in range(steps):
                for a in T.unroll(chains):
                    for lane in T.vectorized(lanes):
                        acc[a, lane] = acc[a, lane] * factors[0, lane] + factors[1, lane]
            for a in T.unroll(chains):
                for lane in T.vectorized(lanes):
                    out[thread, a, lane] = acc[a, lane]

    return tvm.compile(main, target=parse_target(target))


@lru_cache(maxsize=4)
def _read_kernel(threads: int, steps: int, lanes: int) -> Any:
    @T.prim_func
    def main(d: T.handle, o: T.handle) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        data = T.match_buffer(d, (threads, steps, 8, lanes), "float32")
        out = T.match_buffer(o, (threads, 8, lanes), "float32")
        for thread in T.parallel(threads):
            acc = T.alloc_buffer((8, lanes), "float32", scope="local")
            for a in T.unroll(8):
                for lane in T.vectorized(lanes):
                    acc[a, lane] = T.float32(0)
            for i in range(steps):
                for a in T.unroll(8):
                    for lane in T.vectorized(lanes):
                        acc[a, lane] = acc[a, lane] + data[thread, i, a, lane]
            for a in T.unroll(8):
                for lane in T.vectorized(lanes):
                    out[thread, a, lane] = acc[a, lane]

    return tvm.compile(main, target=host_target())


@lru_cache(maxsize=4)
def _triad_kernel(threads: int, steps: int, lanes: int) -> Any:
    @T.prim_func
    def main(x: T.handle, y: T.handle, z: T.handle) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        a = T.match_buffer(x, (threads, steps, 8, lanes), "float32")
        b = T.match_buffer(y, (threads, steps, 8, lanes), "float32")
        c = T.match_buffer(z, (threads, steps, 8, lanes), "float32")
        for thread in T.parallel(threads):
            for i in range(steps):
                for v in T.unroll(8):
                    for lane in T.vectorized(lanes):
                        a[thread, i, v, lane] = b[thread, i, v, lane] + T.float32(3) * c[thread, i, v, lane]

    return tvm.compile(main, target=host_target())
