"""The end of a tuning run: the best of each task and the default, in turns, alone and then inside their network.

    1. alone: each task's finalists and its default, in turns, cold and warm (stage `final`)
    2. inside: the network compiled untuned and with the first, second ... finalist of every task, in turns; what a
       layer took in each is its word (stage `network`), and the verdict rests on it
    3. the network as it will be compiled now against the untuned one, in turns

Steps 2 and 3 need the network on this machine and time to compile it; without them the verdict rests on step 1.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from ..bench.rounds import SETTLE_SECONDS
from ..errors import GemmifyError
from .budget import MOST_RESERVE, Budget
from .history import fastest_first
from .inside import BURST, PROFILED, Inside, Variants
from .layers import Network
from .measure.job import Measured
from .point import Point
from .settings import FINALISTS, RANKED
from .verdict import Verdict, decide

if TYPE_CHECKING:
    from .session import Layer, Session

ROUNDS = 6
"""Turns of the finalists, alone."""
ROUNDS_INSIDE = 7
LEAST_BUDGET = 60.0
"""A shorter run has no time to compile its networks several times."""


class Finals:
    """Runs the finals of a session; a context manager that owns the compiled networks."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._stack = ExitStack()
        self._inside: list[tuple[Network, Variants]] = []
        self.networks: list[dict[str, Any]] = []
        """{"name", "untuned", "tuned", "ratio"} of each network that was measured as a whole: seconds, medians."""
        self._each, self._fixed, self._most = 0.0, 0.0, FINALISTS

    @property
    def estimate(self) -> float:
        """Seconds that steps 2 and 3 will take with all their finalists, about."""
        return FINALISTS * self._each + self._fixed

    def prepare(self) -> None:
        """Compile each network untuned, which every later variant is measured against, and learn how long it takes."""
        settings = self.session.settings
        elsewhere = settings.tracker is not None
        if elsewhere or (settings.budget is not None and settings.budget < LEAST_BUDGET):
            why = (
                "it does not run on this machine"
                if elsewhere
                else f"that takes a budget of {LEAST_BUDGET:.0f}s or more"
            )
            self.session.progress.note(f"the finals are measured layer by layer, not inside the network: {why}")
            return
        bounds = {"max_workspace": settings.max_workspace, "max_error": settings.max_error}
        for net in self.session.networks:
            self.session.progress.phase(f"compiling {net.name} untuned")
            made = self._stack.enter_context(Variants(net, self.session.target, self.session.threads, bounds))
            made.add({})
            self._inside.append((net, made))
            start = time.monotonic()
            latency = median(made.measure(1).network[0])
            loaded = time.monotonic() - start
            one = loaded + (ROUNDS_INSIDE - 1) * ((BURST + PROFILED + 3) * latency + 2 * SETTLE_SECONDS)
            self._each += made.compile_seconds + one
            self._fixed += made.compile_seconds + 3 * one  # untuned among the variants, then tuned against untuned
        if settings.budget is not None and self._each + self._fixed > MOST_RESERVE * settings.budget:
            self._stack.close()
            self._inside, self._each, self._fixed = [], 0.0, 0.0
            self.session.progress.note("too little time for the finals inside the network: layer by layer instead")

    def run(self, budget: Budget) -> None:
        """All steps, as far as the time goes; GemmifyError where a device or a process fails for good."""
        self.session.progress.phase("finals: the best of each layer in turns")
        ranked = {}
        for number, layer in enumerate(self.session.layers):
            start = time.monotonic()
            ranked[layer.task] = self._alone(number, layer, in_time=budget.left > self._each + self._fixed)
            budget.spent(None, time.monotonic() - start)
        if self._each:
            self._most = int(max(1.0, min(float(FINALISTS), (budget.left - self._fixed) / self._each)))
        for number, (net, variants) in enumerate(self._inside):
            if budget.left < 0.8 * (self._each + self._fixed) * (len(self._inside) - number) / len(self._inside):
                self.session.progress.note(f"no time is left to measure {net.name} as a whole")
            elif any(ranked[task] for _, task in net.layers):
                start = time.monotonic()
                self._whole(number, net, variants, ranked)
                budget.spent(None, time.monotonic() - start)

    def _alone(self, number: int, layer: Layer, in_time: bool) -> list[Point]:
        """Step 1 for one task; its finalists, the best first (without the default)."""
        times = ((s, p) for p, s in layer.search.results.items() if s is not None and p != layer.default)
        points = fastest_first(times)[:RANKED]
        if not points or not layer.fresh or not in_time:
            return points
        field = [layer.default, *points]
        found = self.session.measurer.finals(layer.task, field, ROUNDS)
        group = f"{self.session.id}-{number}"
        for point, measured in zip(field, found, strict=True):
            self.session.log(layer, point, measured, "final", group)
        return fastest_first((median(m.cold), p) for p, m in zip(field, found, strict=True) if m.ok and p in points)

    def _whole(self, number: int, net: Network, variants: Variants, ranked: dict[Any, list[Point]]) -> None:
        """Steps 2 and 3 for one network."""
        progress, places = self.session.progress, list(self.session.places(net))
        try:
            for place in range(min(self._most, max(len(ranked[layer.task]) for _, layer in places))):
                progress.phase(f"compiling {net.name} with finalist {place + 1} of each layer")
                variants.add({n: p[min(place, len(p) - 1)] for n, layer in places if (p := ranked[layer.task])})
            progress.phase(f"{net.name}: layers inside the network, variants in turns")
            inside = variants.measure(ROUNDS_INSIDE)
            self._log(f"{self.session.id}-{number}-{net.name}", net, inside, ranked)
            progress.phase(f"{net.name}: tuned against untuned")
            chosen = {n: v.point for n, layer in places if not (v := self.verdict(layer)).kept and v.point is not None}
            variants.add(chosen)
            times = variants.measure(ROUNDS_INSIDE, [0, len(variants) - 1]).network
        except GemmifyError as err:
            progress.note(f"{net.name} was not measured as a whole: {err}")
            return
        untuned, tuned = (median(t) for t in times)
        self.networks.append({"name": net.name, "untuned": untuned, "tuned": tuned, "ratio": untuned / tuned})

    def _log(self, group: str, net: Network, inside: Inside, ranked: dict[Any, list[Point]]) -> None:
        """What each layer took in each variant, one record a point: the mean over the layers that are one task."""
        names: dict[Any, list[str]] = {}
        for name, layer in self.session.places(net):
            names.setdefault(layer.task, []).append(name)
        for layer in self.session.layers:
            points = ranked[layer.task]
            if layer.task not in names or not points:
                continue
            samples: dict[Point, list[float]] = {}
            for variant, layers in enumerate(inside.layers):
                point = layer.default if variant == 0 else points[min(variant - 1, len(points) - 1)]
                # A layer whose result nothing reads is not in the compiled network.
                rounds = zip(*(layers[name] for name in names[layer.task] if name in layers), strict=True)
                samples.setdefault(point, []).extend(fmean(times) for times in rounds)
            for point, times in samples.items():
                if not times:
                    continue
                self.session.log(layer, point, Measured("ok", "", (), tuple(times)), "network", group)

    def verdict(self, layer: Layer) -> Verdict:
        """What a compilation takes for this layer now."""
        return decide(self.session.history.known.get(layer.task, ()), layer.default)

    def __enter__(self) -> Finals:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
