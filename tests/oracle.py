"""Random problems to compare on; what they are compared with is `gemmify.layer_reference`."""

from __future__ import annotations

from hypothesis import strategies as st

from gemmify.accuracy import UNIT
from gemmify.layer_reference import apply_epilogue, channels_first, magnitude, random_arrays, reference
from lowering import ConvProblem, DenseProblem, Problem, TransposedConvProblem
from lowering.epilogue import EpilogueOp

__all__ = [
    "UNIT",
    "apply_epilogue",
    "channels_first",
    "magnitude",
    "random_3x3",
    "random_arrays",
    "random_conv",
    "random_dense",
    "random_epilogue",
    "random_problem",
    "random_transposed",
    "reference",
]

# Primes, powers of two and their neighbours: what a register tile divides and what it does not.
CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 19, 23, 31, 32, 33, 37])
KERNELS = st.sampled_from([1, 1, 2, 3, 3, 3, 4, 5, 5, 7])
DTYPES = st.sampled_from([*["float32"] * 5, "float16", "float64", "float64"])


@st.composite
def random_conv(draw: st.DrawFn, max_macs: int = 400_000) -> ConvProblem:
    """A convolution of 1 to 3 dimensions: odd sizes, strides, dilations, uneven pads, groups, depthwise, multiplier."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 2, 3]))
    groups, c, m = draw(_channels())
    most = {1: 40, 2: 15, 3: 6}[dims]
    square = draw(st.booleans())
    first = draw(_side(most))
    sides = [first if square else draw(_side(most)) for _ in range(dims)]
    size, kernel, stride, before, after, dilation = (tuple(v) for v in zip(*sides, strict=True))
    n = draw(st.integers(1, 3))
    problem = ConvProblem(n, c, m, size, kernel, stride, before, after, dilation, groups, draw(DTYPES))
    while problem.macs > max_macs and (n, c, m) != (1, groups, groups):
        n, c, m = 1, *(groups if v <= groups else groups * max(1, v // groups // 2) for v in (c, m))
        problem = ConvProblem(n, c, m, size, kernel, stride, before, after, dilation, groups, problem.dtype)
    return problem


@st.composite
def _channels(draw: st.DrawFn) -> tuple[int, int, int]:
    kind = draw(st.sampled_from(["plain", "plain", "plain", "grouped", "depthwise", "multiplier"]))
    if kind == "plain":
        return 1, draw(CHANNELS), draw(CHANNELS)
    groups = draw(st.sampled_from([2, 3, 4, 5]) if kind == "grouped" else st.sampled_from([2, 3, 7, 8, 16, 24, 32]))
    if kind == "depthwise":
        return groups, groups, groups
    if kind == "multiplier":
        return groups, groups, groups * draw(st.integers(2, 3))
    return groups, groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 9))


@st.composite
def _side(draw: st.DrawFn, most: int) -> tuple[int, int, int, int, int, int]:
    """(size, kernel, stride, pad before, pad after, dilation) of one dimension, large enough for one output."""
    kernel, dilation = draw(KERNELS), draw(st.sampled_from([1, 1, 1, 2, 3]))
    stride = draw(st.sampled_from([1, 1, 1, 2, 3]))
    reach = dilation * (kernel - 1) + 1
    size = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["none", "same", "any"]))
    if kind == "same":
        before = after = (reach - 1) // 2
    else:
        before, after = (0, 0) if kind == "none" else (draw(st.integers(0, reach)), draw(st.integers(0, 3)))
    return max(size, reach - before - after, 1), kernel, stride, before, after, dilation


@st.composite
def random_transposed(draw: st.DrawFn, max_macs: int = 400_000) -> TransposedConvProblem:
    """A transposed convolution of 1 to 3 dimensions: strides above and below the kernel, dilations, pads, groups."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups, c, m = draw(_channels())
    most = {1: 20, 2: 7, 3: 3}[dims]
    sides = [draw(_spread_side(most)) for _ in range(dims)]
    window = tuple(tuple(v) for v in zip(*sides, strict=True))
    n = draw(st.integers(1, 2))
    problem = TransposedConvProblem(n, c, m, *window, groups, draw(DTYPES))
    while problem.macs > max_macs and (n, c, m) != (1, groups, groups):
        n, c, m = 1, *(groups if v <= groups else groups * max(1, v // groups // 2) for v in (c, m))
        problem = TransposedConvProblem(n, c, m, *window, groups, problem.dtype)
    return problem


@st.composite
def _spread_side(draw: st.DrawFn, most: int) -> tuple[int, int, int, int, int, int, int]:
    """(size, kernel, stride, pad before, pad after, dilation, output padding), with an output of at least one."""
    kernel, dilation = draw(KERNELS), draw(st.sampled_from([1, 1, 1, 2, 3]))
    stride = draw(st.sampled_from([1, 2, 2, 2, 3, 4]))
    reach = dilation * (kernel - 1) + 1
    size, extra = draw(st.integers(1, most)), draw(st.integers(0, stride - 1))
    before, after = draw(st.integers(0, reach)), draw(st.integers(0, reach))
    out = (size - 1) * stride + reach + extra - before - after
    # More input where the pads would cut everything.
    return size + max(0, -((out - 1) // stride)), kernel, stride, before, after, dilation, extra


@st.composite
def random_dense(draw: st.DrawFn) -> DenseProblem:
    """A fully connected layer of 1 to 40 rows."""
    rows = draw(st.sampled_from([1, 1, 1, 2, 3, 5, 13, 32, 37]))
    return DenseProblem(rows, draw(st.integers(1, 130)), draw(st.integers(1, 70)), draw(DTYPES))


@st.composite
def random_3x3(draw: st.DrawFn) -> ConvProblem:
    """What minimal filtering takes: 3x3 or 5x5, stride 1, one group, any pad."""
    k = draw(st.sampled_from([3, 3, 5]))
    size = (draw(st.integers(k, 14)), draw(st.integers(k, 14)))
    before, after = ((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(2))
    # Few channels: the transforms unroll into much code, which takes LLVM long.
    c, m = draw(CHANNELS), draw(st.sampled_from([1, 3, 8, 11, 16, 17]))
    return ConvProblem(draw(st.integers(1, 2)), c, m, size, (k, k), (1, 1), before, after, (1, 1), 1, draw(DTYPES))


def random_problem() -> st.SearchStrategy[Problem]:
    """Convolutions of every kind; one in 32 is a plain 3x3 or 5x5, one in eight a fully connected layer, one in 16 a
    transposed convolution.
    """
    kinds = {
        0: random_3x3(),
        **dict.fromkeys(range(1, 5), random_dense()),
        **dict.fromkeys((5, 6), random_transposed()),
    }
    return st.integers(0, 31).flatmap(lambda i: kinds.get(i, random_conv()))


EXPONENTIALS = [EpilogueOp(kind) for kind in ("sigmoid", "tanh", "silu")]


@st.composite
def random_epilogue(draw: st.DrawFn) -> tuple[EpilogueOp, ...]:
    """Up to four steps, operands numbered in order."""
    unary = [EpilogueOp("relu"), EpilogueOp("clip", None, (0.0, 6.0)), EpilogueOp("leaky_relu", None, (0.1,))]
    unary += [EpilogueOp(kind) for kind in ("sigmoid", "tanh", "silu", "hardswish")]
    unary += [EpilogueOp("hardsigmoid", None, (0.2, 0.5)), EpilogueOp("hardswish", None, (1 / 6, 0.5))]
    with_operand = st.sampled_from(["bias", "bias", "scale", "add", "mul"])
    steps = draw(st.lists(st.one_of(with_operand, st.sampled_from(unary)), max_size=4))
    ops: list[EpilogueOp] = []
    for step in steps:
        # One exponential at most: chained, each expands the code of the one before several times over.
        if step in EXPONENTIALS and any(op in EXPONENTIALS for op in ops):
            continue
        number = sum(op.operand is not None for op in ops)
        ops.append(EpilogueOp(step, number) if isinstance(step, str) else step)
    return tuple(ops)
