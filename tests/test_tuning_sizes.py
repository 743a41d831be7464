"""The free sizes of the lowerings: every choice computes its layer, in the bytes that its cost says, or is refused."""

from __future__ import annotations

import random
from itertools import islice, product

import pytest
import tvm
import tvm_ffi
from foreign import prim_func, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_problem
from tvm import topi

import lowering
from gemmify.conformance import EPILOGUES, check, compile_cases, scratch_differs
from gemmify.errors import InputError
from gemmify.kernels import layer_kernels
from gemmify.layer import compile_layer
from gemmify.random_layers import accepted
from lowering import LOWERINGS, ConvProblem, Lowering, Problem, Tile, conv2d
from schedules import Machine, parse_target
from schedules.cpu.conditions import branch_conditions
from schedules.cpu.tir_tools import collect

FREE = [key for key, form in LOWERINGS.items() if form.size_names]
DEFAULT_CASES, SLOW_CASES = 3, 24
LAYER = conv2d(12, 14, 14, 24, 3)
TARGET = parse_target("llvm")
MACHINE = Machine.from_target(TARGET)


def some_choice(form: Lowering, problem: Problem, draw: random.Random) -> Lowering:
    """`form` with every free size at a random value, not the default where there is another."""
    free = form.choices(problem)
    return form.configured(**{name: draw.choice(values[1:]) for name, values in free.items()})


def cases(key: str) -> list[tuple[Lowering, Problem]]:
    """Random layers on which lowering `key` leaves something free, each with a choice."""
    draw, form = random.Random(key), LOWERINGS[key]
    found = [p for p in accepted(form, 2 * SLOW_CASES) if form.choices(p) and p.dtype != "bfloat16"]
    return [(some_choice(form, problem, draw), problem) for problem in found]


def wrong(form: Lowering, problem: Problem, number: int) -> list[str]:
    """What is wrong with numbers, workspace, weights or scratch of one choice."""
    ops = EPILOGUES[number % len(EPILOGUES)]
    (layer,) = compile_cases([(problem, ops)], MACHINE, TARGET, [form])
    assert layer.kernels.cost == form.cost(problem, layer.kernels.tile)
    answers = (check(layer, ops), scratch_differs(layer, TARGET))
    return [f"{form.sizes}: {answer}" for answer in answers if answer is not None]


@pytest.mark.parametrize("key", FREE)
def test_random_choices(key: str) -> None:
    given = cases(key)
    assert len(given) >= DEFAULT_CASES
    assert not [w for i, (form, problem) in enumerate(given[:DEFAULT_CASES]) for w in wrong(form, problem, i)]


@pytest.mark.slow
@pytest.mark.parametrize("key", FREE)
def test_more_random_choices(key: str) -> None:
    given = islice(enumerate(cases(key)), DEFAULT_CASES, None)
    assert not [w for i, (form, problem) in given for w in wrong(form, problem, i)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(random_problem(), st.sampled_from(FREE))
def test_choices_are_sound(problem: Problem, key: str) -> None:
    """Names are declared, values differ and are of one kind, the defaults name the lowering itself, and every
    combination has a cost."""
    form = LOWERINGS[key]
    if form.applicable(problem) is not None:
        return
    free = form.choices(problem)
    assert set(free) <= set(form.size_names)
    for values in free.values():
        assert len(values) > 1
        assert len(set(values)) == len(values)
        assert len({type(value) for value in values}) == 1
    plain = form.configured(**{name: values[0] for name, values in free.items()})
    axes = form.axes(problem)
    tile = Tile(axes.inner if axes.mr_divides else 4, 16 if axes.n % 16 == 0 else 1)
    assert plain.axes(problem) == axes
    assert plain.cost(problem, tile) == form.cost(problem, tile)
    for values in islice(product(*free.values()), 50):
        chosen = form.configured(**dict(zip(free, values, strict=True)))
        assert chosen.refuses(problem) is None
        assert chosen.choices(problem) == free
        cost = chosen.cost(problem, Tile(1, 1))
        assert cost.workspace_bytes == sum(cost.workspace.values())


def test_equal_sizes_are_equal() -> None:
    form = LOWERINGS["winograd-4"]
    one, other = form.configured(block=(2, 2), fused=True), form.configured(fused=True).configured(block=[2, 2])  # type: ignore[arg-type]
    assert one == other == lowering.Winograd4(fused=True, block=(2, 2))
    assert len({one, other, form}) == 2
    assert form.sizes == ()


@pytest.mark.parametrize(
    ("key", "sizes", "said"),
    [
        (
            "winograd-4",
            {"block": (3, 5)},
            r"winograd-4 needs block to be one of .*\(4, 4\).* on this layer, got \(3, 5\)",
        ),
        ("winograd-4", {"block": 4}, r"needs block to be one of .* got 4"),
        ("winograd-4", {"fused": 1}, r"needs fused to be one of .*, got 1"),
        ("implicit-gemm", {"pad": "mirror"}, r"needs pad to be one of 'copy', 'predicate' on this layer, got 'mirror'"),
        ("im2row-strip", {"rows": 0}, r"im2row-strip needs rows to be one of .*, got 0"),
        ("kn2row-as", {"rows": 1000}, r"kn2row-as needs rows to be one of .*, got 1000"),
        ("fft", {"points": (9, 9)}, r"fft needs points to be one of .*, got \(9, 9\)"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(key: str, sizes: dict, said: str) -> None:
    form = LOWERINGS[key].configured(**sizes)
    with pytest.raises(ValueError, match=said):
        form.require_sizes(LAYER)
    with pytest.raises(InputError, match=said + "; leave it out for the default"):
        layer_kernels(form, LAYER, MACHINE)
    with pytest.raises(InputError, match=said):
        compile_layer(LAYER, form, TARGET)


def test_a_name_that_no_layer_has_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="winograd-2 has no free size 'blok'; it has block, fused"):
        lowering.Winograd2(blok=(7, 7))
    with pytest.raises(ValueError, match="mec has no free size 'rows'; it has none"):
        LOWERINGS["mec"].configured(rows=2)


def test_a_size_that_is_not_free_on_this_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="implicit-gemm has no choice of pad on this layer; nothing is free there"):
        LOWERINGS["implicit-gemm"].configured(pad="copy").require_sizes(conv2d(8, 9, 9, 8, 3, p=0))


def test_as_a_pass_a_choice_rewrites_what_it_fits() -> None:
    data, weight = tensor(1, 16, 16, 12, name="data"), tensor(3, 3, 12, 24, name="weight")
    mod = tvm.IRModule({"main": prim_func(data, weight, topi.nn.conv2d_nhwc(data, weight, 1, 0, 1))})
    fits = lowering.Winograd4(block=(2, 2))(mod)
    assert not tvm_ffi.structural_equal(fits["main"], mod["main"])
    assert not tvm_ffi.structural_equal(fits["main"], lowering.Winograd4()(mod)["main"])
    assert tvm_ffi.structural_equal(lowering.Winograd4(block=(3, 3))(mod)["main"], mod["main"])


@pytest.mark.parametrize(
    "problem", [conv2d(64, 56, 56, 64, 3), conv2d(512, 7, 7, 512, 3), conv2d(16, 28, 28, 32, 5, 2)]
)
def test_a_predicate_costs_one_test_a_step_of_the_kernel(problem: ConvProblem) -> None:
    """No copy of the input, and no condition left where elements of A are read: only rows of the image are tested."""
    kernels = layer_kernels(LOWERINGS["implicit-gemm"].configured(pad="predicate"), problem, MACHINE)
    assert kernels.cost.workspace_bytes == 0
    assert [kernel.kind for kernel in kernels.kernels] == ["weight", "output"]
    body = kernels.kernels[-1].func.body
    depth = [node for node in collect(body, tvm.tirx.For) if int(node.extent) == problem.c]
    assert depth
    assert not [condition for node in depth for condition in branch_conditions(node.body)]


def test_many_borders_stay_conditions() -> None:
    """Where padding reaches over more tiles than are worth writing out, the code is not: it stays small, and right."""
    problem = ConvProblem(1, 4, 8, (3, 40), (3, 9), (1, 1), (1, 32), (1, 32), (1, 8))
    form = LOWERINGS["implicit-gemm"].configured(pad="predicate")
    kernels = layer_kernels(form, problem, MACHINE, (), Tile(2, 16))
    assert len(collect(kernels.kernels[-1].func.body, tvm.tirx.For)) < 200
    assert not wrong(form, problem, 0)
