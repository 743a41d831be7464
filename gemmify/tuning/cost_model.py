"""A model of how fast a point will be, learnt from every trial of every task: XGBoost on `features`.

It learns `log(best time of the task / time)`: 0 for the best, -0.7 for half its speed, and LOST for what failed or is
slower still. So tasks of microseconds and of milliseconds are one set of rows, and a search only ranks by it.

MetaSchedule's `XGBModel` fits its trees with an objective written in Python over its own scheduled candidates; the rows
here are plain numbers of explicit points, so XGBoost is called as it is (histogram trees, one thread, fixed seed: equal
rows give equal trees).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from types import ModuleType
from typing import Any

import numpy as np

from schedules import AnyMachine

from ..errors import InputError
from .features import knob_values, table, vector
from .point import Point
from .task import Task

LOST = -3.0
"""What a failure is worth: twenty times slower than the best."""
LEAST_ROWS = 8
MOST_ROWS = 20_000
"""Rows that are learnt from, the latest first: so that a long log does not make a search wait."""
ROUNDS = 60
STALE = 0.04
"""By what share the rows may have grown before the trees are fitted again."""
_PARAMETERS = {
    "tree_method": "hist",
    "max_depth": 6,
    "eta": 0.15,
    "max_bin": 64,
    "min_child_weight": 1.0,
    "subsample": 0.9,
    "nthread": 1,
    "verbosity": 0,
}


def require_xgboost() -> ModuleType:
    """The module `xgboost`; InputError that names the extra where it is not installed."""
    try:
        import xgboost
    except ImportError as err:
        raise InputError(
            "tuning needs XGBoost, which is not installed: install the extra `tune` (pip install 'gemmify[tune]')"
        ) from err
    return xgboost


@dataclass(frozen=True)
class Row:
    """One trial: `seconds` is None where it failed."""

    task: Task
    point: Point
    seconds: float | None


class CostModel:
    """Learns from rows, ranks points. One for a whole session: what is learnt on one task serves the others.

    Raises InputError where XGBoost is missing.
    """

    def __init__(self, machine: AnyMachine, seed: int = 0) -> None:
        self._xgboost = require_xgboost()
        self.machine, self.seed = machine, seed
        self._rows: list[Row] = []
        self._best: dict[Task, float] = {}
        self._fixed: list[np.ndarray] = []
        self._knobs: list[dict[str, float]] = []
        self._names: tuple[str, ...] = ()
        self._fitted = 0
        self._booster: Any = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Rows to learn from at the next `predict`. One whose lowering or sizes are not known here is left out."""
        for row in rows:
            try:
                fixed = vector(row.task, row.point, self.machine)
            except ValueError:
                continue
            self._rows.append(row)
            self._fixed.append(fixed)
            self._knobs.append(knob_values(row.point))
            if row.seconds is not None:
                self._best[row.task] = min(row.seconds, self._best.get(row.task, float("inf")))

    @property
    def ready(self) -> bool:
        """Whether there are rows enough to rank by."""
        return len(self._rows) >= LEAST_ROWS

    def fit(self, rows: Iterable[Row] = ()) -> None:
        """Fit the trees to all rows so far and `rows`; nothing happens where there are too few."""
        self.add(rows)
        if not self.ready:
            return
        kept = slice(max(0, len(self._rows) - MOST_ROWS), None)
        self._names = tuple(sorted({name for knobs in self._knobs[kept] for name in knobs}))
        scores = np.array([self._score(row) for row in self._rows[kept]], np.float32)
        data = table(self._fixed[kept], self._knobs[kept], self._names)
        # What is fast must be told apart; how slow the slow ones are hardly matters.
        weights = 0.2 + np.exp(scores)
        matrix = self._xgboost.QuantileDMatrix(data, scores, weight=weights, max_bin=_PARAMETERS["max_bin"], nthread=1)
        parameters = {**_PARAMETERS, "seed": self.seed, "base_score": float(np.average(scores, weights=weights))}
        self._booster = self._xgboost.train(parameters, matrix, num_boost_round=ROUNDS)
        self._fitted = len(self._rows)

    def _score(self, row: Row) -> float:
        if row.seconds is None or row.seconds <= 0 or row.task not in self._best:
            return LOST
        return max(LOST, log(self._best[row.task] / row.seconds))

    def predict(self, task: Task, points: Sequence[Point]) -> np.ndarray:
        """A score for each point, higher is faster; all 0 where nothing was learnt. Fits first where enough rows came
        since the last time. ValueError for a point whose lowering or sizes are not known."""
        if not points or not self.ready:
            return np.zeros(len(points), np.float32)
        if self._booster is None or len(self._rows) - self._fitted > STALE * self._fitted:
            self.fit()
        fixed, knobs = [vector(task, p, self.machine) for p in points], [knob_values(p) for p in points]
        scores: np.ndarray = self._booster.inplace_predict(table(fixed, knobs, self._names))
        return scores
