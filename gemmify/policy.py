"""What a user may ask of the choice of lowerings: keys, and bounds on memory and on error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowering import catalogue

from .accuracy import parse_error
from .errors import InputError
from .sizes import parse_size
from .tuning.point import Point


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """The known keys that are close to a mistyped one, as the middle of a refusal; nothing where none is."""
    close = difflib.get_close_matches(str(key).lower(), list(known), n=2, cutoff=0.7)
    return f"did you mean {' or '.join(close)}? " if close else ""


@dataclass(frozen=True)
class Policy:
    """What the user asked for: a key for every layer ("auto" picks), keys by layer name, and the budgets.

    `strict` turns a key that does not apply into InputError. `max_workspace` bounds the scratch of one layer in bytes,
    `max_error` its expected error relative to the largest output (None: see `error_bound`). `origin` is where the
    keys come from, for errors.

    `held` says that the keys of `layers` come from a plan: they mean the key's own default, whatever a log says;
    `points` gives layers of the plan that are held to one point of the tuning space, which is also in `layers`.
    """

    default: str = "auto"
    layers: Mapping[str, str] | None = None
    strict: bool = False
    max_workspace: int | None = None
    max_error: float | None = None
    origin: str | None = None
    held: bool = False
    points: Mapping[str, Point] = field(default_factory=dict)

    def __post_init__(self) -> None:
        asked = [("", self.default), *((f" (of layer {name})", key) for name, key in (self.layers or {}).items())]
        for layer, key in asked:
            if key != "auto" and key not in catalogue():
                known = ", ".join(catalogue())
                hint = did_you_mean(key, catalogue())
                raise InputError(f"lowering {key!r}{layer} is not known; {hint}choose auto or one of {known}")
        if self.max_workspace is not None and self.max_workspace < 0:
            raise InputError(f"the workspace bound must be at least 0 bytes, got {self.max_workspace}")

    def key_for(self, layer: str) -> str:
        """The key asked for this layer."""
        return (self.layers or {}).get(layer, self.default)

    def holds(self, layer: str) -> bool:
        """Whether a plan settles this layer, so that no log is asked."""
        return self.held and self.key_for(layer) != "auto"


def make_policy(
    lowering: Any, strict: bool, max_workspace: int | str | None, max_error: float | str | None = None
) -> Policy:
    """A Policy from what `compile(lowering=...)` takes: "auto", a key, or a mapping of layer name to key, in which "*"
    stands for the layers that it does not name; `max_workspace` is in bytes, or text such as "64KiB"; `max_error` is
    relative to the largest output."""
    try:
        bound = None if max_workspace is None else parse_size(max_workspace)
    except InputError as err:
        raise InputError(f"max_workspace: {err}") from err
    try:
        error = None if max_error is None else parse_error(max_error)
    except InputError as err:
        raise InputError(f"max_error: {err}") from err
    if isinstance(lowering, str):
        return Policy(lowering, None, strict, bound, error)
    if isinstance(lowering, Mapping):
        layers = {str(k): str(v) for k, v in lowering.items()}
        return Policy(layers.pop("*", "auto"), layers, strict, bound, error)
    raise InputError(f'lowering must be "auto", a key or {{layer: key}}, got {type(lowering).__name__}')
