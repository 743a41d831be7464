"""The gradients of one layer as two compiled functions of NumPy arrays: what a training step needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowering import ConvProblem, DenseProblem
from lowering.backward import GradientProblem, InputGradientProblem, WeightGradientProblem

from .errors import InputError
from .layer import LayerKernel, compile_layer
from .pipeline import resolve_target
from .threads import check_threads, default_threads, use_threads

DTYPES = ("float32", "float64")
ROLES = {"input": InputGradientProblem, "weight": WeightGradientProblem}


@dataclass(frozen=True)
class ConvGradients:
    """Both gradients of a layer, channels last; O is the layer's output, dO the loss's gradient by it.

    The functions keep their workspaces: one thread calls them at a time. `layers` holds the compiled gradients by role,
    with tile, cost and kernels.
    """

    problem: ConvProblem | DenseProblem
    layers: Mapping[str, LayerKernel]
    threads: int

    def input(self, output_gradient: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """dI `(N, *size, C)` from dO `(N, *out, M)` and W `(M, *kernel, C/g)`. The weight is packed at every call."""
        return self._run("input", output_gradient, weight)

    def weight(self, output_gradient: np.ndarray, data: np.ndarray) -> np.ndarray:
        """dW `(M, *kernel, C/g)` from dO `(N, *out, M)` and the layer's input I `(N, *size, C)`."""
        return self._run("weight", output_gradient, data)

    def _run(self, role: str, *given: np.ndarray) -> np.ndarray:
        layer = self.layers[role]
        problem = layer.kernels.problem
        assert isinstance(problem, GradientProblem)
        asked = problem.operand_shapes(layer.kernels.lowering.layout)
        for (name, shape), array in zip(asked.items(), given, strict=True):
            if array.shape != shape or str(array.dtype) != problem.dtype:
                raise InputError(
                    f"the {role} gradient needs {_WORDS[role][name]} as {problem.dtype} {shape}, channels last, "
                    f"got {array.dtype} {array.shape}"
                )
        use_threads(self.threads)
        contiguous = [np.ascontiguousarray(array) for array in given]
        return layer.run(contiguous[0], contiguous[1]).copy()


_WORDS = {
    "input": {"data": "the output's gradient", "weight": "the weight"},
    "weight": {"data": "the output's gradient", "input": "the layer's input"},
}


def conv_gradients(
    problem: ConvProblem | DenseProblem,
    lowering: str | Mapping[str, str] = "implicit-gemm",
    target: Any = "llvm",
    threads: int | None = None,
) -> ConvGradients:
    """Compile the gradients of `problem` by its input and by its weight.

    `lowering` is the key for both, or `{"input": key, "weight": key}`: "implicit-gemm" or "im2col". `threads` run them
    (default: the physical cores that this process may use). Raises InputError for another key or role, for what is no
    such problem, and for a dtype other than float32 and float64.
    """
    if not isinstance(problem, ConvProblem | DenseProblem):
        made = "lowering.conv2d(...), a ConvProblem or a DenseProblem"
        raise InputError(
            f"the gradients are those of a layer, made by {made}; got {type(problem).__name__} {problem!r}"
        )
    if problem.dtype not in DTYPES:
        raise InputError(f"gradients are computed in {' or '.join(DTYPES)}, not in {problem.dtype}; widen the layer")
    if not isinstance(lowering, str | Mapping):
        raise InputError(f'lowering needs a key, or {{"input": key, "weight": key}}; got {lowering!r}')
    threads = default_threads() if threads is None else check_threads(threads)
    keys = dict.fromkeys(ROLES, lowering) if isinstance(lowering, str) else dict(lowering)
    if set(keys) != set(ROLES):
        raise InputError(f'lowering needs a key, or {{"input": key, "weight": key}}; got the roles {sorted(keys)}')
    resolved = resolve_target(target)
    layers = {role: compile_layer(kind(problem), keys[role], resolved) for role, kind in ROLES.items()}
    return ConvGradients(problem, layers, threads)
