"""`fft`: convolution by tiles of the discrete Fourier transform (overlap-save)."""

from __future__ import annotations

from math import log2, prod, sqrt
from typing import Any

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
from .fft_form import POINTS, FftForm, chunk_of, form_of, point_choices, reach_of, transform_work
from .fft_tensors import filters, inverse, multiply, spectra
from .free_sizes import Size
from .problem import ConvProblem, Problem
from .window import activation_bytes

# A panel of filters serves only the tiles of one frequency, and comes from far while the products wait. What that
# adds to the time of the GEMM was measured.
COLD_FILTERS = 1.5


def _even(tile: Tile) -> int:
    """Rows of the register tile: the real and the imaginary part of a tile stand together."""
    return max(2, tile.mr - tile.mr % 2)


class Fft(Lowering):
    """Tiles of `Ty x Tx` inputs that overlap by the kernel's reach, transformed; a complex GEMM for every frequency.

        V = F I_tile,  U = conj(F W) / (Ty Tx),  O_tile = F^-1 [sum_c V_c U_c], its first T - d (K - 1) rows and columns
        GEMM: [P x C]·[C x M] complex, for each of the Ty (Tx/2 + 1) frequencies of real data
              = [2 P x 2 C]·[2 C x M] real: row (p, s), column m, and the real and imaginary part of U once

    Reads `(N, H, W, C)`, writes `(N, Ho, Wo, M)`; 1-D likewise, and the third dimension of 3-D, of any stride, is
    summed by the GEMM. Spectra are workspace: `V[ky][kx][slice][tile][part][C]` and
    `Z[ky][kx][slice][tile, part][M]`, `2 e Ty (Tx/2 + 1) P (C + M)` bytes together with `P = N ceil(Ho/(Ty - Kh + 1))
    ceil(Wo/(Tx - Kw + 1))`; the filters' `2 e Ty (Tx/2 + 1) C M` are transformed at compile time. Each thread keeps one
    tile between the two sweeps of a transform, for a cache line of channels. T is chosen for least work.

    Sources: Mathieu, Henaff & LeCun 2013, section 2 (arXiv 1312.5851); Vasilache et al. 2014, section 2 and, for tiles,
    section 6 (arXiv 1412.7580). Departs from both: tiles are much smaller than the image and not powers of two only,
    and a transform is a few small matrix products (`fourier.py`), which is cheapest at these lengths.
    """

    same_macs = False
    computes_operands = True
    size_names = ("points",)
    key = "fft"
    summary = "complex GEMMs between Fourier transforms of overlapping tiles"
    gemm_formula = "T (T/2 + 1) x [2 P x 2 C]·[2 C x M]"
    workspace_formula = "2 e T (T/2 + 1) P (C + M), P = N ceil(Ho/(T-K+1)) ceil(Wo/(T-K+1))"
    source = "Mathieu et al. 2013, section 2 (arXiv 1312.5851); Vasilache et al. 2014, section 2 (arXiv 1412.7580)"

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is not None:
            return reason
        assert isinstance(problem, ConvProblem)
        if problem.staged:
            return Reason("needs scratch of the thread between its passes, got kernels without scratch of their own")
        if any(s != 1 for s in problem.stride[-2:]):
            return Reason(f"needs stride 1 in height and width, got {'x'.join(map(str, problem.stride))}")
        reach = reach_of(problem)
        if max(reach) == 1:
            return Reason(f"needs a kernel above 1 in height or width, got {'x'.join(map(str, problem.kernel))}")
        if max(reach) >= POINTS[-1]:
            return Reason(
                f"needs a kernel that spans at most {POINTS[-1] - 1} inputs a side, got {'x'.join(map(str, reach))}"
            )
        if not _meets_input(problem):
            # All outputs are 0, and errors relative to them are without bound.
            return Reason("needs a kernel whose taps meet the input, got padding under every tap")
        return None

    def choices(self, problem: Problem) -> dict[str, tuple[Size, ...]]:
        """`points`: inputs of a tile along y and x, `(Ty, Tx)`; `(1, Tx)` across a kernel of height 1."""
        assert isinstance(problem, ConvProblem)
        points = point_choices(problem)
        return {"points": points} if len(points) > 1 else {}

    def _form(self, problem: ConvProblem) -> FftForm:
        sizes: dict[str, Any] = dict(self.sizes)
        return form_of(problem, sizes.get("points"))

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        form = self._form(problem)
        return GemmAxes(
            form.frequencies * form.slabs[1],
            2 * form.rows,
            problem.m_group,
            2 * form.kd * problem.c_group,
            problem.groups,
            row_bytes=problem.c * problem.scratch_element,
        )

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        form, e = self._form(problem), problem.scratch_element
        columns = problem.groups * ceil_div(problem.m_group, tile.nr) * tile.nr
        rows = ceil_div(2 * form.rows, _even(tile)) * _even(tile) * form.slabs[1]
        k = 2 * form.kd * problem.c_group
        weights = e * form.frequencies * k * columns
        workspace = {
            "fft_input": 2 * e * form.frequencies * form.tiles_in * problem.c,
            "fft_product": 2 * e * form.frequencies * form.tiles_out * problem.m,
        }
        (ty, tx), (my, _) = form.points, form.step
        chunks = chunk_of(problem.c, e), chunk_of(problem.m, e)
        scratch = [e * lines * (tx + 2) * chunk for lines, chunk in zip((ty, my), chunks, strict=True)]
        tasks = form.tiles_in * problem.c // chunks[0], form.tiles_out * problem.m // chunks[1]
        count = form.frequencies * form.slabs[1] * problem.groups
        return LoweringCost(
            gemms=(GemmShape(2 * form.rows, problem.m_group, k, count),),
            macs=form.frequencies * rows * columns * k,
            bytes_moved=activation_bytes(problem) + weights + 2 * sum(workspace.values()),
            workspace_bytes=sum(workspace.values()),
            weight_bytes=weights,
            error_growth=(sqrt(k) + log2(prod(form.points))) / 2,
            workspace=workspace,
            read_factor=COLD_FILTERS,
            extra_flops=transform_work(problem, form),
            tasks=min(tasks),
            stage_bytes=tuple((off_stack(size), count) for size, count in zip(scratch, tasks, strict=True)),
        )

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        form, tile = self._form(problem), Tile(_even(tile), tile.nr)
        return (
            Stage("fft_input", ("data",), lambda data: spectra(problem, form, data), "workspace"),
            Stage("packed", ("weight",), lambda w: filters(problem, form, tile, w), "weight", wide=True),
            Stage(
                "fft_product",
                ("fft_input", "packed"),
                lambda v, u: multiply(problem, form, tile, v, u),
                "workspace",
            ),
            Stage("output", ("fft_product",), lambda z: inverse(problem, form, epilogue, z), "output"),
        )


def _meets_input(problem: ConvProblem) -> bool:
    """Whether there is a tap of some output that falls on the input and not on its padding, in every dimension."""
    sides = zip(
        problem.size,
        problem.kernel,
        problem.out_size,
        problem.stride,
        problem.dilation,
        problem.pad_before,
        strict=True,
    )
    return all(
        any(0 <= o * s + tap * d - before < size for o in range(out) for tap in range(k))
        for size, k, out, s, d, before in sides
    )
