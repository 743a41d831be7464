"""Random layers of every kind, small and odd: the problems that a lowering from outside is checked on."""

from __future__ import annotations

import random
from collections.abc import Iterator

from lowering import ConvProblem, DenseProblem, Lowering, Problem, TransposedConvProblem

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 19, 32, 33)
SIDES = {1: (1, 40), 2: (1, 15), 3: (1, 6)}
MOST_MACS = 400_000
DTYPES = (*["float32"] * 5, "float16", "float64", "float64")
KINDS = ("any", "any", "any", "same", "same", "pointwise", "depthwise", "dense", "transposed")


def random_layers(seed: int = 0) -> Iterator[Problem]:
    """Layers without end, the same for the same seed: 1 to 3 dimensions, strides, dilations, uneven pads, groups."""
    draw = random.Random(seed)
    while True:
        try:
            problem = _layer(draw)
        except ValueError:  # these sizes make no layer
            continue
        if problem.macs <= MOST_MACS:
            yield problem


def accepted(lowering: Lowering, count: int, seed: int = 0, tries: int = 20_000) -> list[Problem]:
    """The first `count` different random layers that `lowering` accepts; fewer where `tries` layers hold no more."""
    found: dict[Problem, None] = {}
    layers = random_layers(seed)
    for _ in range(tries):
        problem = next(layers)
        if lowering.applicable(problem) is None:
            found[problem] = None
            if len(found) == count:
                break
    return list(found)


def _layer(draw: random.Random) -> Problem:
    kind = draw.choice(KINDS)
    dtype = draw.choice(DTYPES)
    if kind == "dense":
        return DenseProblem(draw.choice((1, 1, 2, 5, 13, 32)), draw.randint(1, 130), draw.randint(1, 70), dtype)
    groups, c, m = _channels(draw, kind)
    dims = draw.choice((1, 2, 2, 2, 2, 3))
    sides = [_side(draw, kind, dims) for _ in range(dims)]
    if draw.random() < 0.5:
        sides = [sides[0]] * dims
    size, kernel, stride, before, after, dilation, extra = (tuple(v) for v in zip(*sides, strict=True))
    n = draw.randint(1, 3)
    if kind == "transposed":
        return TransposedConvProblem(
            n, c, m, size, kernel, stride, before, after, dilation, extra, groups=groups, dtype=dtype
        )
    return ConvProblem(n, c, m, size, kernel, stride, before, after, dilation, groups, dtype)


def _channels(draw: random.Random, kind: str) -> tuple[int, int, int]:
    """(groups, C, M)"""
    if kind == "depthwise":
        groups = draw.choice((2, 3, 7, 8, 16, 24, 32))
        return groups, groups, groups * draw.choice((1, 1, 2))
    if draw.random() < 0.75:
        return 1, draw.choice(CHANNELS), draw.choice(CHANNELS)
    groups = draw.randint(2, 5)
    return groups, groups * draw.randint(1, 5), groups * draw.randint(1, 9)


def _side(draw: random.Random, kind: str, dims: int) -> tuple[int, int, int, int, int, int, int]:
    """(size, kernel, stride, pad before, pad after, dilation, output padding) of one dimension."""
    size = draw.randint(*SIDES[dims])
    if kind == "pointwise":
        return size, 1, draw.choice((1, 1, 2)), 0, 0, 1, 0
    if kind == "same":
        kernel = draw.choice((3, 3, 5, 7))
        return size, kernel, 1, kernel // 2, kernel // 2, 1, 0
    kernel, stride, dilation = draw.choice((1, 2, 3, 3, 4, 5)), draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3))
    reach = dilation * (kernel - 1)
    before, after = draw.choice(((0, 0), (reach // 2, reach // 2), (draw.randint(0, reach), draw.randint(0, 3))))
    return size, kernel, stride, before, after, dilation, draw.randint(0, stride - 1)
