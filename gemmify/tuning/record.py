"""The record of one trial: what was tried, on which machine, with which versions, and all that was measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .point import Point
from .task import Task

SPACE_VERSION = 1
"""Grows when a knob changes its meaning: a record of another version is a seed for tuning, not a choice to compile."""

OUTCOMES = ("ok", "wrong", "crash", "timeout", "memory", "build", "lost")
"""ok: measured, numbers right; wrong: numbers off; crash: its process died; timeout; memory: over the bound; build: no
code came out; lost: the device that measured it went away (never a fault of the candidate)."""

STAGES = ("trial", "final", "network")
"""trial: measured once, alone; final: measured again in turns with the default and the other finalists of `group`;
network: measured as a final, but inside the network that `group` names: `cold` then holds what the layer took there."""


@dataclass(frozen=True)
class MachineId:
    """Which machine a time was measured on, and for which code. `features` is `feature_hash` of the target's CPU
    features; `cpu` is the model as the system names it; `threads` how many threads ran the code."""

    target: str  # "llvm"
    mcpu: str
    features: str
    cpu: str
    cores: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MachineId:
        """ValueError where an entry is missing or of the wrong kind."""

        def text(name: str) -> str:
            if not isinstance(value := data.get(name), str):
                raise ValueError(f"a machine's {name} must be a text, found {value!r}")
            return value

        def count(name: str) -> int:
            if not isinstance(value := data.get(name), int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"a machine's {name} must be a whole number of at least 1, found {value!r}")
            return value

        return cls(text("target"), text("mcpu"), text("features"), text("cpu"), count("cores"), count("threads"))


@dataclass(frozen=True)
class Versions:
    """What made the code: gemmify, TVM, and the meaning of the knobs."""

    gemmify: str
    tvm: str
    space: int = SPACE_VERSION

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Versions:
        gemmify, tvm, space = data.get("gemmify"), data.get("tvm"), data.get("space")
        if not isinstance(gemmify, str) or not isinstance(tvm, str) or not isinstance(space, int):
            raise ValueError(f"versions need gemmify, tvm and space, found {dict(data)!r}")
        return cls(gemmify, tvm, space)


@dataclass(frozen=True)
class Record:
    """One trial. Times are seconds of one call of the whole layer, every one that was taken: `warm` with all operands
    in the caches, `cold` after the caches were flushed and all but the weights was read again (on a device of a tracker
    or of a bundle: the input alone), as inside a network, where the weights come from memory. `error` is the largest
    deviation from the float64 reference relative to the largest output. `group` names the run of finalists that were
    measured in turns; `when` is UTC, ISO 8601.
    """

    task: Task
    point: Point
    machine: MachineId
    versions: Versions
    outcome: str = "ok"
    why: str = ""
    warm: tuple[float, ...] = ()
    cold: tuple[float, ...] = ()
    error: float | None = None
    stage: str = "trial"
    group: str = ""
    when: str = ""
    session: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"


def feature_hash(features: frozenset[str] | set[str]) -> str:
    """Twelve hexadecimal digits that stand for a set of CPU features."""
    return hashlib.sha256(",".join(sorted(features)).encode()).hexdigest()[:12]
