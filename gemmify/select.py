"""Layer -> lowering: forced by the user, or the least modelled time among those that apply and fit the budgets.

The model is a bound, not a simulation: cycles of the register tiles from `schedules.cpu.tile`, the reading of the
weights, and the bytes that a lowering moves beyond its input and output. `direct` always remains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from lowering import LOWERINGS, ConvProblem, Lowering, LoweringCost, Problem, Reason, Tile
from lowering.base import activation_shape, output_shape
from schedules import Machine
from schedules.cpu.tile import modelled_cycles

from .errors import InputError
from .kernels import tile_for, tile_request
from .report import size
from .sizes import parse_size


@dataclass(frozen=True)
class Candidate:
    """One lowering of one layer: why it is out (`reason`), its tile, its cost and its modelled cycles where it applies
    (a lowering above the workspace bound has both)."""

    lowering: Lowering
    reason: Reason | None
    tile: Tile | None = None
    cost: LoweringCost | None = None
    cycles: float = float("inf")


@dataclass(frozen=True)
class Choice:
    """The lowering of one layer, and in one clause why it was taken."""

    lowering: Lowering
    tile: Tile
    cost: LoweringCost
    why: str


@dataclass(frozen=True)
class Policy:
    """What the user asked for: a key for every layer ("auto" picks), keys by layer name, and the budgets.

    `strict` turns a key that does not apply into InputError. `max_workspace` bounds the scratch of one layer in bytes.
    """

    default: str = "auto"
    layers: Mapping[str, str] | None = None
    strict: bool = False
    max_workspace: int | None = None

    def __post_init__(self) -> None:
        asked = [("", self.default), *((f" (of layer {name})", key) for name, key in (self.layers or {}).items())]
        for layer, key in asked:
            if key != "auto" and key not in LOWERINGS:
                raise InputError(f"lowering {key!r}{layer} is not known; choose auto or one of {', '.join(LOWERINGS)}")
        if self.max_workspace is not None and self.max_workspace < 0:
            raise InputError(f"the workspace bound must be at least 0 bytes, got {self.max_workspace}")

    def key_for(self, layer: str) -> str:
        """The key asked for this layer."""
        return (self.layers or {}).get(layer, self.default)


def make_policy(lowering: Any, strict: bool, max_workspace: int | str | None) -> Policy:
    """A Policy from what `compile(lowering=...)` takes: "auto", a key, or a mapping of layer name to key, in which "*"
    stands for the layers that it does not name; `max_workspace` is in bytes, or text such as "64KiB"."""
    try:
        bound = None if max_workspace is None else parse_size(max_workspace)
    except InputError as err:
        raise InputError(f"max_workspace: {err}") from err
    if isinstance(lowering, str):
        return Policy(lowering, None, strict, bound)
    if isinstance(lowering, Mapping):
        layers = {str(k): str(v) for k, v in lowering.items()}
        return Policy(layers.pop("*", "auto"), layers, strict, bound)
    raise InputError(f'lowering must be "auto", a key or {{layer: key}}, got {type(lowering).__name__}')


def consider(problem: Problem, machine: Machine, max_workspace: int | None = None) -> list[Candidate]:
    """Every lowering of the catalogue for one layer, in the catalogue's order."""
    return [_candidate(lowering, problem, machine, max_workspace) for lowering in LOWERINGS.values()]


def _candidate(lowering: Lowering, problem: Problem, machine: Machine, max_workspace: int | None) -> Candidate:
    if (reason := lowering.applicable(problem)) is not None:
        return Candidate(lowering, reason)
    tile = tile_for(lowering, problem, machine)
    cost = lowering.cost(problem, tile)
    scratch, over = cost.scratch(machine.cores), None
    if max_workspace is not None and scratch > max_workspace:
        over = Reason(f"needs {scratch} bytes of workspace, the bound is {max_workspace}")
    return Candidate(lowering, over, tile, cost, modelled_time(lowering, problem, machine, tile, cost))


def modelled_time(lowering: Lowering, problem: Problem, machine: Machine, tile: Tile, cost: LoweringCost) -> float:
    """Modelled cycles of the layer with every core at work.

    The GEMM overlaps with reading its weights, which come from memory (a network's weights rarely fit a cache
    together); transforms and workspaces (written once, read once, from the shared cache) come on top.
    """
    gemm = modelled_cycles(tile_request(lowering, problem), machine, tile.mr, tile.nr) * cost.read_factor
    if cost.tasks is not None:
        # Each thread takes an equal share of whole tasks: the slowest decides.
        gemm *= ceil(cost.tasks / machine.cores) * machine.cores / cost.tasks
    cached = cost.weight_bytes <= machine.l3_bytes
    again = machine.shared_bytes_per_cycle if cached else machine.memory_bytes_per_cycle
    weights = cost.weight_bytes * (1 / machine.memory_bytes_per_cycle + (cost.weight_reads - 1) / again)
    transforms = cost.extra_flops / machine.lanes(problem.dtype)
    moved = 2 * cost.workspace_bytes
    if lowering.layout == "NCHW" and isinstance(problem, ConvProblem):
        # The network's activations are channels last: input and output are converted, each read and written.
        moved += 2 * problem.element * (prod(activation_shape(problem)) + prod(output_shape(problem)))
    workspace = moved / machine.shared_bytes_per_cycle
    return (max(gemm, weights) + min(gemm, weights) / 4 + transforms + workspace) / machine.cores


def choose(layer: str, problem: Problem, machine: Machine, policy: Policy) -> Choice:
    """The lowering of `layer` under `policy`; raises InputError for a strict key that does not apply."""
    candidates = consider(problem, machine, policy.max_workspace)
    usable = [c for c in candidates if c.reason is None]
    best = min(usable, key=lambda c: c.cycles)
    key = policy.key_for(layer)
    if key == "auto":
        why = f"least modelled time of {len(usable)} that apply"
        return _choice(best, why + _removed_by_bound(candidates, best, machine))
    asked = next(c for c in candidates if c.lowering.key == key)
    if asked.reason is None:
        return _choice(asked, "as asked")
    if policy.strict:
        raise InputError(
            f"layer {layer}: {key} does not apply, it {asked.reason}; "
            f"choose one of {', '.join(c.lowering.key for c in usable)}, or drop --strict"
        )
    return _choice(best, f"{key} does not apply: {asked.reason}")


def _removed_by_bound(candidates: list[Candidate], best: Candidate, machine: Machine) -> str:
    """Which lowering the workspace bound took away that would have been better than `best`, as the end of a reason."""
    out = [c for c in candidates if c.reason is not None and c.cost is not None and c.cycles < best.cycles]
    if not out:
        return ""
    lost = min(out, key=lambda c: c.cycles)
    assert lost.cost is not None
    return f"; {lost.lowering.key} needs {size(lost.cost.scratch(machine.cores))}, above the bound"


def _choice(candidate: Candidate, why: str) -> Choice:
    assert candidate.tile is not None and candidate.cost is not None
    return Choice(candidate.lowering, candidate.tile, candidate.cost, why)
