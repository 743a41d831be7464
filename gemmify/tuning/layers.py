"""The tasks of one or several networks: every layer that a lowering can express, equal ones counted together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from schedules import AnyMachine

from ..dtypes import require_dtype
from ..errors import InputError
from ..frontend import import_model
from ..lower import layer_sites, unknown_layer
from ..pipeline import lowering_graph
from ..policy import Policy
from .task import Task


@dataclass
class TaskUse:
    """A task and where it occurs: (model, layer name) of each of its layers."""

    task: Task
    places: list[tuple[str, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many layers this task is."""
        return len(self.places)


@dataclass(frozen=True)
class Network:
    """A model that is tuned: its name, what it is compiled from, and the layers that were asked for."""

    name: str
    source: Any
    shapes: Mapping[str, Sequence[int]] | None
    dtype: str | None
    layers: tuple[tuple[str, Task], ...]


def network(
    model: Any,
    shapes: Mapping[str, Sequence[int]] | None,
    machine: AnyMachine,
    names: Sequence[str] = (),
    dtype: str | None = None,
) -> Network:
    """The layers of `model` as tasks, in the order in which they run; only those whose name fits one of the patterns
    `names`, where any is given. Raises InputError for a pattern that fits none, and as `import_model`."""
    imported = import_model(model, shapes, dtype)
    sites = list(layer_sites(lowering_graph(imported.mod), Policy()).values())
    known = [site.name for site in sites]
    for pattern in names:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise unknown_layer(pattern, known)
    found = []
    for site in sites:
        if not names or any(fnmatchcase(site.name, pattern) for pattern in names):
            require_dtype(f"layer {site.name}", site.problem.dtype, machine)
            found.append((site.name, Task(site.problem, site.epilogue)))
    if not found:
        raise InputError(f"the model {imported.name} has no convolution and no fully connected layer to tune")
    return Network(imported.name, model, shapes, dtype, tuple(found))


def gather(networks: Sequence[Network]) -> list[TaskUse]:
    """Every task once, in the order of its first layer, with all the layers that it is."""
    uses: dict[Task, TaskUse] = {}
    for net in networks:
        for name, task in net.layers:
            uses.setdefault(task, TaskUse(task)).places.append((net.name, name))
    return list(uses.values())
