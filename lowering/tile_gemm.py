"""The GEMM that every lowering ends in, as a tensor expression over register tiles.

Both operands are given by their address computation:

    acc[o..., t, g, p, i, j] = sum_k A(o, t mr + i, g, k) B(o, g, p nr + j, k)        i < mr, j < nr
    out[o..., x, g, n]       = epilogue(acc[o..., x // mr, g, n // nr, x % mr, n % nr])

(the axis `g` of `out` is there only where there are groups). The block `acc` carries the annotation `gemmify.axes`, one
letter a spatial axis, which is all that a schedule is told: `o` an independent outer axis, `t` the tile along m, `p`
the panel along n, `i`/`j` the row/column within the tile. Two numbers go with it: `gemmify.rows`, how many rows the
tiles cover, and `gemmify.ragged`, how many of the leading reduction axes may end early, as the outer axes decide.
`gemmify.borders` stands where A is read under conditions that a schedule should cut out of its loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from .base import Epilogue, Tile, ceil_div, dtype_of, zero

AXES_ANNOTATION = "gemmify.axes"
ROWS_ANNOTATION = "gemmify.rows"
RAGGED_ANNOTATION = "gemmify.ragged"
BORDERS_ANNOTATION = "gemmify.borders"

ReadA = Callable[[tuple[Any, ...], Any, Any, Any, tuple[Any, ...]], Any]
"""`read_a(outer, x, g, n, k)`: A at row `x`; `n` is the output column (only a depthwise layer looks at it)."""
ReadB = Callable[[tuple[Any, ...], Any, Any, Any, tuple[Any, ...]], Any]
"""`read_b(outer, g, p, j, k)`: B at column `p nr + j`; readable up to the last panel's end, whatever it holds there."""


def pack_panels(weight: te.Tensor, groups: int, n: int, k_extents: Sequence[int], nr: int) -> te.Tensor:
    """Pack a weight `[g n, k...]` into panels `[g, ceil(n/nr), k..., nr]`, zeros past the last column.

    The panel is read front to back by the GEMM, so that its rows stream from the cache in order.
    """
    panels = ceil_div(n, nr)

    def element(*index: Any) -> Any:
        g, p, j, k = index[0], index[1], index[-1], index[2:-1]
        column = p * nr + j
        value = weight(g * n + column, *k)
        if n % nr == 0:
            return value
        return tirx.if_then_else(column < n, value, zero(weight.dtype))

    return te.compute((groups, panels, *k_extents, nr), element, name="packed")


def read_panels(packed: te.Tensor) -> ReadB:
    """B from a tensor that `pack_panels` made."""
    return lambda at, g, p, j, k: packed(g, p, *k, j)


def tile_gemm(
    *,
    outer: Sequence[int],
    inner: int,
    n: int,
    k_extents: Sequence[int],
    read_a: ReadA,
    read_b: ReadB,
    tile: Tile,
    groups: int = 1,
    epilogue: Epilogue,
    guard: bool = True,
    order: Sequence[int] | None = None,
    ragged: int = 0,
    borders: bool = False,
    name: str = "gemm",
) -> te.Tensor:
    """The tensor `out[outer..., inner, (groups,) n]` of the module's equation.

    Rows past `inner` are not read unless `guard` is False, which promises that A can be read there. `epilogue` gets the
    index `(outer..., x, g n + column)`. `order` stores the axes (outer..., inner) in another order; `ragged` says that
    `read_a` is 0 from some step of the first so many reduction axes on, which the outer axes alone decide; `borders`
    that `read_a` is 0 outside a box of positions, under conditions which a schedule should cut out of its loops.
    """
    mr, nr = tile.mr, tile.nr
    tiles, panels, dims = ceil_div(inner, mr), ceil_div(n, nr), len(outer)
    k = [te.reduce_axis((0, extent), name=f"k{d}") for d, extent in enumerate(k_extents)]

    def product(*index: Any) -> Any:
        at, (t, g, p, i, j) = index[:dims], index[dims:]
        x = t * mr + i
        a = read_a(at, x, g, p * nr + j, tuple(k))
        if inner % mr and guard:
            a = tirx.if_then_else(x < inner, a, zero(dtype_of(a)))
        return te.sum(a * read_b(at, g, p, j, tuple(k)), axis=k)

    attrs = {AXES_ANNOTATION: "o" * dims + "topij", ROWS_ANNOTATION: inner, RAGGED_ANNOTATION: ragged}
    acc = te.compute(
        (*outer, tiles, groups, panels, mr, nr),
        product,
        name=f"{name}_acc",
        attrs={**attrs, BORDERS_ANNOTATION: 1} if borders else attrs,
    )
    order = tuple(range(dims + 1)) if order is None else tuple(order)

    def element(*index: Any) -> Any:
        natural = dict(zip(order, index, strict=False))
        at, x, column = tuple(natural[d] for d in range(dims)), natural[dims], index[-1]
        g = index[dims + 1] if groups > 1 else 0
        value = acc(*at, x // mr, g, column // nr, x % mr, column % nr)
        return epilogue(value, (*at, x, g * n + column))

    stored = [(*outer, inner)[d] for d in order]
    shape = (*stored, groups, n) if groups > 1 else (*stored, n)
    return te.compute(shape, element, name=name)
