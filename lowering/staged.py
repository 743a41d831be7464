"""Problems for machines whose kernels have no scratch of their own: every tensor in between is a workspace.

On a CPU a kernel may keep a panel, a strip or a block of transformed tiles in a buffer that its threads share, or in
one a thread, and half precision is widened once, ahead of a GEMM that reads its operand one element at a time. A GPU
has neither such buffers (what one block writes another cannot wait for) nor such reads (tensor cores take the halves as
they are stored). `as_staged` says so of a problem; a lowering is then built for it in these terms:

    scratch inside a kernel     a workspace of the whole batch, or, where that gives the form its purpose, refused
                                (Winograd may keep it in shared memory where it fits: its free size `fused`)
    workspaces that are moved   in the dtype of the layer's tensors (`Stage.moves`), not of the arithmetic
    workspaces that are computed  in the dtype of the arithmetic
    free sizes                  those that shape scratch inside kernels are gone; padding is a predicate by default

A staged problem has the fields of the plain one and is equal only to staged ones, so that caches keep them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .problem import ConvProblem, DenseProblem, TransposedConvProblem


@dataclass(frozen=True)
class _StagedConv(ConvProblem):
    staged = True


@dataclass(frozen=True)
class _StagedTransposedConv(TransposedConvProblem):
    staged = True


@dataclass(frozen=True)
class _StagedDense(DenseProblem):
    staged = True


_STAGED: dict[type, type] = {
    ConvProblem: _StagedConv,
    TransposedConvProblem: _StagedTransposedConv,
    DenseProblem: _StagedDense,
}


def as_staged(problem: Any) -> Any:
    """`problem` for a machine whose kernels have no scratch of their own; itself where it is staged already, or is no
    layer (a gradient)."""
    made = _STAGED.get(type(problem))
    if made is None:
        return problem
    return made(**{field.name: getattr(problem, field.name) for field in fields(problem)})
