"""The plan: layer -> lowering, as a readable, editable JSON file that a later compilation can be held to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .lower import LoweredLayer

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """`layers` maps each layer's name to the key of its lowering."""

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
            data = json.loads(path.read_text())
        except OSError as err:
            raise InputError(f"cannot read the plan {path}: {err.strerror or err}") from err
        except ValueError as err:
            raise InputError(f"the plan {path} is not JSON: {err}") from err
        layers = data.get("layers") if isinstance(data, dict) else None
        if not isinstance(layers, dict) or data.get("format") != FORMAT:
            raise InputError(f'the plan {path} must be {{"format": {FORMAT}, "layers": {{name: lowering}}}}')
        return cls({str(k): str(v) for k, v in layers.items()})
