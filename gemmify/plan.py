"""The plan: layer -> lowering, as a readable, editable JSON file that a later compilation can be held to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .export import write_text

if TYPE_CHECKING:
    from .select import Choice
    from .tuning.point import Point

FORMAT = 1
_POINT_KEYS = ("lowering", "tile", "sizes", "schedule")


@dataclass(frozen=True)
class Plan:
    """`layers` maps a layer's name to the key of its lowering; a layer that is not named takes "auto".

    `points` holds, for some of these layers, the point of the tuning space that they are held to; the others take
    their key's default. The constructor also takes points inside `layers`, as `Point`s or as `Point.to_dict` writes
    them, and moves them. No log is asked for a layer that a plan names. Raises InputError for what is no plan.
    """

    layers: dict[str, str]
    points: dict[str, Point] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read = _read(self.layers, "a plan")
        points = {**{name: point for name, (_, point) in read.items() if point is not None}, **self.points}
        keys = {name: key for name, (key, _) in read.items()} | {name: p.lowering for name, p in points.items()}
        object.__setattr__(self, "layers", keys)
        object.__setattr__(self, "points", points)

    @classmethod
    def of(cls, chosen: Mapping[str, Choice]) -> Plan:
        """The plan that leads to these choices, by layer name, without a log: the whole point of a tuned layer, the
        bare key of any other."""
        points = {name: choice.point for name, choice in chosen.items() if choice.point is not None}
        return cls({name: choice.lowering.key for name, choice in chosen.items()}, points)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON data."""
        layers = {
            name: self.points[name].to_dict() if name in self.points else key for name, key in self.layers.items()
        }
        return {"format": FORMAT, "layers": layers}

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file; InputError where it is missing or is not a plan."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as err:
            raise InputError(f"cannot read the plan {path}: {err.strerror or err}") from err
        except (ValueError, RecursionError) as err:
            raise InputError(f"the plan {path} is not JSON: {err}") from err
        layers = data.get("layers") if isinstance(data, dict) else None
        if not isinstance(layers, dict) or data.get("format") != FORMAT:
            raise InputError(f'the plan {path} must be {{"format": {FORMAT}, "layers": {{name: lowering}}}}')
        _read(layers, f"the plan {path}")
        return cls(dict(layers))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the plan as JSON, one layer a line, complete or not at all. Errors as `export.check_destination`."""
        head, tail = f'{{\n "format": {FORMAT},\n "layers": {{', "\n }\n}\n" if self.layers else "}\n}\n"
        lines = [f"\n  {_json(name)}: {_json(value)}" for name, value in self.to_dict()["layers"].items()]
        return write_text(path, head + ",".join(lines) + tail)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _read(layers: Mapping[str, Any], whose: str) -> dict[str, tuple[str, Point | None]]:
    try:
        return {name: _layer(name, value) for name, value in layers.items()}
    except ValueError as err:
        raise InputError(f"{whose} must {err}") from err


def _layer(name: str, value: Any) -> tuple[str, Point | None]:
    """The key of one entry of a plan, and its point where it names one. ValueError with what follows "must"."""
    from .tuning.point import Point

    if isinstance(value, str):
        return value, None
    if name == "*":
        raise ValueError('give "*", the layers that it does not name, a key: a point belongs to one layer')
    if isinstance(value, Point):
        return value.lowering, value
    if not isinstance(value, Mapping):
        asked = f"give layer {name!r} a lowering's key, auto or {{{', '.join(_POINT_KEYS)}}}"
        raise ValueError(f"{asked}, found {_shown(value)}")
    if unknown := [key for key in value if key not in _POINT_KEYS]:
        raise ValueError(f"give layer {name!r} only {', '.join(_POINT_KEYS)}, found {_shown(unknown[0])}")
    for key, what in (("lowering", "the key of one"), ("tile", "[mr, nr]")):
        if key not in value:
            raise ValueError(f"give layer {name!r} a {key} too, {what}, found {_shown(value)}")
    if not isinstance(value["lowering"], str) or value["lowering"] == "auto":
        raise ValueError(f"give layer {name!r} a lowering's key for its point, found {_shown(value['lowering'])}")
    try:
        point = Point.from_dict({"sizes": {}, "schedule": {}, **value})
    except ValueError as err:
        raise ValueError(f"give layer {name!r} a point that makes sense: {err}") from err
    return point.lowering, point


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]
