"""What to try next on one task: the defaults, what won on similar layers, then what the cost model ranks first.

    1. the default of `compile`, then the points that won elsewhere, then the defaults of the other lowerings, those of
       the least modelled time first, as far as the bound and the model leave them;
    2. batches from a pool of random points and of neighbours of the best so far, ranked by the cost model, no point
       twice, and every tenth at random.

A lowering whose bound is above the best time is dropped; one that came nowhere near the best gets a few trials only.
Everything is drawn from one generator: equal seeds and equal observations give equal proposals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from .bound import Limits
from .cost_model import CostModel, Row
from .point import Point
from .space import Space

EPSILON = 0.1
"""The part of a batch that is drawn at random."""
FAR_OFF = 2.0
"""A lowering that is this many times slower than the best ..."""
FEW = 4
"""... gets so many trials in all."""
MODELLED_OFF = 8.0
"""A lowering that is modelled this many times slower than the best is not tried."""
BOUND_DOUBT = 1.05
"""A bound must be above the best time by this much to drop a lowering: both are measured."""
BELOW_BOUND = 0.95
"""A time this far below its bound proves that the limits were measured in a slow moment: the bounds are dropped."""
NEAR_BOUND = 1.03
PATIENCE = 40
"""Trials in a row that gain less than GAIN end a search, until it is told to go on."""
MOST_PATIENCE = 8 * PATIENCE
GAIN = 0.01
POOL = 192
"""Random drafts of a pool; about as many neighbours of the best come on top."""
PARENTS = 6
CHILDREN = 24
SETTLED = 4
"""How many drafts are made points for each that is asked for, before all points are gone through one by one."""
SMALL = 64
"""A lowering of at most so many points is enumerated, not sampled."""
TAUGHT = 150
"""Trials that the cost model must have seen for it to say which lowerings are not even tried ..."""
HOPELESS = -1.1
"""... because they are expected to be this far (a logarithm: three times) behind the best of them."""


class Search:
    """The search of one task. `seeds` are points that won on similar layers, the best first; `model` may be shared by
    the searches of a session (None: one of its own); `limits` gives the bounds (None: nothing is dropped by them).

    `propose`, measure, `observe` each; or several batches at once: a point is never proposed twice.
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        seeds: Sequence[Point] = (),
        *,
        model: CostModel | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.space = space
        self._rng = Random(f"{seed} {space.task.to_dict()}")
        self._model = CostModel(space.machine, seed) if model is None else model
        self._bounds = {} if limits is None else {key: space.bound(key, limits) for key in space.keys}
        self.results: dict[Point, float | None] = {}
        """What was observed: seconds, or None for a failure."""
        self._proposed: set[Point] = set()
        self._lost: set[Point] = set()
        self._found: dict[str, float] = {}
        self._per_key: dict[str, int] = dict.fromkeys(space.keys, 0)
        self.patience = PATIENCE
        self.best: tuple[Point, float] | None = None
        """The fastest point and its seconds."""
        self._last_gain = (0, float("inf"))
        self._exhausted = False
        self._first = [space.default()]
        self._others = [space.default(key) for key in space.keys[1:]]
        self._opened = 0
        self.suggest(seeds)

    # What the session asks.

    @property
    def trials(self) -> int:
        """How many points were observed."""
        return len(self.results)

    @property
    def bound(self) -> float | None:
        """Seconds that no lowering of the space can beat; None without limits."""
        return min(self._bounds.values()) if self._bounds else None

    @property
    def keys(self) -> list[str]:
        """The lowerings that are still worth a trial."""
        return [key for key in self.space.keys if self._alive(key)]

    @property
    def converged(self) -> str | None:
        """Why there is nothing more to gain here, or None where there is."""
        if self.best is not None and self.bound is not None and self.best[1] <= NEAR_BOUND * self.bound:
            return f"within {100 * max(0.0, self.best[1] / self.bound - 1):.0f} % of its bound"
        if self._exhausted and self._proposed <= self.results.keys():
            return f"all {self.trials} points tried"
        idle = self.trials - max(self._last_gain[0], self._opened)
        if self.best is not None and idle >= self.patience and not self._first and not self._others:
            return f"no gain above {GAIN:.0%} in {idle} trials"
        return None

    def suggest(self, seeds: Sequence[Point]) -> None:
        """Points that won on similar layers, to be tried right after the default; those that do not fit are adapted."""
        adapted = [p for p in map(self.space.adapt, seeds) if p is not None and p not in self._proposed]
        default = [p for p in self._first[:1] if p == self.space.default()]
        self._first = list(dict.fromkeys([*default, *adapted, *self._first]))

    def lost(self, point: Point) -> None:
        """A proposed point that was not measured, through no fault of its own: it is proposed once more, at the first
        time; at the second it is given up."""
        if point in self._lost:
            self.results.setdefault(point, None)
        elif point in self._proposed and point not in self.results:
            self._lost.add(point)
            self._proposed.discard(point)
            self._first.append(point)

    def go_on(self) -> bool:
        """Be more patient, where patience is what ended this search; False where it is not, or has been enough."""
        if not (self.converged or "").startswith("no gain"):
            return False
        while self.patience < MOST_PATIENCE and self.converged is not None:  # an older log may hold many idle trials
            self.patience *= 2
        return self.converged is None

    def observe(self, point: Point, seconds: float | None) -> None:
        """The time of a point, which need not have been proposed (an older trial); None for a failure. A point that is
        not in the space is passed over."""
        at = self.space.canonical(point)
        if at is None:
            return
        self._proposed.add(at)
        first = at not in self.results
        known = self.results.get(at)
        if seconds is not None and known is not None:
            seconds = min(seconds, known)
        self.results[at] = seconds if seconds is not None else known
        self._per_key[at.lowering] += first
        self._model.add([Row(self.space.task, at, seconds)])
        if seconds is None:
            return
        if seconds < BELOW_BOUND * self._bounds.get(at.lowering, 0.0):
            self._bounds = {}
        self._found[at.lowering] = min(seconds, self._found.get(at.lowering, float("inf")))
        if self.best is None or seconds < self.best[1]:
            self.best = (at, seconds)
            if seconds < (1 - GAIN) * self._last_gain[1]:
                self._last_gain = (self.trials, seconds)

    def propose(self, count: int) -> list[Point]:
        """At most `count` points to measure next; fewer where the space has no more, which `converged` then says."""
        chosen: list[Point] = []
        self._opening(chosen, count)
        if len(chosen) < count:
            self._ranked(chosen, count)
        return chosen

    def _opening(self, chosen: list[Point], count: int) -> None:
        """The default, the seeds and the defaults of the other lowerings that may win."""
        if not self._first:
            self._others = self._promising(self._others)
        for queue in (self._first, self._others):
            while queue and len(chosen) < count:
                point = queue.pop(0)
                if point not in self._proposed and self._alive(point.lowering):
                    self._take(chosen, point)
                    self._opened = self.trials + len(chosen)

    def _promising(self, points: list[Point]) -> list[Point]:
        """Those of the lowerings' defaults that the cost model does not think hopeless, once it has seen enough; the
        others are left to the random part of a batch."""
        if len(self._model) < TAUGHT or not points:
            return points
        scores = self._model.predict(self.space.task, [self.space.default(), *points])
        limit = float(scores.max()) + HOPELESS
        return [point for point, score in zip(points, scores[1:], strict=True) if score >= limit]

    def _take(self, chosen: list[Point], point: Point) -> None:
        self._proposed.add(point)
        chosen.append(point)

    def _alive(self, key: str) -> bool:
        """Whether a lowering can still win: bound, model and what was seen of it."""
        if self.best is None or key == self.best[0].lowering:
            return True
        best = self.best[1]
        if self._bounds.get(key, 0.0) > BOUND_DOUBT * best:
            return False
        if self._per_key[key] == 0:
            return self.space.cycles[key] <= MODELLED_OFF * min(self.space.cycles.values())
        return self._near(key) or self._per_key[key] < FEW

    def _near(self, key: str) -> bool:
        """Whether a lowering was seen within reach of the best."""
        return self.best is None or self._found.get(key, float("inf")) <= FAR_OFF * self.best[1]

    # The batches.

    def _ranked(self, chosen: list[Point], count: int) -> None:
        """Fill a batch from a pool of drafts, the best ranked first; from all points there are where that is too
        little."""
        keys = self.keys
        pool = list(dict.fromkeys(self._drafts(keys)))
        scores = self._model.predict(self.space.task, pool)
        rest = [pool[i] for i in sorted(range(len(pool)), key=lambda i: (-float(scores[i]), i))]
        tries = SETTLED * (count - len(chosen))
        while rest and len(chosen) < count and tries:
            draft = rest.pop(self._rng.randrange(len(rest)) if self._rng.random() < EPSILON else 0)
            tries -= self._offer(chosen, self.space.adapt(draft))
        for key in keys if len(chosen) < count else ():
            for point in self.space.points(key):
                if not self._room(chosen, key):
                    break  # a large lowering that may have no more trials is not gone through in vain
                self._offer(chosen, point)
                if len(chosen) == count:
                    return
        self._exhausted = len(chosen) < count

    def _offer(self, chosen: list[Point], point: Point | None) -> bool:
        """Take a point that is new and whose lowering may have one more trial; whether it was looked at."""
        if point is None or point in self._proposed:
            return point is not None
        if self._room(chosen, point.lowering):
            self._take(chosen, point)
        return True

    def _room(self, chosen: Sequence[Point], key: str) -> bool:
        """Whether a lowering may have one more trial beside those of `chosen`."""
        if self._near(key) or (self.best is not None and key == self.best[0].lowering):
            return True
        return self._per_key[key] + sum(point.lowering == key for point in chosen) < FEW

    def _drafts(self, keys: Sequence[str]) -> Iterator[Point]:
        """What a batch is drawn from: all points of the small lowerings, random ones of the others, more of those that
        are near the best, and neighbours of the best points."""
        small = [key for key in keys if self.space.size(key) <= SMALL]
        for key in small:
            yield from (point for point in self.space.points(key) if point not in self._proposed)
        large = [key for key in keys if key not in small]
        if not large:
            return
        for key in self._rng.choices(large, [self._weight(key) for key in large], k=POOL):
            yield self.space.draft(self._rng, key)
        timed = [(seconds, point) for point, seconds in self.results.items() if seconds is not None]
        parents = [point for _, point in sorted(timed, key=lambda t: t[0]) if point.lowering in large][:PARENTS]
        for parent in parents:
            for index in range(CHILDREN):
                draft = self.space.draft_neighbour(self._rng, parent)
                # Every third takes a second step: two choices that only help together.
                yield draft if index % 3 < 2 else self.space.draft_neighbour(self._rng, self._settle(draft))

    def _settle(self, draft: Point) -> Point:
        point = self.space.adapt(draft)
        assert point is not None
        return point

    def _weight(self, key: str) -> float:
        """How often a lowering is drawn, from its best time (its modelled one where it has none)."""
        if self.best is not None and key in self._found:
            return (self.best[1] / self._found[key]) ** 3
        return 0.5 * (min(self.space.cycles.values()) / self.space.cycles[key]) ** 2
