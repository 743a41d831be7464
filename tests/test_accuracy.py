"""The expected error of every lowering holds on random normal data and is not far from it; `--max-error` is obeyed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx
import pytest
from test_plan import make_model

from gemmify import InputError, cli, compile
from gemmify.accuracy import DEFAULT_MAX_ERROR, UNIT, expected_error, parse_error
from gemmify.conformance import compile_cases
from gemmify.kernels import tile_for
from gemmify.layer import LayerKernel
from gemmify.layer_reference import channels_first, random_arrays, reference
from gemmify.pipeline import plan_model
from gemmify.select import choose, consider, make_policy
from lowering import LOWERINGS, DenseProblem, LoweringCost, Problem, TransposedConvProblem, conv2d
from schedules import Machine, parse_target

TARGET = parse_target("llvm")
MACHINE = Machine.from_target(TARGET)
SEEDS = (0, 1, 2)
TIGHTEST, LOOSEST = 1.5, 10.0
"""The expected error is so many times the measured one, at least and at most."""
FAST = ("winograd", "fft")
PLAIN_CASES = 1
"""Of the lowerings that only add products up in some order, so many cases each are enough."""

CASES: dict[str, Problem] = {
    "3x3": conv2d(48, 14, 14, 32, 3),
    "3x3 of few channels": conv2d(3, 20, 20, 24, 3),
    "5x5": conv2d(24, 14, 14, 32, 5),
    "1x1": conv2d(200, 9, 9, 32, 1, p=0),
    "depthwise": conv2d(32, 14, 14, 32, 3, g=32),
    "fully connected": DenseProblem(3, 3000, 64),
    "transposed": TransposedConvProblem(1, 48, 32, (9, 9), (4, 4), (2, 2), (1, 1), (1, 1), (1, 1), (0, 0)),
}

# (lowering, kernel) -> the most that is expected of a float32 layer of 512 channels (3x3) or 128 (5x5), as stated in
# lowering/README.md.
STATED = {
    ("winograd-2", 3): 4.9e-6,
    ("winograd-4", 3): 3e-5,
    ("winograd-6", 3): 1.31e-4,
    ("winograd-2", 5): 1.2e-5,
    ("winograd-4", 5): 4.4e-5,
}


def measured(layer: LayerKernel) -> float:
    """The largest error over the largest output, on the worst of the seeds."""
    problem, worst = layer.kernels.problem, 0.0
    for seed in SEEDS:
        data, weight = random_arrays(problem, seed)
        want = reference(problem, data, weight)
        if layer.kernels.lowering.layout == "NCHW":
            got = np.moveaxis(layer.run(channels_first(data), weight), 1, -1)
        else:
            got = layer.run(data, weight)
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
    return worst


@lru_cache(maxsize=1)
def errors() -> dict[tuple[str, str], tuple[float, float]]:
    """(lowering, case) -> (measured, expected)"""
    names = {problem: name for name, problem in CASES.items()}
    found = {}
    for key, low in LOWERINGS.items():
        mine = [(problem, ()) for problem in CASES.values() if low.applicable(problem) is None]
        most = None if key.startswith(FAST) else PLAIN_CASES
        for layer in compile_cases(mine[:most], MACHINE, TARGET, [low]):
            problem, cost = layer.kernels.problem, layer.kernels.cost
            found[key, names[problem]] = measured(layer), expected_error(cost, problem.dtype)
    return found


@pytest.mark.parametrize("key", LOWERINGS)
def test_the_measured_error_stays_under_the_expected_one(key: str) -> None:
    mine = {case: pair for (found, case), pair in errors().items() if found == key}
    assert mine, "no case for this lowering"
    for case, (got, expected) in mine.items():
        print(f"{key} on {case}: measured {got:.2e}, expected {expected:.2e}, factor {expected / got:.2f}")
    for case, (got, expected) in mine.items():
        assert TIGHTEST * got <= expected <= LOOSEST * got, f"{case}: measured {got:.2e}, expected {expected:.2e}"


@pytest.mark.parametrize(("key", "kernel"), STATED)
def test_what_minimal_filtering_is_stated_to_err(key: str, kernel: int) -> None:
    problem = conv2d(512 if kernel == 3 else 128, 14, 14, 512, kernel)
    low = LOWERINGS[key]
    expected = expected_error(low.cost(problem, tile_for(low, problem, MACHINE)), problem.dtype)
    assert 0.9 * STATED[key, kernel] < expected <= STATED[key, kernel] < DEFAULT_MAX_ERROR


def test_errors_grow_with_the_tile() -> None:
    for case in ("3x3", "3x3 of few channels"):
        for which in (0, 1):
            by_tile = [errors()[f"winograd-{m}", case][which] for m in (2, 4, 6)]
            assert by_tile == sorted(by_tile) and by_tile[2] > 4 * by_tile[0]


def test_the_unit_is_the_dtypes() -> None:
    cost = LoweringCost((), 0, 0, 0, 0, error_growth=9.0)
    assert expected_error(cost, "float32") == 20 * 2.0**-24
    assert expected_error(cost, "float32") / expected_error(cost, "float64") == UNIT["float32"] / UNIT["float64"]


def test_half_precision_adds_the_rounding_of_the_output_only() -> None:
    cost = LoweringCost((), 0, 0, 0, 0, error_growth=9.0)
    for dtype in ("float16", "bfloat16"):
        assert expected_error(cost, dtype) == expected_error(cost, "float32") + UNIT[dtype]


# --- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1e-3, "nan", "inf", float("inf"), "many", "", True, None, [], 10**400])
def test_bounds_that_are_none(value: object) -> None:
    with pytest.raises(InputError, match="is not a bound on the error"):
        parse_error(value)


def test_a_bound_is_a_positive_number() -> None:
    assert parse_error("1e-4") == parse_error(1e-4) == parse_error(np.float64(1e-4)) == 1e-4 and parse_error(1) == 1
    assert make_policy("auto", False, None, "1e-4").max_error == 1e-4
    with pytest.raises(InputError, match="max_error: 'x' is not a bound"):
        make_policy("auto", False, None, "x")


def test_auto_takes_nothing_above_the_bound() -> None:
    problem = conv2d(64, 56, 56, 64, 3)
    free = choose("a", problem, MACHINE, make_policy("auto", False, None))
    error = expected_error(free.cost, "float32")
    assert error < DEFAULT_MAX_ERROR
    held = choose("a", problem, MACHINE, make_policy("auto", False, None, 0.9 * error))
    assert held.lowering.key != free.lowering.key
    assert expected_error(held.cost, "float32") <= 0.9 * error
    assert f"{free.lowering.key} has an expected error of {error:.1e}, above the bound" in held.why
    out = {c.key: str(c.reason) for c in consider(problem, MACHINE, None, 0.9 * error) if c.exceeds == "error"}
    assert free.lowering.key in out and "the bound is" in out[free.lowering.key]


def test_a_forced_key_above_the_bound_gives_way_or_is_an_error() -> None:
    problem = conv2d(64, 56, 56, 64, 3)
    choice = choose("a", problem, MACHINE, make_policy("winograd-6", False, None, 1e-5))
    assert choice.lowering.key != "winograd-6" and "winograd-6 does not apply: has an expected error" in choice.why
    with pytest.raises(InputError, match=r"layer a: winograd-6 does not apply.*expected error.*what works here"):
        choose("a", problem, MACHINE, make_policy("winograd-6", True, None, 1e-5))
    assert choose("a", problem, MACHINE, make_policy("winograd-6", True, None)).lowering.key == "winograd-6"


def test_a_bound_below_everything_says_what_is_within_reach() -> None:
    problem = conv2d(64, 14, 14, 64, 3)
    with pytest.raises(InputError, match=r"layer a: no lowering is expected to stay below an error of 1.0e-09 .*"
                       r"the most accurate is \S+ with [1-9.]+e-06; raise the bound"):  # fmt: skip
        choose("a", problem, MACHINE, make_policy("auto", False, None, 1e-9))
    with pytest.raises(InputError, match="within 0 bytes of workspace; the most accurate is"):
        choose("a", problem, MACHINE, make_policy("auto", False, 0, 1e-9))


def test_without_a_bound_a_coarse_dtype_keeps_what_is_as_good_as_any() -> None:
    """No output in bfloat16 is good to 1e-3: the bound is then twice the least error of all."""
    problem = conv2d(64, 14, 14, 64, 3)
    cost = LOWERINGS["direct"].cost(problem, tile_for(LOWERINGS["direct"], problem, MACHINE))
    assert expected_error(cost, "bfloat16") > DEFAULT_MAX_ERROR > expected_error(cost, "float16")


def test_the_command_line_takes_the_bound(tmp_path, capfd) -> None:
    path = str(tmp_path / "small.onnx")
    onnx.save(make_model(), path)
    words = ["plan", path, "-o", str(tmp_path / "p.json"), "--lowering", "winograd-6"]
    assert plan_model(path, lowering="winograd-6").plan.layers["stem"] == "winograd-6"
    assert cli.main([*words, "--max-error", "3e-6"]) == 0
    assert "winograd-6 does not apply: has an expected error" in capfd.readouterr().out
    assert cli.main([*words, "--max-error", "3e-6", "--strict"]) == 2
    assert "the bound is 3.0e-06; what works here, best first:" in capfd.readouterr().err
    for verb in ("plan", "compile", "explain", "run", "verify", "bench"):
        assert cli.main([verb, path, "--max-error", "0"]) == 2
        assert "'0' is not a bound on the error" in capfd.readouterr().err
    assert cli.main(["bench", "--suite", "layers", "--max-error", "1e-3"]) == 2
    assert "--max-error belongs to a model" in capfd.readouterr().err
    with pytest.raises(InputError, match="max_error: -1 is not a bound"):
        compile(path, max_error=-1)
