"""Sizes in bytes as people write them: the one reader for the command line and for the Python interface."""

from __future__ import annotations

import operator
from typing import Any

from .errors import InputError

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(value: Any) -> int:
    """Bytes: a whole number, or text such as "1048576", "512K", "512KiB", "64M", "1GiB" (units are powers of 1,024, in
    either case). Raises InputError for anything else."""
    if isinstance(value, str):
        digits = value.rstrip("BGIKMbgikm")
        unit = value[len(digits) :].upper()
        unit = unit[0] if len(unit) == 3 and unit.endswith("IB") else unit
        if digits.isdecimal() and unit in _UNITS:
            return int(digits) * _UNITS[unit]
    elif not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise InputError(f"{value!r} is not a number of bytes, e.g. 1048576, 512KiB or 64MiB")
