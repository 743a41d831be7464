"""The output of a transposed convolution by phase: which taps reach an output position, and from where.

Along one spatial dimension, output position `o` gets the product of input position `i` and tap `k` where

    i s + k d = o + p

With `o = s j + r` (`r < s` is the phase, `j` the position within it) and `f = gcd(s, d)` there are no such taps unless
`f` divides `r + p`; otherwise they are

    k = first(r) + u step,   i = j + base(r) - u rise        u = 0, 1, ...   step = s / f,  rise = d / f

so that each phase is a convolution of stride 1 by a part of the kernel, flipped: no tap is tried in vain, and nothing
is divided but numbers of the phase. Source: Dumoulin & Visin 2016, sections 4.4 to 4.6 (arXiv 1603.07285); Shi et al.
2016, "Is the deconvolution layer the same as a convolutional layer?" (arXiv 1609.07009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import gcd
from typing import Any

from tvm import tirx

from .base import ceil_div
from .problem import TransposedConvProblem


@dataclass(frozen=True)
class Phases:
    """One spatial dimension. A phase is a number or an expression."""

    size: int
    kernel: int
    stride: int
    dilation: int
    pad: int
    out: int

    @property
    def common(self) -> int:
        """`gcd(s, d)`."""
        return gcd(self.stride, self.dilation)

    @property
    def step(self) -> int:
        """How far apart the taps of one phase lie."""
        return self.stride // self.common

    @property
    def rise(self) -> int:
        """How far apart the input positions of neighbouring taps of one phase lie."""
        return self.dilation // self.common

    @property
    def taps(self) -> int:
        """The most taps that a phase has."""
        return ceil_div(self.kernel, self.step)

    @property
    def positions(self) -> int:
        """Positions within a phase: `ceil(out / s)`; the last one of some phases lies past the output's end."""
        return ceil_div(self.out, self.stride)

    @property
    def even(self) -> bool:
        """Whether every phase has `taps` taps."""
        return self.common == 1 and self.kernel % self.step == 0

    @property
    def whole(self) -> bool:
        """Whether every phase has all its positions in the output."""
        return self.out % self.stride == 0

    @property
    def firsts(self) -> tuple[int, ...]:
        """The first tap of each phase; `kernel`, which is none, for a phase that no tap reaches."""
        reached = range(min(self.step, self.kernel))
        by_phase = {(k * self.dilation - self.pad) % self.stride: k for k in reached}
        return tuple(by_phase.get(r, self.kernel) for r in range(self.stride))

    @property
    def bases(self) -> tuple[int, ...]:
        """The input position of position 0 at each phase's first tap; it may lie outside the input."""
        found = zip(range(self.stride), self.firsts, strict=True)
        return tuple((r + self.pad - k * self.dilation) // self.stride if k < self.kernel else 0 for r, k in found)

    def exists(self, phase: Any, u: Any) -> list[Any]:
        """The condition under which the phase has a tap number `u`; none where every phase has `taps` of them."""
        return [] if self.even else [self.tap(phase, u) < self.kernel]

    def tap(self, phase: Any, u: Any) -> Any:
        """The kernel position that is the phase's tap number `u`."""
        return piecewise(self.firsts, phase) + u * self.step

    def where(self, phase: Any, u: Any, position: Any) -> Any:
        """The input position that the tap number `u` of a phase reads for output position `s position + phase`."""
        return position + piecewise(self.bases, phase) - u * self.rise

    @property
    def present(self) -> list[tuple[int, int]]:
        """Every (phase, u) that exists."""
        pairs = [(r, u) for r in range(self.stride) for u in range(self.taps)]
        return [(r, u) for r, u in pairs if all(self.exists(r, u))]

    @property
    def reach(self) -> tuple[int, int]:
        """How far the positions that all phases read reach beyond the input's start and end."""
        starts = [self.where(r, u, 0) for r, u in self.present]
        before = max([0, *(-start for start in starts)])
        return before, max([0, *(start + self.positions - self.size for start in starts)])


def piecewise(values: Sequence[int], at: Any) -> Any:
    """`values[at]` as linear pieces: neither a table to read nor a remainder, which TVM's simplifier gets wrong where
    several stand in one address."""
    if isinstance(at, int):
        return values[at]
    steps = [b - a for a, b in pairwise(values)]
    run = next((i for i, step in enumerate(steps) if step != steps[0]), len(steps)) + 1
    slope = steps[0] if steps else 0
    piece = at * slope + values[0] if slope else tirx.const(values[0], "int32")
    if run == len(values):
        return piece
    return tirx.Select(at < run, piece, piecewise(values[run:], at - run))


@lru_cache(maxsize=4096)
def phases_of(problem: TransposedConvProblem) -> tuple[Phases, ...]:
    """The phases of each spatial dimension, outermost first."""
    sides = zip(
        *(problem.size, problem.kernel, problem.stride, problem.dilation, problem.pad_before, problem.out_size),
        strict=True,
    )
    return tuple(Phases(*side) for side in sides)
