"""The gradients of a layer by its input and by its weights: every lowering against float64 and finite differences.

The float64 reference is written from the definition alone, one matrix product a tap; on small layers it is itself held
against central differences of the forward reference. Everything that a kernel writes is NaN beforehand.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from oracle import UNIT, random_conv, random_dense, reference
from tvm import te

import gemmify
import lowering
from gemmify.conformance import compile_cases
from gemmify.kernels import layer_kernels
from gemmify.layer import LayerKernel, compile_layer
from gemmify.pipeline_build import kernel_workspace_bytes
from lowering import ConvProblem, DenseProblem, Tile, conv2d
from lowering.backward import (
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    GradientProblem,
    InputGradientProblem,
    WeightGradientProblem,
    definition,
    lowerings_of,
)
from lowering.backward.split import MAX_CHUNKS, split_of
from schedules import Machine, parse_target

GRADIENTS = (InputGradientProblem, WeightGradientProblem)
PROBLEMS, BATCH = 240, 12
PARTS = [pytest.param(i, marks=[] if i < 1 else pytest.mark.slow) for i in range(PROBLEMS // BATCH)]
KINDS = pytest.mark.parametrize("kind", GRADIENTS)

# What a gradient gets wrong easily: each a small layer.
NAMED: dict[str, ConvProblem | DenseProblem] = {
    "rows that no window reads": conv2d(5, 12, 11, 7, 3, 4, 0),
    "stride above the kernel": conv2d(4, 10, 10, 6, 2, 3, 0),
    "stride 2, odd": conv2d(8, 9, 9, 16, 3, 2),
    "dilation and stride": conv2d(6, 13, 13, 5, 3, 2, 2, d=2),
    "pads beyond the kernel": ConvProblem(1, 3, 4, (5, 6), (2, 3), (1, 2), (3, 0), (0, 4), (1, 1)),
    "groups": conv2d(12, 7, 7, 18, 3, g=3, n=2),
    "depthwise": conv2d(16, 9, 9, 16, 3, 2, g=16),
    "depthwise with a multiplier": conv2d(7, 8, 8, 14, 3, g=7),
    "first layer": conv2d(3, 19, 19, 32, 7, 2, 3),
    "pointwise": conv2d(20, 6, 6, 33, 1, n=3),
    "many pixels, few sums": conv2d(3, 40, 36, 4, 3, n=2),
    "1-D, one row": ConvProblem(1, 5, 6, (300,), (4,), (1,), (2,), (1,), (1,)),
    "3-D": ConvProblem(2, 4, 6, (4, 5, 6), (2, 3, 3), (1, 2, 1), (0, 1, 1), (1, 1, 0), (1, 1, 2)),
    "double": conv2d(9, 8, 8, 10, 3, n=2, dtype="float64"),
    "fully connected": DenseProblem(6, 19, 33),
    "fully connected, one row": DenseProblem(1, 40, 17, "float64"),
}


def windows(conv: ConvProblem) -> Any:
    """For each tap: its index and the slices of the padded input that it reads at all output positions."""
    for tap in np.ndindex(*conv.kernel):
        sides = zip(tap, conv.dilation, conv.out_size, conv.stride, strict=True)
        yield tap, (slice(None), *(slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in sides))


def groups(conv: ConvProblem) -> Any:
    for g in range(conv.groups):
        yield slice(g * conv.m_group, (g + 1) * conv.m_group), slice(g * conv.c_group, (g + 1) * conv.c_group)


def gradient(problem: GradientProblem, data: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The gradient in float64, by its definition."""
    data, second = data.astype("float64"), second.astype("float64")
    conv = problem.forward
    by_input = isinstance(problem, InputGradientProblem)
    if isinstance(conv, DenseProblem):
        return data @ second if by_input else data.T @ second
    frame = [(0, 0), *zip(conv.pad_before, conv.pad_after, strict=True), (0, 0)]
    if not by_input:
        padded, result = np.pad(second, frame), np.zeros(problem.weight_size())
        for tap, window in windows(conv):
            for m, c in groups(conv):
                result[(m, *tap)] = np.einsum("pm,pc->mc", _rows(data[..., m]), _rows(padded[window][..., c]))
        return result
    padded = np.zeros((conv.n, *conv.padded_size, conv.c))
    for tap, window in windows(conv):
        for m, c in groups(conv):
            padded[window][..., c] += data[..., m] @ second[(m, *tap)]
    return padded[tuple(slice(b, size - a) for (b, a), size in zip(frame, padded.shape, strict=True))]


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1])


def arrays(problem: GradientProblem, seed: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(problem.dtype) for shape in problem.operand_shapes().values()]


def wrong(layer: LayerKernel) -> str | None:
    """What is wrong with a compiled gradient, or None: its numbers, its bytes of workspace and of weights."""
    kernels = layer.kernels
    problem, cost = kernels.problem, kernels.cost
    where = f"{kernels.lowering.key} {kernels.tile} {problem}"
    given = arrays(problem)
    want = gradient(problem, *given)
    got = layer.run(*given)
    limit = 2 * UNIT[problem.dtype] * (cost.error_growth + 2) * gradient(problem, *(np.abs(a) for a in given)).max()
    packed = sum(kernel.bytes for kernel in kernels.kernels if kernel.kind == "weight")
    stored = {kernel.name: kernel.bytes for kernel in kernels.kernels if kernel.kind == "workspace"}
    if got.shape != want.shape or got.dtype != problem.dtype:
        return f"{where}: {got.dtype} {got.shape}"
    if stored != cost.workspace or sum(stored.values()) != cost.workspace_bytes or packed != cost.weight_bytes:
        return f"{where}: {stored} and {packed} bytes of weights, cost says {cost.workspace} and {cost.weight_bytes}"
    # A NaN compares as False: it must fail.
    error = float(np.max(np.abs(got - want)))
    return None if error <= limit else f"{where}: error {error:.2e}, limit {limit:.2e}"


def check(problems: Sequence[GradientProblem], target: tvm.target.Target) -> None:
    machine, failures = Machine.from_target(target), []
    for kind, table in ((InputGradientProblem, INPUT_GRADIENT), (WeightGradientProblem, WEIGHT_GRADIENT)):
        cases: list[Any] = [(problem, ()) for problem in problems if isinstance(problem, kind)]
        layers = compile_cases(cases, machine, target, list(table.values()))
        assert len(layers) == len(cases) * len(table)
        failures += [found for layer in layers if (found := wrong(layer)) is not None]
    assert not failures, "\n".join(failures)


@KINDS
def test_kernels_take_no_scratch(kind: Any, target: tvm.target.Target) -> None:
    for forward in (
        conv2d(12, 9, 9, 20, 3, 2, g=2, n=2),
        conv2d(3, 19, 19, 32, 7, 2, 3),
        conv2d(16, 9, 9, 16, 3, g=16),
    ):
        for low in lowerings_of(kind(forward)).values():
            kernels = layer_kernels(low, kind(forward), Machine.from_target(target))
            module = tvm.IRModule({f"k{i}": kernel.func for i, kernel in enumerate(kernels.kernels)})
            assert kernels.cost.thread_bytes == 0 and not kernel_workspace_bytes(module, target), low.key


@pytest.fixture(scope="module")
def target() -> tvm.target.Target:
    return parse_target("llvm")


@lru_cache(maxsize=1)
def random_gradients() -> list[GradientProblem]:
    found: dict[GradientProblem, None] = {}

    @settings(
        max_examples=4 * PROBLEMS,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(random_conv(200_000), random_dense())
    def collect(conv: ConvProblem, dense: DenseProblem) -> None:
        if conv.widened or dense.widened:  # gradients are float32 or float64
            return
        kind = GRADIENTS[len(found) % 2]
        found.setdefault(kind(dense if len(found) % 16 == 15 else conv))

    collect()
    problems = list(found)[:PROBLEMS]
    random.Random(0).shuffle(problems)
    return problems


@pytest.mark.parametrize("part", PARTS)
def test_random_gradients(part: int, target: tvm.target.Target) -> None:
    problems = random_gradients()
    assert len(problems) == PROBLEMS
    check(problems[part * BATCH : (part + 1) * BATCH], target)


@KINDS
def test_what_a_gradient_gets_wrong_easily(kind: Any, target: tvm.target.Target) -> None:
    check([kind(forward) for forward in NAMED.values()], target)


@pytest.mark.parametrize("name", NAMED)
def test_the_reference_is_the_derivative(name: str) -> None:
    """Central differences of `L = sum(O G)` through the forward reference: exact for a linear function but rounding."""
    forward = NAMED[name]
    by_weight, by_input = WeightGradientProblem(forward), InputGradientProblem(forward)
    rng = np.random.default_rng(1)
    given = rng.standard_normal(by_input.input_size())
    weight = rng.standard_normal(by_weight.weight_size())
    chosen = rng.standard_normal(by_input.output_size())

    def loss() -> float:
        return float((reference(forward, given, weight) * chosen).sum())

    for tensor, found in ((given, gradient(by_input, chosen, weight)), (weight, gradient(by_weight, chosen, given))):
        for place in rng.choice(tensor.size, min(tensor.size, 12), replace=False):
            at, step = np.unravel_index(place, tensor.shape), 1e-3
            kept = tensor[at]
            sides = []
            for tensor[at] in (kept + step, kept - step):
                sides.append(loss())
            tensor[at] = kept
            numeric = (sides[0] - sides[1]) / (2 * step)
            assert abs(numeric - found[at]) < 1e-8 * (1 + np.abs(chosen).sum()), (name, at)


@KINDS
def test_definitions(kind: Any, target: tvm.target.Target) -> None:
    """The tensor expressions, built as they stand."""
    problems = [kind(forward) for forward in NAMED.values()]
    functions = {
        f"f{i}": te.create_prim_func(definition(problem)).with_attr("global_symbol", f"f{i}")
        for i, problem in enumerate(problems)
    }
    module = tvm.compile(tvm.IRModule(functions), target=target)
    for i, problem in enumerate(problems):
        given = arrays(problem)
        result = tvm.runtime.tensor(np.full(problem.result_shape(), np.nan, problem.dtype))
        module[f"f{i}"](*(tvm.runtime.tensor(array) for array in given), result)
        np.testing.assert_allclose(result.numpy(), gradient(problem, *given), atol=2e-4)


@KINDS
def test_names_and_descriptions(kind: Any) -> None:
    """Key "implicit-gemm": class ImplicitGemm in implicit_gemm.py, one row in the README with its formulas."""
    text = (Path(lowering.__file__).parent / "README.md").read_text(encoding="utf-8")
    by = "input" if kind is InputGradientProblem else "weight"
    for key, low in lowerings_of(kind(conv2d(3, 8, 8, 4, 3))).items():
        assert type(low).__name__.lower() == key.replace("-", "") and low.layout == "NHWC"
        assert Path(inspect.getfile(type(low))).stem == key.replace("-", "_")
        assert f"| {by} | `{key}` | `{low.gemm_formula}` | `{low.workspace_formula}` | {low.source} |" in text


@KINDS
def test_costs_are_consistent(kind: Any) -> None:
    for problem in [kind(forward) for forward in NAMED.values()]:
        for low in lowerings_of(problem).values():
            tile = Tile(4, 8 if low.axes(problem).n % 8 == 0 else 1)
            cost = low.cost(problem, tile)
            assert cost == low.cost(problem, tile) and cost.workspace_bytes == sum(cost.workspace.values())
            stages = low.build(problem, tile)
            assert {s.name for s in stages if s.kind == "workspace"} == set(cost.workspace)
            assert stages[-1].kind == "output" and set(stages[0].reads) <= set(problem.operand_shapes())
            assert cost.error_growth >= 1 and cost.bytes_moved >= 2 * cost.workspace_bytes
            if kind is WeightGradientProblem:
                assert sum(gemm.macs for gemm in cost.gemms) == problem.macs <= cost.macs


def test_the_workspace_formulas() -> None:
    """Worked by hand for 32 or 3 channels of 10x12 to 16, 3x3, stride 1, pad 1, float32: one chunk, a 4 x 16 tile."""
    conv, few = conv2d(32, 10, 12, 16, 3), conv2d(3, 10, 12, 16, 3)
    assert split_of(WeightGradientProblem(conv)).chunks == split_of(WeightGradientProblem(few)).chunks == 1
    tile = Tile(4, 16)
    by_hand = {
        ("weight", "implicit-gemm", conv): 4 * 32 * 12 * 14,
        ("weight", "implicit-gemm", few): 4 * 3 * 12 * 14 + 4 * 16 * 9 * 3,
        ("weight", "im2col", conv): 4 * 9 * 32 * 10 * 12,
        ("weight", "im2col", few): 4 * 9 * 3 * (10 * 12 + 1) + 4 * 16 * 9 * 3,
        ("input", "implicit-gemm", conv): 4 * 16 * 12 * 14,
        ("input", "im2col", conv): 4 * 10 * 12 * 9 * 32,
    }
    for (which, key, conv), size in by_hand.items():
        problem = WeightGradientProblem(conv) if which == "weight" else InputGradientProblem(conv)
        assert lowerings_of(problem)[key].cost(problem, tile).workspace_bytes == size, (which, key)


def test_chunks_are_equal_and_bounded() -> None:
    for problem in random_gradients():
        if isinstance(problem, WeightGradientProblem):
            split = split_of(problem)
            assert 1 <= split.chunks <= MAX_CHUNKS and split.chunks * split.pixels == problem.reduction
    assert split_of(WeightGradientProblem(conv2d(3, 112, 112, 64, 7, 2))).chunks >= 4, "a small result needs chunks"
    assert split_of(WeightGradientProblem(conv2d(512, 7, 7, 512, 3))).chunks == 1, "a large one has tiles enough"


def test_another_problem_is_refused(target: tvm.target.Target) -> None:
    conv = conv2d(3, 8, 8, 4, 3)
    for table, other in ((INPUT_GRADIENT, WeightGradientProblem(conv)), (WEIGHT_GRADIENT, conv)):
        for low in table.values():
            assert "needs the gradient of a layer" in str(low.applicable(other))
    with pytest.raises(gemmify.InputError, match="'mec' is not one of implicit-gemm, im2col"):
        compile_layer(WeightGradientProblem(conv), "mec", target)


@pytest.mark.parametrize("key", ["implicit-gemm", "im2col"])
def test_conv_gradients(key: str) -> None:
    conv = conv2d(6, 11, 9, 8, 3, 2)
    by_input, by_weight = InputGradientProblem(conv), WeightGradientProblem(conv)
    found = gemmify.conv_gradients(conv, lowering=key)
    for seed in (1, 2):
        output_gradient, given = arrays(by_weight, seed)
        weight = arrays(by_input, seed)[1]
        for got, want in (
            (found.input(output_gradient, weight), gradient(by_input, output_gradient, weight)),
            (found.weight(output_gradient, given), gradient(by_weight, output_gradient, given)),
        ):
            np.testing.assert_allclose(got, want, atol=1e-4)
    with pytest.raises(gemmify.InputError, match=r"needs .*\(1, 6, 5, 8\)"):
        found.weight(output_gradient[:, 1:], given)


def test_conv_gradients_of_something_else_is_refused() -> None:
    with pytest.raises(gemmify.InputError, match="float32 or float64, not in float16"):
        gemmify.conv_gradients(conv2d(3, 8, 8, 4, 3, dtype="float16"))
    for wrong in ([1, 2], "conv", None):
        with pytest.raises(gemmify.InputError, match="the gradients are those of a layer"):
            gemmify.conv_gradients(wrong)  # type: ignore[arg-type]
    with pytest.raises(gemmify.InputError, match="lowering needs a key"):
        gemmify.conv_gradients(conv2d(3, 8, 8, 4, 3), lowering=3)  # type: ignore[arg-type]
