"""The free sizes of a lowering: what may be fixed in it beside the register tile, checked in one place.

`Lowering.choices` offers values by name, a tuner or a caller fixes some; here stands what is right about them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Size = int | str | bool | tuple[int, ...]
"""A free size of a lowering: a number, a word, or one number a dimension."""
Sizes = tuple[tuple[str, Size], ...]
"""Sorted (name, value) pairs: hashable, unlike a dict."""

SHOWN = 12
"""Values that a refusal names."""


def named_sizes(key: str, names: Sequence[str], sizes: Mapping[str, Size]) -> Sizes:
    """`sizes` in the order of their names, lists (from a file) as tuples; ValueError for a name not in `names`."""
    for name in sizes:
        if name not in names:
            free = f"it has {', '.join(names)}" if names else "it has none"
            raise ValueError(f"{key} has no free size {name!r}; {free}")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    return tuple(sorted(plain.items()))


def misfit(sizes: Sizes, free: Mapping[str, Sequence[Size]]) -> str | None:
    """What is wrong with `sizes` where `free` is offered, as a clause behind the lowering's key; None for nothing.

    A value must be one of those offered and of the same kind: True is not 1.
    """
    for name, value in sizes:
        if name not in free:
            others = f"what is free there: {', '.join(free)}" if free else "nothing is free there"
            return f"has no choice of {name} on this layer; {others}"
        if not any(type(value) is type(offer) and value == offer for offer in free[name]):
            return f"needs {name} to be {_one_of(free[name])} on this layer, got {value!r}"
    return None


def _one_of(offers: Sequence[Size]) -> str:
    shown = ", ".join(map(repr, offers[:SHOWN]))
    return f"one of {shown}" + (f" ... ({len(offers)} in all)" if len(offers) > SHOWN else "")
