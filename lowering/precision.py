"""Tensors in half precision around float32 arithmetic: where a value is widened, and where it is narrowed.

A lowering is written for one dtype, `problem.accumulator`. Where the layer's tensors are stored in another
(`problem.widened`: float16, whose 11 digits are too few for sums), its reads and writes change type, not the lowering:

    data, epilogue operands      widened at each read
    weights that are only moved  stay as they are stored, widened where the GEMM reads them (a vector at a time)
    weights that are computed    float32 (`Stage.wide`): rounding them to float16 would cost a transform its digits
    workspaces                   float32, so that nothing is rounded, and no element converted twice, on the way; those
                                 of a staged problem (`lowering.staged`) that are only moved stay as they are stored
    output                       narrowed once, behind the epilogue

where `cost` counts `problem.element` bytes an element of what is stored and `problem.scratch_element` of the rest. An
operand that a GEMM reads one element at a time is dear to widen there, once a panel: such forms copy the input
(`window.wide_stage`). Source of the split: Micikevicius et al. 2018, "Mixed precision training", section 3.3 (arXiv
1710.03740).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tvm import te

from .base import Epilogue, Index, Stage, Tile, dtype_of, no_epilogue
from .problem import DTYPES, accumulator

if TYPE_CHECKING:
    from .base import Lowering


def cast(value: Any, dtype: str) -> Any:
    """`value` in `dtype`; the expression itself where it is of that dtype."""
    return value if dtype_of(value) == dtype else value.astype(dtype)


class Widened:
    """A tensor as a stage sees it: every read of an element gives the accumulator's dtype."""

    def __init__(self, tensor: te.Tensor) -> None:
        self.stored = tensor
        self.dtype = accumulator(str(tensor.dtype))

    def __call__(self, *index: Any) -> Any:
        return self.stored(*index).astype(self.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)


def widened(tensor: te.Tensor) -> Any:
    """`tensor`, or a view of it whose reads are widened where it is stored in half precision."""
    dtype = str(tensor.dtype)
    return Widened(tensor) if dtype in DTYPES and accumulator(dtype) != dtype else tensor


def typed_stages(
    lowering: Lowering[Any], problem: Any, tile: Tile, epilogue: Epilogue = no_epilogue
) -> tuple[Stage, ...]:
    """`lowering.build(problem, tile, epilogue)` for tensors of `problem.dtype`; unchanged where that is the dtype of
    the arithmetic."""
    dtype = problem.dtype
    if accumulator(dtype) == dtype:
        return lowering.build(problem, tile, epilogue)

    def narrowed(value: Any, index: Index) -> Any:
        return cast(epilogue(value, index), dtype)

    staged = getattr(problem, "staged", False)
    stages = lowering.build(problem, tile, narrowed)
    return tuple(replace(stage, compute=_typed(stage, dtype, staged)) for stage in stages)


def _typed(stage: Stage, dtype: str, staged: bool) -> Callable[..., te.Tensor]:
    moved = (stage.kind == "weight" and not stage.wide) or (staged and stage.moves)

    def compute(*tensors: te.Tensor) -> te.Tensor:
        result = stage.compute(*(tensors if moved else map(widened, tensors)))
        if moved and str(result.dtype) == accumulator(dtype):
            # A stage of zeros alone, or one that puts float32 zeros beside the elements that it moves.
            return te.compute(result.shape, lambda *index: cast(result(*index), dtype), name=f"{result.op.name}_stored")
        return result

    return compute
