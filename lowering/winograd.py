"""`winograd-2`, `winograd-4`, `winograd-6`: minimal filtering, fewer multiplications for small stride-1 kernels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
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
    off_stack,
    require_conv,
)
from .cook_toom import POINTS, amplification
from .free_sizes import Size
from .problem import ConvProblem, Problem
from .window import activation_bytes
from .winograd_tensors import (
    MOST_POSITIONS,
    Form,
    block_choices,
    form_of,
    inverse_apart,
    multiply,
    multiply_apart,
    shared_block,
    tile_edge,
    transform_flops,
    transform_input,
    transform_weight,
)

KERNELS = (1, 3, 5, 7)


def by_x(sizes: Sequence[int]) -> str:
    """`(3, 3)` -> `"3x3"`."""
    return "x".join(map(str, sizes))


class Winograd(Lowering):
    """F(m x m, r x r): each `alpha x alpha` input tile becomes `m x m` outputs through `alpha^2` GEMMs, `alpha = m +
    r - 1`.

        V = B^T d B,  U = G g G^T,  Y = A^T [sum_c U_c * V_c] A
        GEMM: [P x C]·[C x M] for each of the alpha^2 tile positions, P = N ceil(Ho/m) ceil(Wo/m) tiles

    Reads `(N, *size, C)`, writes `(N, *out, M)`: one, two or three dimensions, each with its own kernel size; one whose
    kernel is 1 passes through. Blocks of `Pb` tiles go through transform, GEMM and inverse transform
    together, each transform as one 1-D pass a dimension. Multiplications fall by `(m r / alpha)^2`; weights grow to
    `e alpha^2 C M` and rounding errors with `m`. Source: Lavin & Gray 2015, section 4, algorithm 1 (arXiv 1509.09308).
    """

    m: int
    same_macs = False
    computes_operands = True
    size_names = ("block", "fused")
    gemm_formula = "alpha^2 x [P x C]·[C x M]"
    workspace_formula = (
        "e alpha^2 (P C + threads Pb nr); fused threads e alpha^2 Pb (C + nr); staged e alpha^2 P (C + M), fused 0"
    )
    source = "Lavin & Gray 2015, section 4, algorithm 1 (arXiv 1509.09308)"

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is not None:
            return reason
        assert isinstance(problem, ConvProblem)
        if problem.groups == problem.c:
            return Reason(f"needs more than one channel a group, got groups = C = {problem.groups}")
        for name, value in (("stride", problem.stride), ("dilation", problem.dilation)):
            if any(v != 1 for v in value):
                return Reason(f"needs {name} 1, got {by_x(value)}")
        alpha = [m + k - 1 for m, k in zip(tile_edge(problem, self.m), problem.kernel, strict=True)]
        sizes = problem.taps > 1 and all(k in KERNELS for k in problem.kernel)
        if not sizes or max(alpha) > len(POINTS) + 1 or prod(alpha) > MOST_POSITIONS:
            return Reason(
                f"needs kernel sizes of 1, 3, 5 or 7, not all 1, with tiles of at most {len(POINTS) + 1} a side and "
                f"{MOST_POSITIONS} in all, got {by_x(problem.kernel)}, whose tiles with m = {self.m} are {by_x(alpha)}"
            )
        return None

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        form = self._form(problem)
        # A panel of channels must lie within one group.
        return GemmAxes(
            problem.n * prod(form.blocks) * form.positions * problem.groups,
            form.tiles,
            problem.m_group,
            problem.c_group,
            nr_divides=problem.groups > 1,
            mr_divides=True,
        )

    def choices(self, problem: Problem) -> dict[str, tuple[Size, ...]]:
        """`block`: tiles of a block, one number a dimension; `fused`: the input transform within each block, V in
        scratch of the thread, or ahead of all of them, V in memory. Where the problem is staged, V and the products are
        in memory by default, the tiles of all images side by side; `fused`, offered where they fit (`shared_block`),
        keeps them in shared memory, the whole layer one kernel."""
        assert isinstance(problem, ConvProblem)
        if problem.staged:
            return {} if shared_block(problem, self.m) is None else {"fused": (False, True)}
        usual = form_of(problem, self.m).fused
        blocks = block_choices(problem, self.m)
        return {**({"block": blocks} if len(blocks) > 1 else {}), "fused": (usual, not usual)}

    def _form(self, problem: ConvProblem) -> Form:
        sizes: dict[str, Any] = dict(self.sizes)
        return form_of(problem, self.m, sizes.get("block"), sizes.get("fused"))

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        form = self._form(problem)
        positions, tiles = form.positions, problem.n * prod(form.grid)
        columns = ceil_div(problem.m, tile.nr) * tile.nr
        e = problem.scratch_element
        weights = e * positions * problem.c_group * columns
        workspace = {} if form.fused else {"winograd_input": e * positions * tiles * problem.c}
        if problem.staged and not form.fused:
            workspace["winograd_product"] = e * positions * tiles * problem.m
        blocks = problem.n * prod(form.blocks)
        held = () if problem.staged else (tile.nr, problem.c) if form.fused else (tile.nr,)
        return LoweringCost(
            gemms=(GemmShape(tiles, problem.m_group, problem.c_group, positions * problem.groups),),
            macs=positions * tiles * problem.c_group * columns,
            bytes_moved=activation_bytes(problem) + weights + 2 * sum(workspace.values()),
            workspace_bytes=sum(workspace.values()),
            weight_bytes=weights,
            # The 1 is the rounding of the transforms themselves.
            error_growth=(problem.c_group**0.5 + 1) * prod(map(amplification, form.m, form.r)),
            workspace=workspace,
            extra_flops=tiles * transform_flops(form, problem.c, columns),
            weight_reads=blocks,
            tasks=blocks if not workspace else blocks * (columns // tile.nr),
            thread_bytes=sum(off_stack(e * positions * form.tiles * columns) for columns in held),
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        form = self._form(problem)
        weight = Stage("packed", ("weight",), lambda w: transform_weight(problem, form, tile, w), "weight", wide=True)
        if form.fused:

            def whole(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
                return multiply(problem, form, tile, epilogue, transform_input(problem, form, data), packed)

            return (weight, Stage("gemm", ("data", "packed"), whole, "output"))

        first = Stage("winograd_input", ("data",), lambda data: transform_input(problem, form, data), "workspace")
        if problem.staged:
            return (first, weight, *_apart(problem, form, tile, epilogue))

        def product(v: te.Tensor, packed: te.Tensor) -> te.Tensor:
            return multiply(problem, form, tile, epilogue, v, packed)

        return (first, weight, Stage("gemm", ("winograd_input", "packed"), product, "output"))


def _apart(problem: ConvProblem, form: Form, tile: Tile, epilogue: Epilogue) -> tuple[Stage, ...]:
    """The products and the inverse transform as stages of their own."""

    def product(v: te.Tensor, packed: te.Tensor) -> te.Tensor:
        return multiply_apart(problem, form, tile, v, packed)

    def output(products: te.Tensor) -> te.Tensor:
        return inverse_apart(problem, form, tile, epilogue, products)

    return (
        Stage("winograd_product", ("winograd_input", "packed"), product, "workspace"),
        Stage("gemm", ("winograd_product",), output, "output"),
    )


class Winograd2(Winograd):
    """F(2x2, 3x3) or F(2x2, 5x5): 2.25 or 2.78 times fewer multiplications; the mildest rounding."""

    key, m = "winograd-2", 2
    summary = "minimal filtering, 2x2 outputs a tile"


class Winograd4(Winograd):
    """F(4x4, 3x3) or F(4x4, 5x5): 4 or 6.25 times fewer multiplications."""

    key, m = "winograd-4", 4
    summary = "minimal filtering, 4x4 outputs a tile"


class Winograd6(Winograd):
    """F(6x6, 3x3): 5.06 times fewer multiplications, the largest rounding errors."""

    key, m = "winograd-6", 6
    summary = "minimal filtering, 6x6 outputs a tile"
