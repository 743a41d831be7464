"""Kernels of one layer timed in turn, so that a drift of the clock falls on all of them alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gemmify import measure
from gemmify.layer import LayerKernel

ROUNDS = 5  # turns that each lowering of a layer gets
SMALL_SECONDS = 50e-6  # calls shorter than this are timed several at once ...
MEASURE_SECONDS = 500e-6  # ... so many that one measurement takes this long
MIN_SECONDS = 0.03  # a layer of microseconds is measured more often than asked, until its best time is steady
MAX_SECONDS = 3.0  # and one of seconds (the definition itself) less often
SLOW_SECONDS = 0.2  # a call this long warms the caches itself


def measure_in_turn(
    kernels: Mapping[str, LayerKernel], repeat: int, seconds: float = MAX_SECONDS
) -> dict[str, dict[str, Any]]:
    """`{key: {best, median, p90, runs, calls, times}}` of bound kernels, `calls` calls in each of `runs` measurements.

    Each round gives every kernel one burst, odd rounds in the opposite order; the first call of a burst is not counted.
    A kernel is measured at least `repeat` times, or as often as fits into `seconds`; one that takes longer than that
    for a single call is left out of all rounds but the first.
    """
    plans = {}
    for key, kernel in kernels.items():
        (once,) = kernel.time(repeat=1, warmup=0)
        if once < SLOW_SECONDS:
            once = max(min(kernel.time(repeat=3, warmup=0)), 1e-7)
        plans[key] = (*burst(once, repeat, seconds), min(ROUNDS, max(1, int(seconds / once))), int(once < SLOW_SECONDS))
    times: dict[str, list[float]] = {key: [] for key in kernels}
    for index in range(ROUNDS):
        for key in list(kernels) if index % 2 == 0 else reversed(list(kernels)):
            runs, calls, rounds, warmup = plans[key]
            if index < rounds:
                times[key] += kernels[key].time(repeat=runs, warmup=warmup, number=calls)
    return {key: {**measure.summarize(found), "calls": plans[key][1], "times": found} for key, found in times.items()}


def burst(once: float, repeat: int, seconds: float = MAX_SECONDS) -> tuple[int, int]:
    """(measurements in a round, calls in a measurement) for a layer that takes `once` seconds."""
    calls = math.ceil(MEASURE_SECONDS / once) if once < SMALL_SECONDS else 1
    wanted = max(repeat, min(2000, math.ceil(MIN_SECONDS / (once * calls))))
    bounded = min(wanted, math.ceil(seconds / (once * calls)))
    return max(1, math.ceil(bounded / ROUNDS)), calls
