"""What one layer is compiled to: the plan's point, else what the log proves faster than the untuned choice, else that.

1. a plan that names the layer settles it: a point as it stands, a bare key with the key's default;
2. `select.pick` gives the untuned choice, the default of "auto" or of the key that was asked for;
3. the verdict of the log on the records of the task (of that key, where one was asked for) against this default. A
   point that is above a bound, or that cannot be built any more, is taken out and the verdict asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from lowering import Problem
from schedules import AnyMachine, knob_space

from ..errors import InputError
from ..kernels import ScheduleKnobs, layer_kernels, require_tile
from ..policy import Policy
from ..select import Candidate, Choice, bounded, candidate_of, consider, error_bound, pick
from .line import encode
from .point import Point
from .task import Task
from .unscheduled import unscheduled
from .use import Found, Tuned
from .verdict import Verdict, decide

NAMED = 6
"""How many layers a refusal names."""


@dataclass(frozen=True)
class Chooser:
    """Chooses for the layers of one compilation. `frozen` demands that a log or a plan settles every one."""

    machine: AnyMachine
    policy: Policy
    tuned: Tuned | None = None
    frozen: bool = False

    def candidates(self, problem: Problem) -> list[Candidate]:
        """`select.consider` under the policy."""
        return consider(problem, self.machine, self.policy.max_workspace, self.policy.max_error)

    def choose(self, layer: str, task: Task, candidates: list[Candidate] | None = None) -> Choice:
        """The choice for `layer` among `candidates` (default: `self.candidates`) and what plan and log add. Raises
        InputError as `select.pick`, and for a plan's point that cannot be built."""
        candidates = self.candidates(task.problem) if candidates is None else candidates
        if (point := self.policy.points.get(layer)) is not None:
            return self._planned(layer, task, point, candidates)
        untuned = pick(layer, candidates, self.machine, self.policy)
        if self.tuned is None or self.policy.holds(layer):
            return untuned
        key = self.policy.key_for(layer)
        asked = key if key == untuned.lowering.key else None
        for found in self.tuned.find(task):
            records = [r for r in found.records if asked is None or r.point.lowering == asked]
            if choice := self._from_log(layer, task, replace(found, records=tuple(records)), untuned, candidates):
                return choice
        return untuned

    def _planned(self, layer: str, task: Task, point: Point, candidates: list[Candidate]) -> Choice:
        """The point of a plan; where it does not apply, or is above a bound, the modelled best (an error if strict)."""
        where = "" if self.policy.origin is None else f"{self.policy.origin}: "
        made, problem = self._candidate(task, point, candidates)
        if made is None:
            raise InputError(f"{where}layer {layer}: {point.title} cannot be built: {problem}")
        if made.reason is None:
            return _choice(made, point, "as planned")
        if self.policy.strict:
            said = f"{where}layer {layer}: {point.title} does not apply, it {made.reason}"
            raise InputError(f"{said}; change the plan, or drop --strict")
        free = replace(self.policy, default="auto", layers=None, points={})
        instead = pick(layer, candidates, self.machine, free)
        return replace(instead, why=f"the plan's {point.title} does not apply: {made.reason}; {instead.why}")

    def _from_log(
        self, layer: str, task: Task, found: Found, untuned: Choice, candidates: list[Candidate]
    ) -> Choice | None:
        """What `found` says, or None where no record of it can be used."""
        assert self.tuned is not None
        records, default = list(found.records), untuned.as_point()
        while (verdict := decide(records, default)).point is not None:
            if verdict.kept:
                why = f"default kept: {verdict.why}{_other(found)}"
                kept = replace(untuned, why=f"{why}; {untuned.why}")
                return replace(kept, tuning=_tuning(verdict, found), records=verdict.used)
            made, problem = self._candidate(task, verdict.point, candidates)
            if made is not None and made.reason is None:
                why = f"tuned: {verdict.why}{_other(found)}"
                if self.policy.key_for(layer) not in ("auto", untuned.lowering.key):
                    why += f"; {untuned.why}"  # what was asked for does not apply
                chosen = _choice(made, verdict.point, why)
                return replace(chosen, tuning=_tuning(verdict, found), records=verdict.used)
            if made is None or made.exceeds is None:
                self.tuned.reject(layer, verdict.point, problem or f"it {made and made.reason}")
            records = [record for record in records if record.point != verdict.point]
        return None

    def _candidate(self, task: Task, point: Point, candidates: list[Candidate]) -> tuple[Candidate | None, str]:
        """`point` as a candidate under the policy's bounds; None and what is wrong where it cannot be built."""
        limit = error_bound(candidates) if self.policy.max_error is None else self.policy.max_error
        try:
            lowering = point.configured()
            if (reason := lowering.applicable(task.problem)) is not None:
                return Candidate(lowering, reason), ""
            lowering.require_sizes(task.problem)
            require_tile(lowering, task.problem, point.tile)
            _require_knobs(task, point, self.machine)
            made = candidate_of(lowering, task.problem, self.machine, point.tile)
            made = bounded(made, self.machine, self.policy.max_workspace, limit)
            if made.reason is None:
                schedule = cast(ScheduleKnobs, point.schedule)
                layer_kernels(lowering, task.problem, self.machine, task.epilogue, point.tile, schedule)
            return made, ""
        except Exception as error:  # an old or edited point must not end a compilation, whatever a lowering says to it
            return None, " ".join((str(error).strip().splitlines() or [type(error).__name__])[-1].split())[:200]

    def settle(self, chosen: Mapping[str, Choice]) -> None:
        """Tell what was wrong with the log; where `frozen` is set InputError for the layers without a record."""
        if self.tuned is not None:
            self.tuned.warn()
        if self.frozen:
            require_covered(chosen, self.policy, self.tuned)

    def coverage(self, chosen: Mapping[str, Choice]) -> dict[str, Any]:
        """`coverage` of these choices by layer name."""
        return coverage(chosen, self.policy, self.tuned)


def _choice(made: Candidate, point: Point, why: str) -> Choice:
    assert made.tile is not None and made.cost is not None
    return Choice(made.lowering, made.tile, made.cost, why, cast(ScheduleKnobs, point.schedule), point)


def _require_knobs(task: Task, point: Point, machine: AnyMachine) -> None:
    """ValueError for a knob that no kernel of the point has: `schedule_func` leaves it to the others, so that a name
    that was misspelt would go unseen."""
    if not point.schedule:
        return
    functions = unscheduled(point.configured(), task.problem, task.epilogue, point.tile, machine)
    known = sorted({name for func in functions for name in knob_space(func, machine)})
    for name, _ in point.schedule:
        if name not in known:
            raise ValueError(f"no kernel here has the knob {name!r}; the knobs are {', '.join(known) or 'none'}")


def _other(found: Found) -> str:
    return "" if found.exact else ", as measured with another epilogue"


def _tuning(verdict: Verdict, found: Found) -> dict[str, Any]:
    return {
        "kept": verdict.kept,
        "ratio": verdict.ratio,
        "seconds": verdict.seconds,
        "default_seconds": verdict.default_seconds,
        "spread": verdict.spread,
        "exact": found.exact,
        "log": found.place,
    }


def coverage(chosen: Mapping[str, Choice], policy: Policy, tuned: Tuned | None) -> dict[str, Any]:
    """How many layers the log settled: {layers, tuned, kept (of them, as the default), planned, model, logs, unused}.

    `logs` names the places that were used, or else those that were looked into; `unused` counts by reason the records
    that were made for something else.
    """
    planned = [name for name in chosen if policy.holds(name)]
    by_log = [choice.tuning for choice in chosen.values() if choice.tuning is not None]
    places = dict.fromkeys(tuning["log"] for tuning in by_log)
    return {
        "layers": len(chosen),
        "tuned": len(by_log),
        "kept": sum(tuning["kept"] for tuning in by_log),
        "planned": len(planned),
        "model": len(chosen) - len(by_log) - len(planned),
        "logs": None if tuned is None else list(places),
        "unused": {} if tuned is None else dict(tuned.unused()),
    }


def require_covered(chosen: Mapping[str, Choice], policy: Policy, tuned: Tuned | None) -> None:
    """InputError that names the layers which neither the log nor a plan settles."""
    missing = [name for name, choice in chosen.items() if choice.tuning is None and not policy.holds(name)]
    if not missing:
        return
    named = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
    places = [] if tuned is None else [source.name for source in tuned.sources]
    looked = (
        "logs are switched off" if tuned is None else f"looked into {', '.join(places) or 'no log for this target'}"
    )
    unused = "" if tuned is None or not tuned.unused() else f"; {_unused(tuned)}"
    raise InputError(
        f"frozen, but no record covers {len(missing)} of {len(chosen)} layers: {named} ({looked}{unused}); run "
        "`gemmify tune MODEL` for this target, or compile without --frozen"
    )


def _unused(tuned: Tuned) -> str:
    reason, count = max(tuned.unused().items(), key=lambda item: (item[1], item[0]))
    return f"{sum(tuned.unused().values())} records are for something else, most ({count}) for {reason}"


def log_hash(chosen: Iterable[Choice]) -> str | None:
    """A hash of the records that these choices rest on, in whatever order and file they lie; None without any."""
    used = {record for choice in chosen for record in choice.records}
    return hashlib.sha256(b"".join(sorted(map(encode, used)))).hexdigest()[:16] if used else None
