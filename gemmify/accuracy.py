"""The expected error of a lowering, and the bound on it that a user sets.

A lowering states in `LoweringCost.error_growth` how its rounding errors grow, in rounding units of the dtype: `sqrt(k)`
for a plain dot product of length `k`, far more for minimal filtering with large tiles. What is expected of a layer is

    error = SLACK u (growth + 1),    u the rounding unit,

relative to the largest output in absolute value; in half precision `u` is that of float32, in which all is computed,
and the rounding of the output comes on top, one unit of float16. On normally distributed data of zero mean the measured
error stays under it, by a factor of 1.5 to 10 (tests/test_accuracy.py); it is a forecast for such data, not a proof for
all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from lowering import LoweringCost

UNIT = {"float16": 2.0**-11, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
"""The rounding unit of a dtype: the largest relative error of one rounding."""

SLACK = 2.0
DEFAULT_MAX_ERROR = 1e-3


def expected_error(cost: LoweringCost, dtype: str, multiplied: str | None = None) -> float:
    """The error to expect of a layer, relative to its largest absolute output, where its tensors are of `dtype`.

    `multiplied` is what the factors of each product are rounded to where that is coarser than what they are computed
    in ("tf32"). Those roundings are independent, so that a sum's relative error does not grow with its length, but what
    a lowering amplifies beyond a plain dot product it amplifies of them, too.
    """
    from lowering.problem import accumulator  # running a library, which parses bounds too, must not load the compiler

    computed = SLACK * UNIT[accumulator(dtype)] * (cost.error_growth + 1)
    if multiplied is not None:
        computed += SLACK * UNIT[multiplied] * amplification(cost)
    return computed if accumulator(dtype) == dtype else computed + UNIT[dtype]


def amplification(cost: LoweringCost) -> float:
    """How much more a lowering makes of the rounding of a factor than a plain dot product does."""
    longest = max((gemm.k for gemm in cost.gemms), default=1)
    return max(1.0, cost.error_growth / (math.sqrt(longest) + 1))


def parse_error(value: Any) -> float:
    """A bound on the relative error, from a number or its text; InputError for what is not positive and finite."""
    try:
        bound = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        bound = math.nan
    if not math.isfinite(bound) or bound <= 0:
        raise InputError(f"{value!r} is not a bound on the error; give a positive number such as 1e-3")
    return bound
