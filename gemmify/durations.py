"""Lengths of time as people write them: the one reader for the command line and for the Python interface."""

from __future__ import annotations

import re
from typing import Any

from .errors import InputError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(h|min|m|s|)")


def parse_duration(value: Any) -> float:
    """Seconds: a positive number, or text such as "90", "90s", "20m", "1h30m". Raises InputError for anything else."""
    seconds = 0.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        text = value.strip().lower()
        parts = _PART.findall(text)
        if text and "".join(a + b for a, b in parts) == text.replace(" ", ""):
            seconds = sum(float(amount) * _UNITS[unit] for amount, unit in parts)
    if not 0 < seconds < float("inf"):
        raise InputError(f"{value!r} is not a length of time, e.g. 90s, 20m or 1h30m")
    return seconds


def show_duration(seconds: float) -> str:
    """`75` as `1:15`, `3700` as `1:01:40`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
