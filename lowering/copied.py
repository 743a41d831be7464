"""What the forms that copy patches a block at a time share: what a schedule is told, and what such a block costs."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from .base import LoweringCost

# A block that copies says where the copy lives (see `schedules.cpu.blocked`): one block of it for all threads, one a
# thread, or the whole as a tensor of its own.
COPY_ANNOTATION = "gemmify.copy"
PERIOD_ANNOTATION = "gemmify.period"
UNBLOCK_ANNOTATION = "gemmify.unblock"
WHOLE, SHARED, PRIVATE = "whole", "shared", "private"

# What writing and reading a copied element costs beside the GEMM, in vectorised operations: through the shared cache
# (as a workspace costs), or in a core's own.
SHARED_OPS = 12
PRIVATE_OPS = 4
# More elements than this written out one after another only make code.
_WRITTEN_OUT = 1024


def in_shared_block(cost: LoweringCost, copied: int, block_bytes: int) -> LoweringCost:
    """`cost` with `copied` elements passing through one buffer of `block_bytes` that the threads share."""
    return replace(cost, extra_flops=cost.extra_flops + SHARED_OPS * copied, shared_bytes=block_bytes)


def period_of(row: int, nr: int, stride: int) -> int | None:
    """After how many panels of `nr` columns the columns' rows of `row` elements begin alike; None where that is long.

    Elements with a stride are copied one by one: fewer of them are worth writing out.
    """
    panels = row // gcd(row, nr)
    return panels if panels * nr <= (_WRITTEN_OUT if stride == 1 else _WRITTEN_OUT // 4) else None
