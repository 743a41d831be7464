"""One point of the tuning space: which lowering, with which sizes of its own, register tile and schedule knobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowering import Lowering, Tile, catalogue

Value = int | str | bool | tuple[int, ...]
Knobs = tuple[tuple[str, Value], ...]
"""Sorted (name, value) pairs: hashable, unlike a dict."""


def knobs(values: Mapping[str, Value]) -> Knobs:
    """The knobs of a mapping, in the order of their names."""
    return tuple(sorted(values.items()))


@dataclass(frozen=True)
class Point:
    """`lowering` is a key; `sizes` holds the sizes that the lowering leaves free (`Lowering.choices`), `schedule` the
    knobs of `schedules.knob_space`; a name that is missing takes its default."""

    lowering: str
    tile: Tile
    sizes: Knobs = ()
    schedule: Knobs = ()

    def configured(self) -> Lowering:
        """The lowering with `sizes` applied; ValueError for a key or a size that it does not know."""
        known = catalogue()
        if self.lowering not in known:
            raise ValueError(f"lowering {self.lowering!r} is not known")
        return known[self.lowering].configured(**dict(self.sizes))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: {"lowering", "tile": [mr, nr], "sizes": {...}, "schedule": {...}}."""
        return {
            "lowering": self.lowering,
            "tile": [self.tile.mr, self.tile.nr],
            "sizes": _plain(self.sizes),
            "schedule": _plain(self.schedule),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Point:
        """The point that `to_dict` wrote; ValueError where the data makes none."""
        try:
            mr, nr = data["tile"]
            sizes, schedule = (knobs({str(k): _value(v) for k, v in data[n].items()}) for n in ("sizes", "schedule"))
            if any(isinstance(side, bool) or not isinstance(side, int) for side in (mr, nr)):
                raise ValueError(f"a tile is two whole numbers, found {data['tile']!r}")
            return cls(str(data["lowering"]), Tile(mr, nr), sizes, schedule)
        except KeyError as err:
            raise ValueError(f"a point needs {err.args[0]!r}") from err
        except (TypeError, AttributeError) as err:
            raise ValueError(f"not a point: {err}") from err

    @property
    def title(self) -> str:
        """A short text for tables: `winograd-4 8x48 block=7,7 row_block=4`."""
        sides = [
            f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in (*self.sizes, *self.schedule)
        ]
        return " ".join([self.lowering, f"{self.tile.mr}x{self.tile.nr}", *sides])


def _plain(pairs: Knobs) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


def _value(value: Any) -> Value:
    if isinstance(value, list):
        if any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise TypeError(f"a knob's list holds whole numbers, found {value!r}")
        return tuple(value)
    if not isinstance(value, int | str):
        raise TypeError(f"a knob is a whole number, a text or a list of numbers, found {value!r}")
    return value
