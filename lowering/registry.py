"""Lowerings from outside the package: `register`, and the entry points of installed packages.

    lowering.register(MyForm())                     # from now on selection, plans and the command line know its key

A package offers its lowerings without a call, in its `pyproject.toml`:

    [project.entry-points."gemmify.lowerings"]
    my-form = "my_package:MyForm"                   # a subclass of Lowering, or an instance
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

from .base import Lowering

ENTRY_POINTS = "gemmify.lowerings"
KEY = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
RESERVED = ("auto", "plain")
"""Words that stand for a choice among lowerings where a key is expected."""
ATTRIBUTES = ("key", "summary", "gemm_formula", "workspace_formula", "source")
LAYOUTS = ("NHWC", "NCHW")


class Registry:
    """Adds lowerings to a catalogue: `table` maps keys to lowerings, and its last one always applies."""

    def __init__(self, table: dict[str, Lowering]) -> None:
        self.table = table
        self._built_in = frozenset(table)
        self._loaded = False

    def register(self, lowering: Lowering) -> Lowering:
        """Put `lowering` into the catalogue, before `direct`, and return it.

        Raises TypeError for what is no instance of Lowering, and ValueError for a key that is taken, reserved or not
        written in lower case with dashes ("my-form"), and for an attribute that is missing.
        """
        check_attributes(lowering)
        if lowering.key in self.table:
            taken = type(self.table[lowering.key])
            raise ValueError(
                f"the key {lowering.key!r} is taken by {taken.__module__}.{taken.__name__}; choose another key"
            )
        last, fallback = self.table.popitem()
        self.table[lowering.key] = lowering
        self.table[last] = fallback
        return lowering

    def unregister(self, key: str) -> None:
        """Take a registered lowering out again; ValueError for a key that `register` did not put there."""
        if key in self._built_in:
            raise ValueError(f"{key!r} belongs to the catalogue itself; only registered lowerings can be taken out")
        if self.table.pop(key, None) is None:
            raise ValueError(f"no lowering of key {key!r} is registered")

    @contextmanager
    def registered(self, *lowerings: Lowering) -> Iterator[None]:
        """The lowerings are in the catalogue within the block, and gone after it."""
        done: list[str] = []
        try:
            for lowering in lowerings:
                done.append(self.register(lowering).key)
            yield
        finally:
            for key in done:
                self.table.pop(key, None)

    def catalogue(self) -> dict[str, Lowering]:
        """The catalogue with what installed packages offer (loaded at the first call): the same dict every time.

        An entry point that cannot be loaded or registered is left out with a warning that names it.
        """
        if not self._loaded:
            self._loaded = True
            for entry in entry_points(group=ENTRY_POINTS):
                try:
                    offered = entry.load()
                    self.register(offered() if isinstance(offered, type) else offered)
                except Exception as err:
                    said = f"{type(err).__name__}: {err}"
                    text = f"the lowering {entry.name!r} ({entry.value}) of an installed package is left out: {said}"
                    warnings.warn(text, RuntimeWarning, stacklevel=2)
        return self.table


def check_attributes(lowering: Lowering) -> None:
    """TypeError or ValueError where `lowering` lacks what the catalogue shows of it."""
    if not isinstance(lowering, Lowering):
        is_class = isinstance(lowering, type) and issubclass(lowering, Lowering)
        hint = f"give an instance: {lowering.__name__}()" if is_class else "derive it from lowering.Lowering"
        raise TypeError(f"{lowering!r} is not a lowering; {hint}")
    name = type(lowering).__name__
    for attribute in ATTRIBUTES:
        value = getattr(lowering, attribute, None)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} needs the attribute {attribute}, a text that is not empty; found {value!r}")
    if not KEY.fullmatch(lowering.key) or lowering.key in RESERVED:
        allowed = f"lower-case words and numbers joined by dashes, such as 'my-form', and not {' or '.join(RESERVED)}"
        raise ValueError(f"the key of {name} must be {allowed}; found {lowering.key!r}")
    if lowering.layout not in LAYOUTS:
        raise ValueError(f"{name} must have the layout {' or '.join(LAYOUTS)}, found {lowering.layout!r}")
