"""`pointwise`: a 1x1 convolution is a GEMM as it stands."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from tvm import te

from .base import Epilogue, GemmAxes, Lowering, LoweringCost, Reason, Stage, Tile, no_epilogue, require_conv
from .free_sizes import Size
from .im2col import unflatten
from .implicit_gemm import ImplicitGemm, conv_gemm, pack_stage
from .problem import ConvProblem, Problem
from .window import copies_input, pad_stage

_FORM = ImplicitGemm()


class Pointwise(Lowering):
    """A 1x1 convolution without padding: `O[n, y, x, m] = sum_c I[n, y s, x s, c] W[m, c]`.

    GEMM `[Ho Wo x C]·[C x M]` straight on the activations, `(N, *size, C)` to `(N, *out, M)`; no workspace, with a
    stride too, because the stride is only an address. Equivalent call: `implicit-gemm` on the same problem. Source:
    Warden 2015, "Why GEMM is at the heart of deep learning".
    """

    key = "pointwise"
    size_names = ("span",)
    summary = "a 1x1 convolution is a GEMM as it stands"
    gemm_formula = "[Ho Wo x C]·[C x M]"
    workspace_formula = "0"
    source = "Warden 2015, Why GEMM is at the heart of deep learning"

    def applicable(self, problem: Problem) -> Reason | None:
        if (reason := require_conv(problem)) is not None:
            return reason
        assert isinstance(problem, ConvProblem)
        if problem.taps != 1:
            return Reason(f"needs a 1x1 kernel, got {'x'.join(map(str, problem.kernel))}")
        if problem.padded:
            return Reason(f"needs padding 0, got {problem.pad_before} before and {problem.pad_after} after")
        return None

    def choices(self, problem: Problem) -> dict[str, tuple[Size, ...]]:
        """`span`: the pixels that a register tile may run along: those of a "row" of the output, of an "image", or of
        the whole "batch". Only rows where a stride makes the next row a jump."""
        assert isinstance(problem, ConvProblem)
        if max(problem.stride) > 1:
            return {}
        images = ("image",) if prod(problem.out_size[:-1]) > 1 else ()
        spans = ("row", *images, *(("batch",) if problem.n > 1 else ()))
        return {"span": spans} if len(spans) > 1 else {}

    def _flat(self, problem: ConvProblem) -> ConvProblem:
        """The problem with the pixels of a span in one row."""
        span, (*outer, inner) = dict(self.sizes).get("span", "row"), problem.out_size
        if span == "row":
            return problem
        images, side = (problem.n, prod(outer) * inner) if span == "image" else (1, problem.n * prod(outer) * inner)
        return replace(problem, n=images, size=(*[1] * len(outer), side))

    def axes(self, problem: Problem) -> GemmAxes:
        assert isinstance(problem, ConvProblem)
        return _FORM.axes(self._flat(problem))

    def cost(self, problem: Problem, tile: Tile) -> LoweringCost:
        assert isinstance(problem, ConvProblem)
        return _FORM.cost(self._flat(problem), tile)

    def build(self, problem: Problem, tile: Tile, epilogue: Epilogue = no_epilogue) -> tuple[Stage, ...]:
        assert isinstance(problem, ConvProblem)
        flat = self._flat(problem)
        if flat is problem:
            return _FORM.build(problem, tile, epilogue)
        return _flattened(problem, flat, tile, epilogue)


def _flattened(problem: ConvProblem, flat: ConvProblem, tile: Tile, epilogue: Epilogue) -> tuple[Stage, ...]:
    """The stages of `flat`, which has the pixels of `problem` in longer rows, on the tensors of `problem`."""
    first = (pad_stage(problem),) if copies_input(problem) else ()

    def pixel(at: Any, x: Any) -> list[Any]:
        """`(n, y, x)`; put together to an address again, the divisions vanish."""
        return unflatten(at * flat.pixels + x, (problem.n, *problem.out_size))

    def gemm(data: te.Tensor, packed: te.Tensor) -> te.Tensor:
        def read_a(at: tuple[Any, ...], x: Any, g: Any, n: Any, k: tuple[Any, ...]) -> Any:
            del n
            return data(*pixel(at[0], x), g * problem.c_group + k[-1])

        def finish(value: Any, index: tuple[Any, ...]) -> Any:
            return epilogue(value, (*pixel(index[0], index[-2]), index[-1]))

        return conv_gemm(flat, tile, finish, read_a, packed)

    source = first[0].name if first else "data"
    return (*first, pack_stage(flat, tile), Stage("gemm", (source, "packed"), gemm, "output"))
