"""Measuring candidates: each in a process of its own, its numbers checked before its time counts.

`local` measures on this machine: `server` is the process that all candidates are forked from, `child` what one of them
does. `job` holds what every measurer answers.
"""

from __future__ import annotations

from .job import Measured

__all__ = ["Measured"]
