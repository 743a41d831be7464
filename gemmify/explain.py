"""Why each layer has its lowering: every candidate of the catalogue with its cost, and what speaks against it.

All of it comes from formulas and from the logs; nothing is compiled. The times are those of the model of cost that
`auto` picks by, in cycles of the target's core with all its cores at work: a bound to compare candidates by, no
prediction; what a log has measured stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from statistics import median
from typing import Any

from lowering import DenseProblem
from lowering.base import layer_kind
from lowering.graph.epilogue import LayerSite
from schedules import AnyMachine, Gpu, machine_of

from .dtypes import require_dtype
from .frontend import import_model
from .kernels import layer_kernels
from .lower import layer_sites, unknown_layer, within_bound
from .pipeline import lowering_graph, resolve_target, threads_for, user_policy
from .plan import Plan
from .report import ratio as text_of
from .select import Candidate, Choice, by_time, candidate_of, error_bound, nothing_fits
from .threads import check_threads
from .tuning.choice import Chooser
from .tuning.task import Task
from .tuning.use import Tuned, open_logs

CLOSE = 1.005
"""Modelled cycles within this factor are called equal."""


def explain_model(
    model: Any,
    *,
    layer: str | None = None,
    target: Any = "llvm",
    lowering: Any = "auto",
    strict: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    plan: Plan | str | PathLike[str] | None = None,
    threads: int | None = None,
    max_workspace: int | str | None = None,
    max_error: float | str | None = None,
    logs: Any = None,
    frozen: bool = False,
) -> dict[str, Any]:
    """Every candidate of every layer of `model` (or of `layer`), as `compile_model` weighs it with the same arguments.

    Returns {model, threads, unit (of what is modelled: "cycles", on a GPU "ns"), max_workspace, max_error, tuning (see
    `tuning.choice.coverage`), layers}. Each entry of `layers` stands for all layers that pose the same problem and were
    answered alike: {names, op, problem, macs, lowering, why, max_error, point, tuned, candidates}; a candidate is {key,
    verdict, and where it applies gemms, macs, workspace_bytes (of `threads`), weight_bytes, cycles, ratio (to the
    chosen one's), error, measured (seconds of its fastest trial in the logs, or None)}. `point` is what a log or a plan
    gives beyond the key, and the chosen candidate is then the configured one. `verdict` is "chosen" or why not. Where
    no lowering keeps within the bounds, `lowering` and every `ratio` are None, and `why` says what would fit. Raises
    InputError for a layer that the model does not have, and otherwise as `compile_model` does.
    """
    resolved = resolve_target(target)
    machine = machine_of(resolved)
    policy = user_policy(lowering, strict, max_workspace, max_error, plan)
    tuned = open_logs(resolved, threads_for(resolved, threads), logs)
    chooser, choices = Chooser(machine, policy, tuned, frozen), dict[str, Choice]()
    count = threads_for(resolved, None if threads is None else check_threads(threads))
    imported = import_model(model, shapes, dtype)
    sites = list(layer_sites(lowering_graph(imported.mod), policy).values())
    if layer is not None:
        wanted = [site for site in sites if site.name == layer]
        if not wanted:
            raise unknown_layer(layer, [site.name for site in sites])
        sites = wanted
    groups: dict[Any, dict[str, Any]] = {}
    for site in sites:
        require_dtype(f"layer {site.name}", site.problem.dtype, machine)
        candidates = chooser.candidates(site.problem)
        if by_time(candidates):
            choice = chooser.choose(site.name, Task(site.problem, site.epilogue), candidates)
            choice = within_bound(site, choice, chooser)
            choices[site.name], why = choice, choice.why
            taken, candidates = _placed(choice, candidates, site, machine)
        else:
            choice, taken, why = None, None, f"nothing fits: {nothing_fits(candidates, policy)}"
        key = (site.problem, choice and choice.as_point(), why)
        if key not in groups:
            bound = error_bound(candidates) if policy.max_error is None else policy.max_error
            settled = "the log decides" if choice is not None and choice.tuning else "not what was asked for"
            groups[key] = {"names": []} | _explain(site, candidates, taken, count, settled)
            point = None if choice is None or choice.point is None else choice.point.to_dict()
            measured = _measured(tuned, Task(site.problem, site.epilogue))
            for row in groups[key]["candidates"]:
                if "gemms" in row:
                    row["measured"] = measured.get(row["key"])
            groups[key] |= {"why": why, "max_error": bound, "point": point, "tuned": choice and choice.tuning}
        groups[key]["names"].append(site.name)
    chooser.settle(choices)
    return {
        "model": imported.name,
        "threads": count,
        "unit": "ns" if isinstance(machine, Gpu) else "cycles",
        "max_workspace": policy.max_workspace,
        "max_error": policy.max_error,
        "tuning": chooser.coverage(choices),
        "layers": list(groups.values()),
    }


def _measured(tuned: Tuned | None, task: Task) -> dict[str, float]:
    """Seconds of the fastest trial of each lowering that the logs hold for `task`, caches cold, the layer alone."""
    found = next(iter(tuned.find(task)), None) if tuned is not None else None
    best: dict[str, float] = {}
    for record in found.records if found is not None else ():
        if record.ok and record.cold and record.stage != "network":
            key = record.point.lowering
            best[key] = min(median(record.cold), best.get(key, float("inf")))
    return best


def _placed(
    choice: Choice, candidates: list[Candidate], site: LayerSite, machine: AnyMachine
) -> tuple[Candidate, list[Candidate]]:
    """The chosen candidate, and all of them with it in the place of its lowering with other sizes. On a GPU its kernels
    are made, which alone know what they need between their launches."""
    if choice.point is None and not isinstance(machine, Gpu):
        return next(c for c in candidates if c.key == choice.lowering.key), candidates
    taken = candidate_of(choice.lowering, site.problem, machine, choice.tile)
    if isinstance(machine, Gpu):
        made = layer_kernels(choice.lowering, site.problem, machine, site.epilogue, choice.tile, choice.schedule)
        taken = replace(taken, cost=made.cost)
    return taken, [taken if c.key == taken.key else c for c in candidates]


def _explain(
    site: LayerSite, candidates: list[Candidate], taken: Candidate | None, threads: int, settled: str
) -> dict[str, Any]:
    problem = site.problem
    return {
        "op": layer_kind(problem) + ("" if isinstance(problem, DenseProblem) else f" {problem.dims}-D"),
        "problem": asdict(problem),
        "macs": problem.macs,
        "lowering": None if taken is None else taken.key,
        "candidates": [_candidate(c, taken, threads, settled) for c in _ordered(candidates, taken)],
    }


def _ordered(candidates: list[Candidate], taken: Candidate | None) -> list[Candidate]:
    """The chosen one, what might have been chosen by modelled time, what a bound excludes, what does not apply."""

    def rank(candidate: Candidate) -> tuple[int, float]:
        if candidate is taken:
            return 0, 0.0
        if candidate.cost is None:
            return 3, 0.0
        return 1 if candidate.exceeds is None else 2, candidate.cycles

    return sorted(candidates, key=rank)


def _candidate(candidate: Candidate, taken: Candidate | None, threads: int, settled: str) -> dict[str, Any]:
    row: dict[str, Any] = {"key": candidate.key, "verdict": verdict(candidate, taken, settled)}
    if candidate.cost is None:
        return row
    cost = candidate.cost
    return row | {
        "gemms": [asdict(gemm) for gemm in cost.gemms],
        "macs": cost.macs,
        "workspace_bytes": cost.scratch(threads),
        "weight_bytes": cost.weight_bytes,
        "cycles": candidate.cycles,
        "ratio": None if taken is None else candidate.cycles / taken.cycles,
        "error": candidate.error,
    }


def verdict(candidate: Candidate, taken: Candidate | None, settled: str = "not what was asked for") -> str:
    """ "chosen", or in one clause why another was taken; `settled` says why not one that is modelled faster."""
    if candidate is taken:
        return "chosen"
    if candidate.reason is not None or taken is None:
        return str(candidate.reason)
    ratio = candidate.cycles / taken.cycles
    if ratio > CLOSE:
        return f"modelled {text_of(ratio)} x slower"
    if ratio < 1 / CLOSE:
        return f"modelled {text_of(1 / ratio)} x faster, {settled}"
    return "modelled as fast"
