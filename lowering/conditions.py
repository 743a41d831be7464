"""What a lowering needs of a layer, found by asking it about layers that differ in one thing each."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .base import Lowering
from .problem import ConvProblem, DenseProblem, Problem, TransposedConvProblem, conv2d


@lru_cache(maxsize=1)
def probes() -> tuple[Problem, ...]:
    """A plain layer of every kind, and variants of it: stride, dilation, pads, kernel, groups, dimensions."""
    plain = conv2d(8, 12, 12, 16, 3)
    line = ConvProblem(1, 8, 16, (12,), (3,), (1,), (1,), (1,), (1,))
    space = ConvProblem(1, 8, 16, (6,) * 3, (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, (1,) * 3)
    up = TransposedConvProblem(1, 8, 16, (6, 6), (4, 4), (2, 2), (1, 1), (1, 1), (1, 1), (0, 0))
    return (
        DenseProblem(4, 24, 20),
        plain,
        replace(plain, dtype="float16"),
        conv2d(8, 12, 12, 16, 3, 2),
        replace(plain, stride=(2, 1)),
        replace(plain, stride=(1, 2)),
        conv2d(8, 12, 12, 16, 3, d=2),
        replace(plain, pad_before=(0, 0), pad_after=(0, 0)),
        replace(plain, pad_after=(2, 2)),
        *(conv2d(8, 12, 12, 16, k) for k in (1, 2, 5, 7)),
        conv2d(8, 12, 12, 16, 1, p=1),
        replace(plain, kernel=(1, 3), pad_before=(0, 1), pad_after=(0, 1)),
        conv2d(8, 12, 12, 16, 3, g=2),
        conv2d(8, 12, 12, 8, 3, g=8),
        conv2d(8, 12, 12, 16, 3, g=8),
        conv2d(8, 3, 3, 16, 3, p=0),
        line,
        replace(line, stride=(2,)),
        space,
        up,
        replace(up, stride=(1, 1)),
        replace(up, dilation=(2, 2)),
        replace(up, groups=2),
        replace(up, output_padding=(1, 1)),
    )


def conditions(lowering: Lowering) -> tuple[str, ...]:
    """The clauses of the reasons that `lowering` gives, without what was found: ("a convolution", "stride 1"); none
    where it always applies."""
    reasons = (lowering.applicable(problem) for problem in probes())
    texts = (str(reason).partition(", got ")[0].removeprefix("needs ") for reason in reasons if reason is not None)
    return tuple(dict.fromkeys(texts))
