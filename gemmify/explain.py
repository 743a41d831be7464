"""Why each layer has its lowering: every candidate of the catalogue with its cost, and what speaks against it.

All of it comes from formulas; nothing is built or compiled. The times are those of the model of cost that `auto` picks
by, in cycles of the target's core with all its cores at work: a bound to compare candidates by, no prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any

from lowering import DenseProblem
from lowering.base import layer_kind
from lowering.graph.epilogue import LayerSite
from schedules import Machine

from .dtypes import require_dtype
from .frontend import import_model
from .lower import layer_sites, unknown_layer
from .pipeline import lowering_graph, resolve_target, user_policy
from .plan import Plan
from .policy import Policy
from .report import ratio as text_of
from .select import Candidate, by_time, consider, error_bound, nothing_fits, pick
from .threads import check_threads

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
    plan: Plan | str | PathLike[str] | None = None,
    threads: int | None = None,
    max_workspace: int | str | None = None,
    max_error: float | str | None = None,
) -> dict[str, Any]:
    """Every candidate of every layer of `model` (or of `layer`), as `compile_model` weighs it with the same arguments.

    Returns {model, threads, max_workspace, max_error, layers}. Each entry of `layers` stands for all layers that pose
    the same problem and were answered alike: {names, op, problem, macs, lowering, why, max_error, candidates}; a
    candidate is {key, verdict, and where it applies gemms, macs, workspace_bytes (of `threads`, by default all of the
    target), weight_bytes, cycles, ratio (to the chosen one's), error}. `verdict` is "chosen" or why not. Where no
    lowering keeps within the bounds, `lowering` and every `ratio` are None, and `why` says what would fit. Raises
    InputError for a layer that the model does not have, and otherwise as `compile_model` does.
    """
    machine = Machine.from_target(resolve_target(target))
    policy = user_policy(lowering, strict, max_workspace, max_error, plan)
    count = machine.cores if threads is None else check_threads(threads)
    imported = import_model(model, shapes)
    sites = list(layer_sites(lowering_graph(imported.mod), policy).values())
    if layer is not None:
        wanted = [site for site in sites if site.name == layer]
        if not wanted:
            raise unknown_layer(layer, [site.name for site in sites])
        sites = wanted
    groups: dict[Any, dict[str, Any]] = {}
    for site in sites:
        require_dtype(f"layer {site.name}", site.problem.dtype, machine)
        candidates = consider(site.problem, machine, policy.max_workspace, policy.max_error)
        taken, why = _taken(site.name, candidates, machine, policy)
        key = (site.problem, taken and taken.key, why)
        if key not in groups:
            bound = error_bound(candidates) if policy.max_error is None else policy.max_error
            groups[key] = {"names": []} | _explain(site, candidates, taken, count)
            groups[key] |= {"why": why, "max_error": bound}
        groups[key]["names"].append(site.name)
    return {
        "model": imported.name,
        "threads": count,
        "max_workspace": policy.max_workspace,
        "max_error": policy.max_error,
        "layers": list(groups.values()),
    }


def _taken(layer: str, candidates: list[Candidate], machine: Machine, policy: Policy) -> tuple[Candidate | None, str]:
    """The candidate that is chosen and why; None, and what would fit, where nothing does."""
    if not by_time(candidates):
        return None, f"nothing fits: {nothing_fits(candidates, policy)}"
    choice = pick(layer, candidates, machine, policy)
    return next(c for c in candidates if c.lowering is choice.lowering), choice.why


def _explain(site: LayerSite, candidates: list[Candidate], taken: Candidate | None, threads: int) -> dict[str, Any]:
    problem = site.problem
    return {
        "op": layer_kind(problem) + ("" if isinstance(problem, DenseProblem) else f" {problem.dims}-D"),
        "problem": asdict(problem),
        "macs": problem.macs,
        "lowering": None if taken is None else taken.key,
        "candidates": [_candidate(c, taken, threads) for c in _ordered(candidates, taken)],
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


def _candidate(candidate: Candidate, taken: Candidate | None, threads: int) -> dict[str, Any]:
    row: dict[str, Any] = {"key": candidate.key, "verdict": verdict(candidate, taken)}
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


def verdict(candidate: Candidate, taken: Candidate | None) -> str:
    """ "chosen", or in one clause why another lowering was taken."""
    if candidate is taken:
        return "chosen"
    if candidate.reason is not None or taken is None:
        return str(candidate.reason)
    ratio = candidate.cycles / taken.cycles
    if ratio > CLOSE:
        return f"modelled {text_of(ratio)} x slower"
    if ratio < 1 / CLOSE:
        return f"modelled {text_of(1 / ratio)} x faster, not what was asked for"
    return "modelled as fast"
