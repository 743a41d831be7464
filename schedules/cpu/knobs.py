"""The knobs of the schedules: what is free in a function before it is scheduled.

| knob | values | where | meaning |
| --- | --- | --- | --- |
| `row_block` | divisors of the rows | GEMM, Winograd with its input ahead | rows that meet a panel before the next |
| `panel_block` | divisors of the panels | as `row_block` | panels that all rows meet before the others |
| `k_unroll` | 1, 2, 4, 8, where it divides | every GEMM | steps of the innermost reduction that are written out |
| `prefetch` | bytes, 0 for none | B an argument, larger than an L1 | how far ahead the panel of B is asked for |

A row is a step of the GEMM's outer axes (a row of the image), or a register tile where there is one such step, or a
block of tiles of Winograd. `row_block` and `panel_block` make the loop order: see `gemm_knobs.py`. Copies, chains
without a GEMM, sweeps, shifted sums and all that is no GEMM have nothing free here.

What the space holds is pruned by the machine: a block must fit into the L2, unrolled code into the decoder's cache.
What a schedule accepts is wider, every value that the extents allow, so that a record of another machine can be a seed.
"""

from __future__ import annotations

from tvm.s_tir import SBlock
from tvm.tirx import PrimFunc

from ..machine import Machine
from .blocked import COPY_ANNOTATION, SHARED, WHOLE, blocked_sizes
from .chain import CHAIN_ANNOTATION, ONCE_ANNOTATION
from .gemm_knobs import AXES_ANNOTATION, GemmSizes, Knobs, Space, gemm_space
from .shifted import ACCUMULATE_ANNOTATION
from .staged import staged_sizes
from .tir_tools import collect

KNOBS = ("row_block", "panel_block", "k_unroll", "prefetch")


def knob_space(func: PrimFunc, machine: Machine) -> dict[str, tuple[int | str, ...]]:
    """What the schedule of an unscheduled function leaves free on `machine`: values by name, the default first.

    {} where nothing is free. Pure and cheap: nothing is scheduled, only annotations and extents are read. Every value
    may be given to `schedule_func` together with any values of the other names.
    """
    sizes = _gemm_sizes(func, machine)
    return {} if sizes is None else gemm_space(sizes)


def require_known(knobs: Knobs) -> None:
    """ValueError for a name that no schedule has."""
    if unknown := sorted(set(knobs) - set(KNOBS)):
        raise ValueError(f"no schedule has a knob {unknown[0]!r}; the knobs are {', '.join(KNOBS)}")


def changed(func: PrimFunc, machine: Machine, knobs: Knobs) -> list[str]:
    """The knobs of `knobs` that `func` has and that are not at their default, as `name=value`."""
    space = knob_space(func, machine) if knobs else {}
    return [f"{name}={knobs[name]}" for name, values in space.items() if knobs.get(name, values[0]) != values[0]]


def _gemm_sizes(func: PrimFunc, machine: Machine) -> GemmSizes | None:
    """The sizes of the function's GEMM as its schedule sees them; None where it has none or sums its tiles in place."""
    blocks = collect(func.body, SBlock)
    gemm = next((b for b in blocks if AXES_ANNOTATION in b.annotations), None)
    if gemm is None or any(ACCUMULATE_ANNOTATION in b.annotations for b in blocks):
        return None
    copy = next((str(b.annotations[COPY_ANNOTATION]) for b in blocks if COPY_ANNOTATION in b.annotations), WHOLE)
    if copy != WHOLE:
        return blocked_sizes(gemm, func, machine, copy == SHARED)
    chains = [b for b in blocks if CHAIN_ANNOTATION in b.annotations and ONCE_ANNOTATION not in b.annotations]
    if chains:
        return staged_sizes(gemm, func, machine, fused=len(chains) > 1)
    return GemmSizes(gemm, func, machine)


__all__ = ["KNOBS", "Knobs", "Space", "changed", "knob_space", "require_known"]
