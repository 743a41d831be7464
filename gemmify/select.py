"""Layer -> lowering: forced by the user, or the least modelled time among those that apply and fit the budgets.

The model is a bound, not a simulation: cycles of the register tiles from `schedules.cpu.tile`, the reading of the
weights, and the bytes that a lowering moves beyond its input and output. `direct` always remains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any, Literal

from lowering import ConvProblem, Lowering, LoweringCost, Problem, Reason, Tile, catalogue
from lowering.base import activation_shape, output_shape
from lowering.problem import accumulator
from schedules import AnyMachine, Gpu
from schedules.cpu.tile import modelled_cycles

from .accuracy import DEFAULT_MAX_ERROR, expected_error
from .errors import InputError
from .gpu_model import gpu_time
from .kernels import ScheduleKnobs, multiplied_in, on_machine, tile_for, tile_request, too_large
from .policy import Policy, make_policy
from .report import size
from .tuning.point import Point, knobs

if TYPE_CHECKING:
    from .tuning.record import Record

__all__ = ["Candidate", "Choice", "Policy", "choose", "consider", "make_policy", "modelled_time", "suitable"]

NAMED = 4
"""How many lowerings a refusal names as ones that would work."""


@dataclass(frozen=True)
class Candidate:
    """One lowering of one layer: why it is out (`reason`), and where it applies its tile, its cost, its modelled cycles
    (on a GPU nanoseconds) and its expected error relative to the largest output. One above a bound has a reason and a
    cost, and `exceeds` says which bound it is."""

    lowering: Lowering
    reason: Reason | None
    tile: Tile | None = None
    cost: LoweringCost | None = None
    cycles: float = float("inf")
    error: float = float("inf")
    exceeds: Literal["workspace", "error"] | None = None

    @property
    def key(self) -> str:
        return self.lowering.key


@dataclass(frozen=True)
class Choice:
    """The lowering of one layer, with its free sizes fixed, and in one clause why it was taken.

    `point` is set where a log or a plan gave more than the key, `tuning` where a log was decisive (also for keeping the
    default): {"kept", "ratio", "seconds", "default_seconds", "spread", "exact", "log"}, see `tuning.choice`; `records`
    are those that this rests on.
    """

    lowering: Lowering
    tile: Tile
    cost: LoweringCost
    why: str
    schedule: ScheduleKnobs = ()
    point: Point | None = None
    tuning: dict[str, Any] | None = None
    records: tuple[Record, ...] = ()

    def as_point(self) -> Point:
        """The point of the tuning space that this choice is."""
        return Point(self.lowering.key, self.tile, self.lowering.sizes, knobs(dict(self.schedule)))


def consider(
    problem: Problem, machine: AnyMachine, max_workspace: int | None = None, max_error: float | None = None
) -> list[Candidate]:
    """Every lowering of the catalogue for one layer, in the catalogue's order; those above a bound have a reason."""
    found = [candidate_of(lowering, problem, machine) for lowering in catalogue().values()]
    limit = error_bound(found) if max_error is None else max_error
    return [bounded(candidate, machine, max_workspace, limit) for candidate in found]


def candidate_of(lowering: Lowering, problem: Problem, machine: AnyMachine, tile: Tile | None = None) -> Candidate:
    """`lowering`, its sizes as they are configured, for `problem`; `tile` None takes the default one."""
    problem = on_machine(problem, machine)
    if (reason := lowering.applicable(problem)) is not None:
        return Candidate(lowering, reason)
    tile = tile or tile_for(lowering, problem, machine)
    cost = lowering.cost(problem, tile)
    if (reason := too_large(lowering, problem, cost)) is not None:
        return Candidate(lowering, reason)
    cycles = modelled_time(lowering, problem, machine, tile, cost)
    multiplied = multiplied_in(lowering, problem.dtype, machine)
    return Candidate(lowering, None, tile, cost, cycles, expected_error(cost, problem.dtype, multiplied))


def error_bound(candidates: list[Candidate]) -> float:
    """The bound on the error where the user gave none: DEFAULT_MAX_ERROR, or, in a dtype that is too coarse for it,
    twice the least error of all, so that something always remains."""
    return max(DEFAULT_MAX_ERROR, 2 * min(c.error for c in candidates))


def bounded(candidate: Candidate, machine: AnyMachine, max_workspace: int | None, max_error: float) -> Candidate:
    """The candidate, with a reason where it needs more than is allowed."""
    if candidate.cost is None:
        return candidate
    scratch = candidate.cost.scratch(machine.cores)
    if max_workspace is not None and scratch > max_workspace:
        text = f"needs {scratch} bytes of workspace, the bound is {max_workspace}"
        return replace(candidate, reason=Reason(text), exceeds="workspace")
    if candidate.error > max_error:
        text = f"has an expected error of {candidate.error:.1e} of the largest output, the bound is {max_error:.1e}"
        return replace(candidate, reason=Reason(text), exceeds="error")
    return candidate


def modelled_time(lowering: Lowering, problem: Problem, machine: AnyMachine, tile: Tile, cost: LoweringCost) -> float:
    """Modelled cycles of the layer with every core at work; on a GPU its modelled nanoseconds (`gpu_model`).

    The GEMM overlaps with reading its weights from memory (a network's weights rarely fit a cache together) as far as
    the machine does that, and with reading them again from the shared cache. Transforms and workspaces (written once,
    read once, in the shared cache) come on top.
    """
    if isinstance(machine, Gpu):
        return gpu_time(lowering, on_machine(problem, machine), machine, cost)
    gemm = modelled_cycles(tile_request(lowering, problem), machine, tile.mr, tile.nr) * cost.read_factor
    if cost.tasks is not None:
        # Each thread takes an equal share of whole tasks: the slowest decides.
        gemm *= ceil(cost.tasks / machine.cores) * machine.cores / cost.tasks
    streams, again = machine.streams, 0.0
    weights = cost.weight_bytes / streams.memory
    if cost.weight_bytes > machine.l3_bytes:
        weights *= cost.weight_reads
    elif cost.weight_bytes > machine.l2_bytes // 2:
        # Once more from the shared cache for each block; smaller ones stay in the L2, as the tile's model assumes.
        again = cost.weight_bytes * (cost.weight_reads - 1) / streams.shared
    transforms = cost.extra_flops / machine.lanes(accumulator(problem.dtype))
    moved = 2 * cost.workspace_bytes
    if lowering.layout == "NCHW" and isinstance(problem, ConvProblem):
        # The network's activations are channels last: input and output are converted, each read and written.
        moved += 2 * problem.element * (prod(activation_shape(problem)) + prod(output_shape(problem)))
    workspace = moved / streams.shared
    busy = max(gemm, again) + min(gemm, again) / 4
    return (busy + weights - streams.overlap * min(busy, weights) + transforms + workspace) / machine.cores


def choose(layer: str, problem: Problem, machine: AnyMachine, policy: Policy) -> Choice:
    """The lowering of `layer` under `policy`; raises InputError for a strict key that does not apply, and where no
    lowering keeps within the bounds."""
    return pick(layer, consider(problem, machine, policy.max_workspace, policy.max_error), machine, policy)


def pick(layer: str, candidates: list[Candidate], machine: AnyMachine, policy: Policy) -> Choice:
    """`choose` among the candidates that `consider` found under the same policy."""
    usable = by_time(candidates)
    if not usable:
        raise InputError(f"layer {layer}: {nothing_fits(candidates, policy)}")
    best, key = usable[0], policy.key_for(layer)
    if key == "auto":
        why = f"least modelled time of {len(usable)} that apply"
        return _choice(best, why + _removed_by_bound(candidates, best, machine))
    asked = next(c for c in candidates if c.key == key)
    if asked.reason is None:
        return _choice(asked, "as asked")
    if policy.strict:
        raise InputError(
            f"layer {layer}: {key} does not apply, it {asked.reason}; {_named(usable)}; choose one of them, or drop "
            "--strict"
        )
    return _choice(best, f"{key} does not apply: {asked.reason}; {_named(usable)}")


def by_time(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that may be taken, the least modelled time first."""
    return sorted((c for c in candidates if c.reason is None), key=lambda c: c.cycles)


def suitable(problem: Problem, machine: AnyMachine) -> str:
    """The lowerings that work for `problem`, a few, as the end of a refusal: "what works here, best first: ..."."""
    return _named(by_time(consider(problem, machine)))


def _named(usable: list[Candidate]) -> str:
    if not usable:
        return "no lowering works here"
    return f"what works here, best first: {', '.join(c.key for c in usable[:NAMED])}"


def nothing_fits(candidates: list[Candidate], policy: Policy) -> str:
    """Why no candidate remains: `direct` needs no workspace and always applies, so the error is what is too large."""
    if all(c.cost is None for c in candidates):
        return f"it is too large, even the definition {candidates[-1].reason}"
    within = [c for c in candidates if c.cost is not None and c.exceeds != "workspace"]
    best = min(within, key=lambda c: c.error)
    bound = "" if policy.max_workspace is None else f" and within {policy.max_workspace} bytes of workspace"
    return (
        f"no lowering is expected to stay below an error of {policy.max_error:.1e} of the largest output{bound}; "
        f"the most accurate is {best.key} with {best.error:.1e}; raise the bound (--max-error) above it"
    )


def _removed_by_bound(candidates: list[Candidate], best: Candidate, machine: AnyMachine) -> str:
    """Which lowering a bound took away that would have been better than `best`, as the end of a reason."""
    out = [c for c in candidates if c.exceeds is not None and c.cycles < best.cycles]
    if not out:
        return ""
    lost = min(out, key=lambda c: c.cycles)
    assert lost.cost is not None
    if lost.exceeds == "workspace":
        return f"; {lost.key} needs {size(lost.cost.scratch(machine.cores))}, above the bound"
    return f"; {lost.key} has an expected error of {lost.error:.1e}, above the bound"


def _choice(candidate: Candidate, why: str) -> Choice:
    assert candidate.tile is not None and candidate.cost is not None
    return Choice(candidate.lowering, candidate.tile, candidate.cost, why)
