"""`implicit-gemm`: the im2row GEMM whose left operand is never stored."""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

from tvm import te

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
    no_epilogue,
    require_conv,
)
from .free_sizes import Size
from .problem import ConvProblem, Problem, SpatialProblem
from .tile_gemm import ReadA, pack_panels, read_panels, tile_gemm
from .window import activation_bytes, copies_input, pad_bytes, pad_choices, pad_stage, read_padded, window_index


def pack_stage(problem: SpatialProblem, tile: Tile) -> Stage:
    """Weights `(M, *kernel, C/g)` to panels `[g][(M/g)/nr][*kernel][C/g][nr]`."""
    extents = (*problem.kernel, problem.c_group)

    def compute(weight: te.Tensor) -> te.Tensor:
        return pack_panels(weight, problem.groups, problem.m_group, extents, tile.nr)

    return Stage("packed", ("weight",), compute, "weight")


def packed_bytes(problem: SpatialProblem, tile: Tile) -> int:
    """Bytes of the packed weights: `e g roundup(M/g, nr) K^2 C/g`."""
    columns = ceil_div(problem.m_group, tile.nr) * tile.nr
    return problem.element * problem.groups * columns * problem.taps * problem.c_group


def executed_macs(problem: ConvProblem, tile: Tile) -> int:
    """Multiply-adds with the waste of partial tiles: `Wo` rounded up to `mr`, `M/g` to `nr`."""
    *outer, inner = problem.out_size
    rows = problem.n * prod(outer) * ceil_div(inner, tile.mr) * tile.mr
    columns = problem.groups * ceil_div(problem.m_group, tile.nr) * tile.nr
    return rows * columns * problem.taps * problem.c_group


def conv_axes(problem: ConvProblem) -> GemmAxes:
    """A register tile spans the pixels of one output row and the channels of one group."""
    *outer, inner = problem.out_size
    k = problem.taps * problem.c_group
    row = problem.stride[-1] * problem.c * problem.moved_element
    return GemmAxes(problem.n * prod(outer), inner, problem.m_group, k, problem.groups, row_bytes=row)


def conv_cost(problem: ConvProblem, tile: Tile, workspace: dict[str, int]) -> LoweringCost:
    """The cost of one channels-last GEMM an image and group, plus the given workspaces (each written and read once)."""
    gemm = GemmShape(problem.pixels, problem.m_group, problem.taps * problem.c_group, problem.n * problem.groups)
    weights = packed_bytes(problem, tile)
    total = sum(workspace.values())
    return LoweringCost(
        gemms=(gemm,),
        macs=executed_macs(problem, tile),
        bytes_moved=activation_bytes(problem) + weights + 2 * total,
        workspace_bytes=total,
        weight_bytes=weights,
        error_growth=sqrt(gemm.k),
        workspace=workspace,
    )


def conv_gemm(
    problem: ConvProblem, tile: Tile, epilogue: Epilogue, read_a: ReadA, packed: te.Tensor, borders: bool = False
) -> te.Tensor:
    """`[Ho Wo x K^2 C/g]·[K^2 C/g x M/g]` for every image and group, A read by `read_a`, B from `pack_stage`'s
    panels; `borders` as of `tile_gemm`.
    """
    *outer, inner = problem.out_size
    return tile_gemm(
        outer=(problem.n, *outer),
        inner=inner,
        groups=problem.groups,
        n=problem.m_group,
        k_extents=(*problem.kernel, problem.c_group),
        read_a=read_a,
        read_b=read_panels(packed),
        tile=tile,
        epilogue=epilogue,
        borders=borders,
    )


def predicated_stages(problem: ConvProblem, tile: Tile, epilogue: Epilogue) -> tuple[Stage, ...]:
    """The GEMM that reads the input where it lies, under a condition where the layer pads: no workspace."""

    def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
        def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
            del n
            where = window_index(problem, (*at[1:], x), k[:-1], padded=False)
            return read_padded(problem, data, at[0], where, g * problem.c_group + k[-1])

        return conv_gemm(problem, tile, epilogue, read_a, packed, borders=problem.padded)

    return (pack_stage(problem, tile), Stage("gemm", ("data", "packed"), gemm, "output"))


class ImplicitGemm(Lowering):
    """Convolution as one GEMM whose `A` is an address computation: no patch is ever stored.

        O[n, y, x, m] = sum_{kh, kw, c} I[n, y s + kh d - p, x s + kw d - p, c] W[m, kh, kw, c]
        GEMM: m = Ho Wo (per image), n = M/g, k = K^2 C/g, one a group

    Reads `(N, *size, C)` and writes `(N, *out, M)`. Zero padding is a copy of the input (`e N C Hp Wp` bytes), or a
    condition where A is read (`pad="predicate"`); then, and without padding, the workspace is 0. Source: Chetlur et
    al. 2014, cuDNN, section 3 (arXiv 1410.0759).
    """

    key = "implicit-gemm"
    size_names = ("pad",)
    summary = "im2row GEMM whose patches are addresses, never stored"
    gemm_formula = "[Ho Wo x K^2 C]·[K^2 C x M]"
    workspace_formula = "e N C Hp Wp where it pads by copying, else 0"
    source = "Chetlur et al. 2014, cuDNN, section 3 (arXiv 1410.0759)"

    def applicable(self, problem: Problem) -> Reason | None:
        return require_conv(problem)

    def choices(self, problem: Problem) -> dict[str, tuple[Size, ...]]:
        """`pad`: zeros of the padding from a "copy" of the input, or by a "predicate" where A is read."""
        assert isinstance(problem, ConvProblem)
        return pad_choices(problem)

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        return conv_axes(problem)

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        return conv_cost(problem, tile, {"pad": pad_bytes(problem)} if self._copies(problem) else {})

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        if not self._copies(problem):
            return predicated_stages(problem, tile, epilogue)

        def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
            def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
                del n
                where = window_index(problem, (*at[1:], x), k[:-1])
                return data(at[0], *where, g * problem.c_group + k[-1])

            return conv_gemm(problem, tile, epilogue, read_a, packed)

        return (pad_stage(problem), pack_stage(problem, tile), Stage("gemm", ("pad", "packed"), gemm, "output"))

    def _copies(self, problem: ConvProblem) -> bool:
        usual = pad_choices(problem).get("pad", ("copy",))[0]
        return copies_input(problem) and dict(self.sizes).get("pad", usual) != "predicate"
