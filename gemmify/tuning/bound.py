"""What cannot win: the least time that a lowering needs, from the machine's measured peak and bandwidth (a roofline).

    seconds >= max( 2 multiply-adds / flops_per_s,  bytes / read_bytes_per_s )

It is a bound, not a forecast: partial tiles count only where the tile is given, transforms and workspaces not at all,
and the bytes are those that must be read and that a cold run does not find in a core's own cache: the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from lowering import Lowering, Problem, Tile
from lowering.problem import accumulator
from schedules import AnyMachine, Gpu, Machine, host_target

from ..errors import InputError
from ..kernels import on_machine, tile_for
from ..measure import _read_kernel, memory_bandwidth, multiply_add_peak, set_threads, time_call

FLUSHED_BYTES = 64 << 20
"""What the weights of a network pass through before a layer meets its own again: more than a core's own caches."""
_ROUNDS = 15


@dataclass(frozen=True)
class Limits:
    """What the threads that run a layer do at most, together: floating-point operations (two a multiply-add) a second,
    and bytes a second read from where a network's weights lie: the last cache, or memory if that is faster."""

    flops_per_s: float
    read_bytes_per_s: float

    def __post_init__(self) -> None:
        if not (self.flops_per_s > 0 and self.read_bytes_per_s > 0):
            raise ValueError(f"limits must be positive, found {self}")

    @classmethod
    def measure(cls, threads: int, dtype: str = "float32", target: Any = None) -> Limits:
        """Measured here and now, in about half a second. `dtype` is the layers' (halves compute in float32).

        Raises InputError as `gemmify.measure.multiply_add_peak`: a thread count that this process cannot have, and a
        target whose code does not run here.
        """
        peak = multiply_add_peak(threads, accumulator(dtype), target) * 1e9
        return cls(peak, _weight_bandwidth(threads))

    @classmethod
    def of_gpu(cls, gpu: Gpu, dtype: str) -> Limits:
        """What a GPU of that architecture is built for; `dtype` is the layers'."""
        if dtype in ("float16", "bfloat16"):
            macs = gpu.half
        elif dtype == "float64":
            macs = gpu.fma / 2  # of the fastest boards; the others have less
        else:
            macs = max(gpu.fma, gpu.tf32) if gpu.allow_tf32 else gpu.fma
        return cls(2 * macs, gpu.bandwidth)


def _weight_bandwidth(threads: int) -> float:
    """Bytes a second of reading FLUSHED_BYTES over and over, which a large last cache holds; where it holds less, they
    come from memory, and what `memory_bandwidth` says stands."""
    machine = Machine.from_target(host_target())
    if machine.l3_bytes < 2 * FLUSHED_BYTES:
        return memory_bandwidth(threads) * 1e9
    lanes = machine.lanes("float32")
    steps = FLUSHED_BYTES // (4 * 8 * lanes * threads)
    kernel = _read_kernel(threads, steps, lanes)["main"]
    set_threads(threads)
    data = tvm.runtime.tensor(np.full((threads, steps, 8, lanes), 0.5, "float32"))
    sums = tvm.runtime.tensor(np.zeros((threads, 8, lanes), "float32"))
    return FLUSHED_BYTES / min(time_call(lambda: kernel(data, sums), _ROUNDS, warmup=2))


def lower_bound(lowering: Lowering, problem: Problem, tile: Tile | None, machine: AnyMachine, limits: Limits) -> float:
    """Seconds that no code of this lowering can beat within `limits`: with this register tile, or, where it is None,
    with any (partial tiles then count as nothing). The lowering's free sizes are those that it is configured with;
    raises InputError where it does not apply."""
    problem = on_machine(problem, machine)
    if (reason := lowering.applicable(problem)) is not None:
        raise InputError(f"lowering {lowering.key} does not apply: {reason}")
    # A tile of one element leaves no partial tile and no column that only fills a panel.
    tiles = (Tile(1, 1), tile_for(lowering, problem, machine)) if tile is None else (tile,)
    costs = [lowering.cost(problem, made) for made in tiles]
    macs, weights = min(cost.macs for cost in costs), min(cost.weight_bytes for cost in costs)
    return max(2 * macs / limits.flops_per_s, weights / limits.read_bytes_per_s)
