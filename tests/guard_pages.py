"""Every lowering on layers whose tensors lie against pages that may not be touched: a read outside ends the process.

Run as a script; it prints each layer before it runs it, and `done` at the end.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import tvm

from gemmify import guarded
from gemmify.conformance import check, compile_cases
from gemmify.layer import compile_layer
from lowering import LOWERINGS, ConvProblem, DenseProblem, Problem, TransposedConvProblem, conv2d
from lowering.backward import GradientProblem, InputGradientProblem, WeightGradientProblem
from lowering.epilogue import EpilogueOp
from schedules import Machine, parse_target

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

LAYERS: list[Problem] = [
    conv2d(3, 14, 14, 20, 3),
    conv2d(64, 20, 20, 24, 3),
    conv2d(16, 13, 13, 16, 5, n=2),
    conv2d(7, 7, 7, 7, 3, g=7, n=2),
    conv2d(6, 9, 9, 8, 3, 2, g=2),
    ConvProblem(2, 3, 5, (3, 4), (3, 3), (1, 1), (7, 9), (8, 6), (1, 1)),
    ConvProblem(1, 2, 4, (9, 11), (3, 3), (1, 1), (3, 3), (3, 3), (3, 3), 2),
    ConvProblem(1, 16, 33, (1, 17), (1, 3), (1, 1), (0, 1), (0, 1), (1, 1)),
    ConvProblem(1, 3, 8, (200,), (7,), (1,), (3,), (3,), (1,)),
    ConvProblem(1, 3, 4, (5, 9, 6), (1, 5, 1), (1, 1, 1), (0, 2, 0), (0, 2, 0), (1, 1, 1)),
    ConvProblem(1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (0, 0), (1, 1)),
    conv2d(5, 6, 6, 7, 3, dtype="float16"),
    DenseProblem(3, 17, 19),
    TransposedConvProblem(1, 5, 9, (4, 6), (4, 4), (2, 2), (1, 1), (1, 1), (1, 1), (0, 1)),
]
FORWARD = [conv2d(1, 6, 6, 8, 1, n=2), conv2d(2, 5, 5, 17, 3), conv2d(6, 7, 7, 4, 3, 2, g=2)]


def against_a_page(array: np.ndarray, back: bool) -> guarded.Guarded:
    """A copy of `array` that ends, or begins, where a page begins, or ends, that may not be read or written."""
    size = max(array.nbytes, 1)
    room = -(-size // PAGE) * PAGE
    base = _LIBC.mmap(
        None, room + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    _LIBC.mprotect(base, PAGE, 0)
    _LIBC.mprotect(base + PAGE + room, PAGE, 0)
    # Behind the last element at most the 63 bytes to the next boundary at which TVM aligns its tensors.
    start = base + PAGE + ((room - size) // 64 * 64 if back else 0)
    memory = (ctypes.c_char * size).from_address(start)
    view = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
    view[...] = array
    untouched = np.full(1, guarded.poison(str(array.dtype)), array.dtype)
    return guarded.Guarded(tvm.runtime.from_dlpack(view), (untouched, untouched))


def main() -> None:
    """Check every lowering of LAYERS, and both gradients of FORWARD, against a page behind and a page before."""
    target = parse_target("llvm")
    ops = (EpilogueOp("bias", 0), EpilogueOp("add", 1))
    machine = Machine.from_target(target)
    layers = compile_cases([(problem, ops) for problem in LAYERS], machine, target)
    by_predicate = LOWERINGS["implicit-gemm"].configured(pad="predicate")
    padded = [problem for problem in LAYERS if not (by_predicate.applicable(problem) or by_predicate.refuses(problem))]
    layers += compile_cases([(problem, ops) for problem in padded], machine, target, [by_predicate])
    problems = [kind(forward) for forward in FORWARD for kind in (InputGradientProblem, WeightGradientProblem)]
    gradients = [compile_layer(problem, key, target) for problem in problems for key in ("implicit-gemm", "im2col")]
    rng = np.random.default_rng(0)
    for side in ("back", "front"):
        back = side == "back"
        guarded.Guarded.of = staticmethod(lambda array, back=back: against_a_page(array, back))  # type: ignore
        for layer in (*layers, *gradients):
            problem = layer.kernels.problem
            print(side, layer.kernels.lowering.key, problem, flush=True)
            if isinstance(problem, GradientProblem):
                shapes = problem.operand_shapes("NHWC").values()
                layer.run(*(rng.standard_normal(shape).astype("f") for shape in shapes))
                assert not layer.faults()
            else:
                assert (wrong := check(layer, ops)) is None, wrong
    print(f"done, {len(LOWERINGS)} lowerings")


if __name__ == "__main__":
    main()
