"""The plan: layer -> lowering, as a readable, editable JSON file that a later compilation can be held to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .export import write_text

if TYPE_CHECKING:
    from .lower import LoweredLayer

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """`layers` maps a layer's name to the key of its lowering; a layer that is not named takes "auto"."""

    layers: dict[str, str]

    @classmethod
    def of(cls, layers: list[LoweredLayer]) -> Plan:
        """The plan that a compilation followed."""
        return cls({layer.site.name: layer.choice.lowering.key for layer in layers})

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON data."""
        return {"format": FORMAT, "layers": dict(self.layers)}

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file; InputError where it is missing or is not a plan."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as err:
            raise InputError(f"cannot read the plan {path}: {err.strerror or err}") from err
        except ValueError as err:
            raise InputError(f"the plan {path} is not JSON: {err}") from err
        layers = data.get("layers") if isinstance(data, dict) else None
        if not isinstance(layers, dict) or data.get("format") != FORMAT:
            raise InputError(f'the plan {path} must be {{"format": {FORMAT}, "layers": {{name: lowering}}}}')
        for name, key in layers.items():
            if not isinstance(key, str):
                found = json.dumps(key)[:40]
                raise InputError(f"the plan {path} must give layer {name!r} a lowering's key or auto, found {found}")
        return cls(dict(layers))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the plan as JSON, one layer a line, complete or not at all. Errors as `export.check_destination`."""
        return write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
