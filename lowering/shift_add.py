"""What the kn2 forms share: one product a kernel position on the input's own pixels, and their shifted sum.

    T[n, h, k, m] = sum_c I[n, h, g(m) C/g + c] W[m, k, c]                        k a tap, h an input position
    O[n, y, m]    = epilogue(sum_k T[n, y + k d - p, k, m])                       terms outside the input are left out

No patch and no padded copy exists: padding only bounds the sum. The forms differ in how much of T is held at once,
which the annotation `gemmify.hold` of the sum tells a schedule: a register tile, one panel of channels, or all of T.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

from tvm import te, tirx

from .base import Epilogue, GemmAxes, GemmShape, Lowering, LoweringCost, Reason, Tile, ceil_div, require_conv, zero
from .free_sizes import Size
from .implicit_gemm import packed_bytes
from .problem import ConvProblem, Problem
from .tile_gemm import read_panels, tile_gemm
from .window import activation_bytes, window_index

ACCUMULATE_ANNOTATION = "gemmify.accumulate"
HOLD_ANNOTATION = "gemmify.hold"
ROWS_ANNOTATION = "gemmify.rows"

# Output rows that one task sums at a time: its part of the input and of the output stay in a core's own cache.
ROWS_A_TASK = 8


def unit_stride(problem: Problem) -> Reason | None:
    """The condition of every kn2 form: a shift of whole images needs stride 1 in every dimension."""
    if (reason := require_conv(problem)) is not None:
        return reason
    assert isinstance(problem, ConvProblem)
    if any(s != 1 for s in problem.stride):
        return Reason(f"needs stride 1, got {'x'.join(map(str, problem.stride))}")
    return None


def in_output(problem: Problem) -> Reason | None:
    """The conditions of a form whose sums grow in the output itself."""
    if (reason := unit_stride(problem)) is not None or not problem.widened:
        return reason
    return Reason(f"needs float32 or float64, because sums grow in the output, got {problem.dtype}")


def tap_axes(problem: ConvProblem) -> GemmAxes:
    """A register tile spans pixels of one input row and channels of one group; every tap is a GEMM of its own."""
    *outer, inner = problem.size
    row = problem.c * problem.moved_element
    return GemmAxes(
        problem.n * prod(outer) * problem.taps, inner, problem.m_group, problem.c_group, problem.groups, row_bytes=row
    )


def task_rows(problem: ConvProblem, rows: int = ROWS_A_TASK) -> int:
    """Output rows of one task: about `rows`, equal blocks but for the last."""
    height = problem.out_size[-2] if problem.dims > 1 else 1
    return ceil_div(height, ceil_div(height, rows))


def row_choices(problem: ConvProblem) -> tuple[int, ...]:
    """Output rows of a task that may be tried, the default first: different numbers of blocks, halved each time."""
    height = problem.out_size[-2] if problem.dims > 1 else 1
    offers = (ROWS_A_TASK, *(2**i for i in range(height.bit_length() + 1)))
    return tuple(dict.fromkeys(task_rows(problem, rows) for rows in offers))


def task_count(problem: ConvProblem, tile: Tile, rows: int = ROWS_A_TASK) -> int:
    """Blocks of rows and panels of channels, each summed by one thread."""
    height = problem.out_size[-2] if problem.dims > 1 else 1
    blocks = problem.n * prod(problem.out_size[:-2]) * ceil_div(height, task_rows(problem, rows))
    return blocks * problem.groups * ceil_div(problem.m_group, tile.nr)


class RowTasks(Lowering[Problem]):
    """A form whose tasks are blocks of output rows, all taps of one block after another; their height is free."""

    size_names = ("rows",)

    def choices(self, problem: Problem) -> dict[str, tuple[Size, ...]]:
        """`rows`: output rows that one task sums; nothing where the problem is staged, which has no such tasks."""
        assert isinstance(problem, ConvProblem)
        if problem.staged:
            return {}
        rows = row_choices(problem)
        return {"rows": rows} if len(rows) > 1 else {}

    def rows(self, problem: ConvProblem) -> int:
        """Output rows of a task."""
        sizes: dict[str, Any] = dict(self.sizes)
        return int(sizes.get("rows") or task_rows(problem))


def tap_cost(
    problem: ConvProblem,
    tile: Tile,
    passes: int,
    workspace: dict[str, int],
    thread_bytes: int = 0,
    rows: int = ROWS_A_TASK,
) -> LoweringCost:
    """One GEMM a tap, image and group. `passes` counts the vectors that the shifted sum reads or writes for one vector
    of output and tap, `rows` the output rows of a task."""
    gemm = GemmShape(problem.pixels, problem.m_group, problem.c_group, problem.n * problem.groups * problem.taps)
    columns = problem.groups * ceil_div(problem.m_group, tile.nr) * tile.nr
    pixels = prod(max(i, o) for i, o in zip(problem.size, problem.out_size, strict=True))
    weights, total = packed_bytes(problem, tile), sum(workspace.values())
    return LoweringCost(
        gemms=(gemm,),
        macs=problem.n * problem.taps * pixels * columns * problem.c_group,
        bytes_moved=activation_bytes(problem) + weights + 2 * total,
        workspace_bytes=total,
        weight_bytes=weights,
        # Errors of the sum over C of each product, and of adding the taps up: not of one sum over all of them.
        error_growth=sqrt(problem.taps + problem.c_group),
        workspace=workspace,
        extra_flops=passes * problem.n * problem.taps * problem.pixels * columns,
        thread_bytes=thread_bytes,
        tasks=task_count(problem, tile, rows),
    )


def tap_products(problem: ConvProblem, tile: Tile, data: te.Tensor, packed: te.Tensor) -> te.Tensor:
    """`T[n, *rows, *taps, x, (g,) m]` from `(N, *size, C)` and the panels of `pack_stage`."""
    dims = problem.dims
    *outer, inner = problem.size
    panels = read_panels(packed)

    def read_a(at: tuple[Any, ...], x: Any, g: Any, m: Any, k: tuple[Any, ...]) -> Any:
        del m
        return data(*at[:dims], x, g * problem.c_group + k[0])

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        return panels(at, g, p, j, (*at[dims:], k[0]))

    return tile_gemm(
        outer=(problem.n, *outer, *problem.kernel),
        inner=inner,
        n=problem.m_group,
        k_extents=(problem.c_group,),
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        groups=problem.groups,
        epilogue=lambda value, index: value,
        name="product",
    )


def taps_of(problem: ConvProblem) -> list[Any]:
    """One reduction axis a kernel dimension."""
    return [te.reduce_axis((0, extent), name=f"k{d}") for d, extent in enumerate(problem.kernel)]


def sum_attributes(problem: ConvProblem, letters: str, hold: str, rows: int = ROWS_A_TASK) -> dict[str, Any]:
    """What a schedule is told of the sum: its axes, how much of T is held, and how many rows a task sums.

    Nothing where the output is stored in half precision: sums cannot grow in it, each is made in a register. Nor where
    the problem is staged: all of T is then in memory.
    """
    if problem.widened or problem.staged:
        return {}
    return {ACCUMULATE_ANNOTATION: letters, HOLD_ANNOTATION: hold, ROWS_ANNOTATION: rows}


def shifted_sum(
    problem: ConvProblem, products: te.Tensor, epilogue: Epilogue, hold: str, rows: int = ROWS_A_TASK
) -> te.Tensor:
    """`O[n, *out, m]` from `tap_products`' T."""
    dims, grouped = problem.dims, problem.groups > 1
    taps = taps_of(problem)
    channels = (problem.groups, problem.m_group) if grouped else (problem.m,)

    def element(n: Any, *index: Any) -> Any:
        where = window_index(problem, index[:dims], taps, padded=False)
        return te.sum(inside(problem, where, products(n, *where[:-1], *taps, where[-1], *index[dims:])), axis=taps)

    total = te.compute(
        (problem.n, *problem.out_size, *channels),
        element,
        name="total",
        attrs=sum_attributes(problem, "o" + "r" * (dims - 1) + "t" + "g" * grouped + "j", hold, rows),
    )

    def finish(n: Any, *index: Any) -> Any:
        out, m = index[:-1], index[-1]
        value = total(n, *out, m // problem.m_group, m % problem.m_group) if grouped else total(n, *out, m)
        return epilogue(value, (n, *out, m))

    return te.compute((problem.n, *problem.out_size, problem.m), finish, name="sum")


def inside(problem: ConvProblem, where: list[Any], value: Any) -> Any:
    """`value` where the input position `where` exists, else 0."""
    tests = []
    for i, size, before, after in zip(where, problem.size, problem.pad_before, problem.pad_after, strict=True):
        tests += ([i >= 0] if before else []) + ([i < size] if after else [])
    return tirx.if_then_else(tirx.all(*tests), value, zero(problem.accumulator)) if tests else value
