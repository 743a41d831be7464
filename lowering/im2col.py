"""`im2col`: Caffe's form, patches stored as columns, channels first."""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import te, tirx

from .base import (
    Epilogue,
    GemmAxes,
    GemmShape,
    Lowering,
    LoweringCost,
    Reason,
    Stage,
    Tile,
    ceil_div,
    dtype_of,
    no_epilogue,
    require_conv,
    zero,
)
from .copied import COPY_ANNOTATION, PERIOD_ANNOTATION, SHARED, UNBLOCK_ANNOTATION, WHOLE, in_shared_block, period_of
from .problem import ConvProblem, Problem
from .tile_gemm import tile_gemm
from .window import activation_bytes, read_padded, window_index


def unflatten(position: Any, extents: tuple[int, ...]) -> list[Any]:
    """The index of the row-major `position` in a tensor of shape `extents`."""
    index = []
    for d, extent in enumerate(extents):
        rest = prod(extents[d + 1 :])
        index.append(position // rest % extent if d else position // rest)
    return index


class Im2col(Lowering):
    """Patches as the columns of a matrix, `L[kh, kw, c, y Wo + x] = I[n, c, y s + kh d - p, x s + kw d - p]` of one
    image after another, then `O[n, :, :] = W·L`.

    GEMM per image and group `[M/g x C/g K^2]·[C/g K^2 x Ho Wo]`. Reads `(N, C, *size)` and writes `(N, M, *out)`:
    channels first, as in Caffe. L is stored in panels of the register tile's width, `[Ho Wo / nr][K^2 C][nr]`, so that
    the GEMM reads it front to back; the columns are rounded up to `nr`, and the scratch is `e C K^2 roundup(Ho Wo, nr)`
    bytes (all `C` channels, with groups too): a workspace for one image, and for a batch a buffer of the kernel, which
    all threads fill and then multiply, image after image (staged: a workspace of the whole batch). Source: Chellapilla
    et al. 2006; Jia, "Convolution in Caffe: a memo"; the panels as in Goto & van de Geijn 2008, section 4.
    """

    key = "im2col"
    summary = "patches stored as columns, one GEMM an image (channels first)"
    gemm_formula = "[M x C K^2]·[C K^2 x Ho Wo]"
    workspace_formula = "e C K^2 roundup(Ho Wo, nr), the same buffer for every image"
    source = "Chellapilla et al. 2006; Jia, Convolution in Caffe: a memo"
    layout = "NCHW"

    def applicable(self, problem: Problem) -> Reason | None:
        return require_conv(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        k = problem.taps * problem.c_group
        return GemmAxes(problem.n * problem.groups, problem.m_group, problem.pixels, k)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        size = column_bytes(problem, 1, tile)
        if problem.n == 1 or problem.staged:
            return column_cost(problem, 1, tile, {"im2col": problem.n * size})
        copied = problem.n * size // problem.scratch_element
        return in_shared_block(column_cost(problem, 1, tile, {}), copied, size)

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        weight = pack_rows_stage(problem, tile)
        if problem.n == 1 or problem.staged:
            return (
                Stage("im2col", ("data",), lambda data: unroll(problem, 1, tile, data, WHOLE), "workspace", moves=True),
                weight,
                Stage("gemm", ("im2col", "packed"), lambda l, w: _gemm(problem, tile, epilogue, l, w), "output"),
            )

        def whole(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            return _gemm(problem, tile, epilogue, unroll(problem, 1, tile, data, SHARED), packed)

        return (weight, Stage("gemm", ("data", "packed"), whole, "output"))


def column_bytes(problem: ConvProblem, images: int, tile: Tile) -> int:
    """Bytes of the columns of `images` images, a whole number of panels: `e C K^2 roundup(images Ho Wo, nr)`."""
    columns = ceil_div(images * problem.pixels, tile.nr) * tile.nr
    return problem.moved_element * problem.c * problem.taps * columns


def column_cost(problem: ConvProblem, images: int, tile: Tile, workspace: dict[str, int]) -> LoweringCost:
    """The cost of GEMMs over the columns of `images` images at a time, plus the given workspaces."""
    k, blocks = problem.taps * problem.c_group, problem.n // images
    rows = ceil_div(problem.m_group, tile.mr) * tile.mr
    columns = ceil_div(images * problem.pixels, tile.nr) * tile.nr
    weights, total = problem.moved_element * problem.groups * rows * k, sum(workspace.values())
    return LoweringCost(
        gemms=(GemmShape(problem.m_group, images * problem.pixels, k, blocks * problem.groups),),
        macs=blocks * problem.groups * rows * columns * k,
        bytes_moved=activation_bytes(problem) + weights + 2 * total,
        workspace_bytes=total,
        weight_bytes=weights,
        error_growth=k**0.5,
        workspace=workspace,
    )


def unroll(problem: ConvProblem, images: int, tile: Tile, data: te.Tensor, where: str) -> te.Tensor:
    """The columns in panels, `(N / images, panels, *kernel, C, nr)`, `images` images side by side in each block.

    What lies past the last column is copied from some column of the last row: it is multiplied, never stored.
    """
    extents = (images, *problem.out_size)
    columns, panels = prod(extents), ceil_div(prod(extents), tile.nr)
    ragged = columns % tile.nr != 0

    def element(block: Any, p: Any, *index: Any) -> Any:
        taps, c, position = index[:-2], index[-2], p * tile.nr + index[-1]
        image, *out = unflatten(position, extents)
        if ragged and images > 1:
            image = tirx.min(image, images - 1)
        elif ragged and problem.dims > 1:
            out[0] = tirx.min(position // prod(problem.out_size[1:]), problem.out_size[0] - 1)
        at = image if images > 1 else block
        value = read_padded(problem, data, at, window_index(problem, out, taps, padded=False), c, "NCHW")
        if ragged and images == 1 and problem.dims == 1:
            return tirx.if_then_else(position < columns, value, zero(dtype_of(value)))
        return value

    attrs: dict[str, Any] = {COPY_ANNOTATION: where}
    single_row = images == 1 and problem.dims == 1
    if not single_row and (period := period_of(problem.out_size[-1], tile.nr, problem.stride[-1])) is not None:
        attrs[PERIOD_ANNOTATION] = min(period, panels)
    shape = (problem.n // images, panels, *problem.kernel, problem.c, tile.nr)
    return te.compute(shape, element, name="im2col", attrs=attrs)


def pack_rows_stage(problem: ConvProblem, tile: Tile) -> Stage:
    """Weights `(M, *kernel, C/g)` to `[g][(M/g)/mr][*kernel][C/g][mr]`: one step's `mr` elements lie side by side.

    They are A: read one by one, hence `wide`, but for a staged problem.
    """

    def compute(weight: te.Tensor) -> te.Tensor:
        def element(g: Any, t: Any, *index: Any) -> Any:
            taps, c, row = index[:-2], index[-2], t * tile.mr + index[-1]
            value = weight(g * problem.m_group + row, *taps, c)
            if problem.m_group % tile.mr == 0:
                return value
            return tirx.if_then_else(row < problem.m_group, value, zero(dtype_of(value)))

        tiles = ceil_div(problem.m_group, tile.mr)
        shape = (problem.groups, tiles, *problem.kernel, problem.c_group, tile.mr)
        return te.compute(shape, element, name="packed")

    return Stage("packed", ("weight",), compute, "weight", wide=not problem.staged)


def multiply_columns(
    problem: ConvProblem, images: int, tile: Tile, epilogue: Epilogue, columns: te.Tensor, packed: te.Tensor
) -> te.Tensor:
    """`W·L` of every block and group: `(N / images, g, M/g, images Ho Wo)`; the epilogue gets that index."""

    def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
        del g, n
        return packed(at[1], x // tile.mr, *k, x % tile.mr)

    def read_b(at: tuple[Any, ...], g: Any, p: Any, j: Any, k: tuple[Any, ...]) -> Any:
        del g
        return columns(at[0], p, *k[:-1], at[1] * problem.c_group + k[-1], j)

    return tile_gemm(
        outer=(problem.n // images, problem.groups),
        inner=problem.m_group,
        n=images * problem.pixels,
        k_extents=(*problem.kernel, problem.c_group),
        read_a=read_a,
        read_b=read_b,
        tile=tile,
        epilogue=epilogue,
        guard=False,
    )


def _gemm(problem: ConvProblem, tile: Tile, epilogue: Epilogue, columns: te.Tensor, packed: te.Tensor) -> te.Tensor:
    def at_output(value: Any, index: tuple[Any, ...]) -> Any:
        n, g, m, position = index
        return epilogue(value, (n, g * problem.m_group + m, *unflatten(position, problem.out_size)))

    return multiply_columns(problem, 1, tile, at_output, columns, packed)


def gemm_of_images(
    problem: ConvProblem, tile: Tile, epilogue: Epilogue, columns: te.Tensor, packed: te.Tensor
) -> te.Tensor:
    """`W·L` image by image over the columns of all images, for panels of one column: `(N, g, M/g, Ho Wo)`."""
    assert tile.nr == 1, f"a panel of {tile.nr} columns may span two images"
    shape = (problem.n, problem.pixels, *problem.kernel, problem.c, 1)
    own = te.compute(shape, lambda n, p, *index: columns(0, n * problem.pixels + p, *index), name="columns")
    return _gemm(problem, tile, epilogue, own, packed)


def gemm_of_batch(
    problem: ConvProblem, tile: Tile, epilogue: Epilogue, columns: te.Tensor, packed: te.Tensor
) -> te.Tensor:
    """`W·L` over the columns of all images at once, written image by image: `(N, g, M/g, Ho Wo)`."""
    product = multiply_columns(problem, problem.n, tile, no_epilogue, columns, packed)

    def element(n: Any, g: Any, m: Any, position: Any) -> Any:
        value = product(0, g, m, n * problem.pixels + position)
        return epilogue(value, (n, g * problem.m_group + m, *unflatten(position, problem.out_size)))

    shape = (problem.n, problem.groups, problem.m_group, problem.pixels)
    return te.compute(shape, element, name="output", attrs={UNBLOCK_ANNOTATION: 1})
