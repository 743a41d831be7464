"""The long reduction of a weight gradient, cut into chunks of pixels: partial sums first, their sum afterwards.

    P[s, ...] = sum over the pixels of chunk s        dW = sum_s P[s, ...]

The reduction runs over `N Ho Wo` pixels, while the result may be small: the chunks give every thread work, and keep the
pixels of one chunk in a core's own cache while all taps and channels pass over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log, prod
from typing import Any

from tvm import te

from ..base import Epilogue, Stage
from ..gradient_problem import GradientProblem, WeightGradientProblem
from ..im2col import unflatten
from ..problem import DenseProblem

# Channels are read in vectors; so many bytes are what one of them is taken for, whatever the machine.
VECTOR_BYTES = 64
# The pixels of a chunk, of both activations, should stay in a core's own cache.
CHUNK_BYTES = 256 << 10
# A chunk must be worth the partial sums that it writes and that are read again: so many times their bytes, and pixels.
CHUNK_SUMS = 2
CHUNK_PIXELS = 128
MAX_CHUNKS = 32
# A result of fewer register tiles than this needs chunks to keep the threads busy; a tile holds about so many sums.
ENOUGH_TILES = 16
TILE_SUMS = 448


@dataclass(frozen=True)
class Split:
    """`rows` chunks of the `N Ho` output rows, each cut into `columns` along the row; all chunks are equal."""

    problem: WeightGradientProblem
    rows: int
    columns: int

    @property
    def chunks(self) -> int:
        return self.rows * self.columns

    @property
    def extents(self) -> tuple[int, int]:
        """Rows, and pixels of each, in a chunk: the axes of its reduction."""
        conv = self.problem.conv
        return conv.n * prod(conv.out_size[:-1]) // self.rows, conv.out_size[-1] // self.columns

    @property
    def pixels(self) -> int:
        return prod(self.extents)

    def pixel(self, chunk: Any, k: Sequence[Any]) -> Any:
        """Number of the pixel of step `k` of a chunk, counted through the batch."""
        row, column = self._at(chunk, k)
        return row * self.problem.conv.out_size[-1] + column

    def _at(self, chunk: Any, k: Sequence[Any]) -> tuple[Any, Any]:
        row = chunk // self.columns * self.extents[0] + k[0]
        return row, chunk % self.columns * self.extents[1] + k[1]

    def position(self, chunk: Any, k: Sequence[Any]) -> tuple[Any, list[Any]]:
        """(image, output position) of step `k` of a chunk."""
        conv = self.problem.conv
        row, column = self._at(chunk, k)
        n, *outer = unflatten(row, (conv.n, *conv.out_size[:-1]))
        return n, [*outer, column]


@lru_cache(maxsize=1024)
def split_of(problem: WeightGradientProblem) -> Split:
    """The split whose number of chunks comes nearest to what cache and threads ask for, chunks never padded."""
    conv = problem.conv
    pixels = problem.reduction
    sums = conv.m * conv.taps * conv.c_group
    chunk_bytes = max(CHUNK_BYTES, CHUNK_SUMS * sums * problem.element)
    cached = pixels * problem.element * (conv.c + conv.m) / chunk_bytes
    busy = ENOUGH_TILES / max(1.0, sums / TILE_SUMS)
    wanted = max(1.0, min(max(cached, busy), pixels / CHUNK_PIXELS, MAX_CHUNKS))
    rows = conv.n * prod(conv.out_size[:-1])
    splits = [Split(problem, r, 1) for r in divisors(rows)]
    splits += [Split(problem, rows, c) for c in divisors(conv.out_size[-1])[1:]]
    return min(
        (s for s in splits if s.chunks <= MAX_CHUNKS),
        key=lambda s: (round(abs(log(s.chunks / wanted)), 9), s.chunks),
    )


def divisors(n: int) -> list[int]:
    """The divisors of `n`, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def partial_bytes(problem: WeightGradientProblem) -> int:
    """Bytes of the partial sums: `e S M K^2 C/g`."""
    conv = problem.conv
    return problem.element * split_of(problem).chunks * conv.m * conv.taps * conv.c_group


def at_once(problem: WeightGradientProblem) -> bool:
    """Whether a GEMM a tap may write the gradient itself: there is one chunk, nothing to add, and one group."""
    return split_of(problem).chunks == 1 and problem.conv.groups == 1


def by_tap(problem: WeightGradientProblem, epilogue: Epilogue) -> tuple[tuple[int, ...], Epilogue]:
    """`order` and `epilogue` of the GEMM (chunk, *kernel, m, c) that writes `(M, *kernel, C)` at once."""
    dims = problem.conv.dims

    def apply(value: Any, index: tuple[Any, ...]) -> Any:
        taps = () if isinstance(problem.forward, DenseProblem) else index[1:-2]
        return epilogue(value, (index[-2], *taps, index[-1]))

    return (0, dims + 1, *range(1, dims + 1)), apply


def sum_stage(problem: WeightGradientProblem, at: Any, epilogue: Epilogue) -> Stage:
    """`dW[m, k, c] = sum_s P[s, ...]`; `at(m, taps, c)` is the index of that element behind `s`."""
    shape = problem.result_shape()

    def compute(partial: te.Tensor) -> te.Tensor:
        def element(*index: Any) -> Any:
            m, taps, c = index[0], index[1:-1] or (0,) * problem.conv.dims, index[-1]
            where = at(m, taps, c)
            value = partial(0, *where)
            for s in range(1, int(partial.shape[0])):
                value = value + partial(s, *where)
            return epilogue(value, index)

        return te.compute(shape, element, name="weight_gradient")

    return Stage("sum", ("partial",), compute, "output")


def pixel(problem: GradientProblem, n: Any, where: Sequence[Any]) -> tuple[Any, ...]:
    """The index of a pixel in an activation of the forward problem: a fully connected layer's has no position."""
    return (n,) if isinstance(problem.forward, DenseProblem) else (n, *where)
