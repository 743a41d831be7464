"""The modelled time of a layer on a GPU: what the choice among lowerings rests on where nothing was measured.

    time = max(GEMM, its bytes / bandwidth) + transforms + workspaces, written and read + launches

GEMM: the best of a few block tiles. A tile `bm x bn` computes at `share` of its multiprocessor's peak (a small one
reads more from shared memory and L2 for what it multiplies), partial tiles cost as much as whole ones, and blocks run
in waves of one a multiprocessor; where there are fewer blocks than those, the reduction is cut into parts whose sums a
further launch adds up. The peak is that of the core which would run: tensor cores for operands stored in half
precision, TF32 where it is allowed, else multiply-adds. Reads in chunks of less than 16 bytes slow a core down, tensor
cores more. Workspaces that the L2 holds are read and written faster than memory is.

Seconds of a kernel are right within a factor of about two at best; only ratios on one layer are used. What has
workspaces must be modelled MARGIN times faster than what has none, and so must the definition, which always remains and
otherwise would tie with the GEMM that it is.
"""

from __future__ import annotations

from math import ceil, gcd, prod

from lowering import ConvProblem, DenseProblem, Lowering, LoweringCost, Problem
from lowering.base import GemmShape, activation_shape, output_shape
from lowering.problem import accumulator
from schedules import Gpu

# (bm, bn, share of the peak that its inner loop reaches)
TILES = ((128, 256, 0.85), (128, 128, 0.8), (128, 64, 0.7), (64, 64, 0.55), (64, 32, 0.4), (32, 32, 0.25))
SPLITS = (1, 2, 4, 8, 16)
LEAST_K = 128
"""Steps of the reduction that one part has at least."""
LAUNCH = 3e-6
"""Seconds that a kernel takes beside its work: to be launched, filled and drained."""
FILL = 256
"""Steps of the reduction that filling and draining the pipeline of a block is worth."""
L2_SPEED = 2.5
"""How much faster than memory the L2 gives and takes what it holds."""
CORE_SHARE = 0.2
"""Share of the multiply-adds' peak that a matrix-vector form (depthwise) reaches: each operand serves few of them."""
NARROW = {16: (1.0, 1.0), 8: (1.1, 1.3), 4: (1.3, 2.0), 2: (1.6, 4.0)}
"""By the bytes of a chunk: how much longer a GEMM takes on multiply-adds, and on tensor cores."""
MARGIN = 1.5


def gpu_time(lowering: Lowering, problem: Problem, gpu: Gpu, cost: LoweringCost) -> float:
    """Modelled nanoseconds of `lowering` on `gpu`; `problem` is staged (`kernels.on_machine`) and `cost` its cost."""
    rate, tensor_cores = peak(lowering, problem, gpu)
    gemm, launches = 0.0, len(cost.workspace) + 1
    if lowering.axes(problem).vector_a:
        gemm = cost.macs / (gpu.fma * CORE_SHARE)
    else:
        slow = NARROW[chunk_bytes(problem)][tensor_cores] * cost.read_factor
        for shape in map(lambda found: of_batch(found, problem), cost.gemms):
            seconds, split = gemm_time(shape, gpu, rate)
            gemm += seconds * slow
            launches += split > 1
    own = cost.bytes_moved - 2 * sum(cost.workspace.values())
    moved = sum(2 * size / speed(size, gpu) for size in cost.workspace.values())
    if lowering.layout == "NCHW" and isinstance(problem, ConvProblem):
        # The network's activations are channels last: input and output are converted, each read and written.
        moved += 2 * problem.element * (prod(activation_shape(problem)) + prod(output_shape(problem))) / gpu.bandwidth
        launches += 2
    seconds = max(gemm, own / gpu.bandwidth) + moved + cost.extra_flops / (gpu.fma * CORE_SHARE) + LAUNCH * launches
    margin = MARGIN if cost.workspace or lowering.gemm_formula == "none" else 1.0
    return 1e9 * seconds * margin


def peak(lowering: Lowering, problem: Problem, gpu: Gpu) -> tuple[float, bool]:
    """(multiply-adds a second, whether tensor cores do them) of the GEMM's core."""
    if problem.dtype == "float64":
        return gpu.fma / 2, False
    half = accumulator(problem.dtype) != problem.dtype
    if half and not lowering.computes_operands:
        return gpu.half, True
    return (gpu.tf32, True) if gpu.bfloat16 and (half or gpu.allow_tf32) else (gpu.fma, False)


def chunk_bytes(problem: Problem) -> int:
    """The largest chunk that the GEMM's operands can be copied in: 16 bytes, or what divides a run of channels."""
    channels = problem.c if isinstance(problem, DenseProblem) else problem.c_group
    return max(2, gcd(16, channels * problem.element))


def of_batch(shape: GemmShape, problem: Problem) -> GemmShape:
    """One image's GEMM, `count` times, as one of the whole batch: its pixels are rows, or columns, of all images."""
    if isinstance(problem, DenseProblem) or problem.n == 1 or shape.count % problem.n:
        return shape
    if shape.m == problem.pixels:
        return GemmShape(shape.m * problem.n, shape.n, shape.k, shape.count // problem.n)
    if shape.n == problem.pixels:
        return GemmShape(shape.m, shape.n * problem.n, shape.k, shape.count // problem.n)
    return shape


def gemm_time(shape: GemmShape, gpu: Gpu, rate: float) -> tuple[float, int]:
    """(seconds, parts of the reduction) of the best block tile for one GEMM."""
    best = (float("inf"), 1)
    for bm, bn, share in TILES:
        blocks = ceil(shape.m / bm) * ceil(shape.n / bn) * shape.count
        per_second = rate / gpu.multiprocessors * share
        for split in SPLITS:
            if split > 1 and (blocks * split > 2 * gpu.multiprocessors or shape.k < split * LEAST_K):
                break
            waves = ceil(blocks * split / gpu.multiprocessors)
            seconds = waves * bm * bn * (ceil(shape.k / split) + FILL * rate / gpu.half) / per_second
            if split > 1:
                sums = 4 * shape.m * shape.n * shape.count * (split + 1)
                seconds += sums / speed(sums, gpu) + LAUNCH
            best = min(best, (seconds, split))
    return best


def speed(size: int, gpu: Gpu) -> float:
    """Bytes a second at which a workspace of `size` bytes is written and read."""
    return gpu.bandwidth * (L2_SPEED if size <= gpu.l2_bytes // 2 else 1.0)
