"""Which rule schedules what on a GPU: nothing of the zoo or of a lowering is left to the last resort, and all of it
becomes CUDA text. Numbers are in tests/gpu/test_rest.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tvm
from tvm import te, tirx, topi
from tvm.script import tirx as T

from gemmify.frontend import import_model
from gemmify.kernels import on_machine
from gemmify.lower import lower_layers
from gemmify.pipeline import fuse_rest, lowering_graph, resolve_target, user_policy
from gemmify.pipeline_build import TIR_PIPELINE
from gemmify.tuning.choice import Chooser
from gemmify.tuning.use import open_logs
from lowering import LOWERINGS, ConvProblem, DenseProblem, Lowering, Problem, Tile, TransposedConvProblem
from lowering.base import operand_shapes
from schedules import Machine, TargetError, machine_of, parse_target, schedule_func
from schedules.cuda.device import Gpu
from schedules.cuda.rules import SCRATCH, scheduled_by

TARGET = parse_target("cuda -arch=sm_90")
GPU = machine_of(TARGET)
assert isinstance(GPU, Gpu)
RULES = {"gemm", "chain", "rows", "sum", "transpose", "map"}
"""Every rule but the last resorts."""
NETWORKS = ["squeezenet", "mobilenet_v2"]
SLOW = ["googlenet", "alexnet", "resnet50", "vgg16", "vgg19"]


def conv(c: int, m: int, kernel: int, stride: int, groups: int, dtype: str) -> ConvProblem:
    """A layer of odd sizes, padded to its own size."""
    pad = (kernel // 2, kernel // 2)
    return ConvProblem(2, c, m, (9, 11), (kernel, kernel), (stride, stride), pad, pad, (1, 1), groups, dtype)


PROBLEMS: list[Problem] = [
    conv(8, 16, 3, 1, 1, "float16"),
    conv(24, 24, 3, 1, 24, "float32"),
    DenseProblem(5, 33, 17, "float16"),
    TransposedConvProblem(2, 8, 6, (5, 6), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), (0, 0), groups=1, dtype="float32"),
]

SLOW_PROBLEMS = [
    conv(8, 16, 3, 1, 2, "float32"),
    conv(5, 7, 3, 2, 1, "float32"),
    conv(24, 24, 3, 1, 24, "float16"),
    conv(16, 24, 1, 1, 1, "float32"),
]


def cuda_text(funcs: Sequence[tirx.PrimFunc]) -> str:
    """The CUDA source of scheduled functions."""
    named = {f"f{i}": func.with_attr("global_symbol", f"f{i}") for i, func in enumerate(funcs)}
    built = tvm.compile(tvm.IRModule(named), target=TARGET, tir_pipeline=TIR_PIPELINE)
    return str(built.mod.imports[0].inspect_source())


def remaining(network: str) -> dict[str, tirx.PrimFunc]:
    """The functions of a network that are no layer, unscheduled."""
    target = resolve_target("llvm")
    policy = user_policy("auto", False, None, None, None)
    chooser = Chooser(Machine.from_target(target), policy, open_logs(target, 1, None), False)
    mod, _ = lower_layers(lowering_graph(import_model(network, None).mod), chooser)
    functions = fuse_rest(mod, target).functions_items()
    found = {gv.name_hint: func for gv, func in functions if isinstance(func, tirx.PrimFunc)}
    return {name: f for name, f in found.items() if not (f.attrs and f.attrs.get("tirx.is_scheduled"))}


def stages(lowering: Lowering, problem: Problem) -> list[tirx.PrimFunc]:
    """The stages of a lowering as functions, its weights' too."""
    known = {name: (shape, problem.dtype) for name, shape in operand_shapes(problem, lowering.layout).items()}
    made = []
    for stage in lowering.stages(problem, Tile(1, 1)):
        inputs = [te.placeholder(*known[name], name=name) for name in stage.reads]
        output = stage.compute(*inputs)
        known[stage.name] = (tuple(int(extent) for extent in output.shape), str(output.dtype))
        if inputs:  # a table that reads nothing is made by the compiler
            made.append(te.create_prim_func([*inputs, output]))
    return made


def check_rules(funcs: dict[str, tirx.PrimFunc]) -> None:
    """Every function is scheduled by named rules, with the parameters it is said to have, and becomes CUDA (the code of
    products has tests of its own)."""
    scheduled = []
    for name, func in funcs.items():
        made, rules = scheduled_by(func, GPU)
        assert set(rules) <= RULES, (name, rules)
        extra = int(made.attrs[SCRATCH]) if SCRATCH in made.attrs else 0
        assert len(made.params) == len(func.params) + extra
        scheduled += [made] if "gemm" not in rules else []
    text = cuda_text(scheduled)
    assert text.count("__launch_bounds__") >= len(scheduled)


@pytest.mark.parametrize("network", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_rest_of_networks(network: str) -> None:
    funcs = remaining(network)
    assert funcs
    check_rules(funcs)


@pytest.mark.parametrize(
    "problem",
    [*PROBLEMS, *(pytest.param(problem, marks=pytest.mark.slow) for problem in SLOW_PROBLEMS)],
    ids=lambda p: f"{p.op}-{p.dtype}",
)
def test_stages_of_lowerings(problem: Problem) -> None:
    usable = [lowering for lowering in LOWERINGS.values() if lowering.applicable(problem) is None]
    staged = on_machine(problem, GPU)
    funcs = {f"{one.key} {i}": f for one in usable for i, f in enumerate(stages(one, staged))}
    check_rules(funcs)


def build(*tensors: te.Tensor) -> tirx.PrimFunc:
    return te.create_prim_func(list(tensors))


def test_softmax_is_one_kernel_without_scratch() -> None:
    a = te.placeholder((64, 1000), "float16", name="a")
    made, rules = scheduled_by(build(a, topi.nn.softmax(a)), GPU)
    assert rules == ["rows"] and SCRATCH not in made.attrs


def test_rows_too_long_for_shared_memory_take_several_kernels() -> None:
    a = te.placeholder((2, 100_000), "float32", name="a")
    made, rules = scheduled_by(build(a, topi.nn.softmax(a)), GPU)
    assert rules == ["rows", "sum", "map"]  # the exponentials lie in memory
    assert int(made.attrs[SCRATCH]) == len(made.params) - 2 == 2
    assert cuda_text([made]).count("__launch_bounds__") == 2 * len(rules)  # declared and defined


def test_vectors_of_sixteen_bytes() -> None:
    a, b = (te.placeholder((32, 56, 56, 64), "float16", name=name) for name in "ab")
    added = te.compute(a.shape, lambda *i: tirx.max(a(*i) + b(*i), tirx.const(0, "float16")), name="added")
    text = cuda_text([schedule_func(build(a, b, added), GPU)])
    assert text.count("*(uint4*)") >= 3  # two loads, one store


def test_neighbouring_windows_share_loads() -> None:
    """Four pixels of a 3 x 3 window with stride 1 read 3 x 6 vectors, not 4 x 9."""
    a = te.placeholder((32, 114, 114, 64), "float32", name="a")
    func = build(a, topi.nn.pool2d(a, [3, 3], [1, 1], [1, 1], [0, 0, 0, 0], "max", layout="NHWC"))
    made, rules = scheduled_by(func, GPU)
    assert rules == ["sum"] and cuda_text([made]).count("= *(float4*)(a_ptr") == 3 * 6


def test_weights_of_a_depthwise_layer_are_read_as_vectors() -> None:
    problem = ConvProblem(32, 64, 64, (112, 112), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 64, "float32")
    *_, gemm = stages(LOWERINGS["depthwise"], problem)
    text = cuda_text([schedule_func(gemm, GPU)])
    assert text.count("= *(float4*)(packed_ptr") == 9  # 4 channels of 9 weights


def test_transposition_goes_through_shared_memory() -> None:
    a = te.placeholder((32, 64, 56, 56), "float32", name="a")
    made, rules = scheduled_by(build(a, topi.transpose(a, (0, 2, 3, 1))), GPU)
    assert rules == ["transpose"] and "__shared__" in cuda_text([made])


@pytest.mark.parametrize(
    ("key", "rules", "scratch"),
    [
        ("kn2row-aa", ["gemm"], 0),
        ("kn2row-as", ["gemm", "sum"], 1),
        ("winograd-2", ["chain", "gemm", "chain"], 2),
        ("im2row", ["map", "gemm"], 1),
    ],
)
def test_parts_of_a_whole_lowering(key: str, rules: list[str], scratch: int) -> None:
    """The product over all shifts stays in registers; what a lowering stores is scratch between two kernels."""
    lowering = LOWERINGS[key].configured(fused=True) if key == "winograd-2" else LOWERINGS[key]
    *_, last = stages(lowering, conv(8, 16, 3, 1, 1, "float32"))
    made, found = scheduled_by(last, GPU)
    assert found == rules and int(made.attrs.get(SCRATCH, 0)) == scratch


def test_several_results_are_left_to_the_fallback() -> None:
    a = te.placeholder((4, 60), "float32", name="a")
    made, rules = scheduled_by(build(a, topi.argmax(a, axis=1)), GPU)
    assert rules == ["fallback"] and "threadIdx" in cuda_text([made])


def test_tensors_that_32_bits_do_not_index_are_left_to_the_fallback() -> None:
    a = te.placeholder((tirx.IntImm("int64", 1 << 16), tirx.IntImm("int64", (1 << 15) + 8)), "float16", name="a")
    made, rules = scheduled_by(build(a, topi.nn.relu(a)), GPU)
    assert rules == ["fallback"] and "int64_t" in cuda_text([made])
    smaller = te.placeholder((tirx.IntImm("int64", 1 << 16), tirx.IntImm("int64", 1 << 14)), "float16", name="a")
    assert scheduled_by(build(smaller, topi.nn.relu(smaller)), GPU)[1] == ["map"]


def test_a_scan_is_done_by_one_thread() -> None:
    a = te.placeholder((4, 60), "float32", name="a")
    made, rules = scheduled_by(build(a, topi.cumsum(a, axis=1)), GPU)
    assert rules == ["serial"] and "__global__" in cuda_text([made])


@T.prim_func(s_tir=True)
def twice(a: T.Buffer((9,), "float32"), b: T.Buffer((9,), "float32")) -> None:
    kept = T.alloc_buffer((9,), "float32")
    for i in range(8):
        kept[i + 1] = a[i] + a[i + 1]
    for i in range(8):
        b[i] = kept[i + 1]


def test_what_keeps_memory_between_serial_steps_is_refused() -> None:
    text = "cannot be made a kernel of a GPU: it is no set of equations and keeps kept between its steps"
    with pytest.raises(TargetError, match=text):
        schedule_func(twice, GPU)


def test_marked_functions_stay() -> None:
    a = te.placeholder((4, 60), "float32", name="a")
    func: Any = build(a, topi.exp(a)).with_attr("tirx.is_scheduled", True)
    assert schedule_func(func, GPU).same_as(func)
