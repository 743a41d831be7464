"""Targets and machines: what a user writes becomes a checked target, and a target tells its vector unit."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tvm.target import Target, codegen

import schedules
from schedules import Machine, TargetError, host_target, parse_target
from schedules.host import host_caches, host_cores
from schedules.target import hidden_features, name_by_features

SCHEDULES = Path(schedules.__file__).parent


@pytest.mark.parametrize("path", sorted(SCHEDULES.rglob("*.py")), ids=lambda path: path.name)
def test_schedules_import_nothing_of_the_other_packages(path: Path) -> None:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    assert not {name.split(".")[0] for name in names} & {"lowering", "gemmify"}


@pytest.mark.parametrize(
    ("spec", "vector_bytes", "registers", "float_lanes"),
    [
        ("llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64-v4", 64, 32, 16),
        ("llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64-v3", 32, 16, 8),
        ("llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64", 16, 16, 4),
        ("llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64-v4 -mattr=-avx512f", 32, 16, 8),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu"}, 16, 32, 4),
        ("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72", 16, 32, 4),
    ],
)
def test_the_vector_unit_follows_the_target(spec: object, vector_bytes: int, registers: int, float_lanes: int) -> None:
    machine = Machine.from_target(parse_target(spec))  # type: ignore[arg-type]
    assert (machine.vector_bytes, machine.vector_registers) == (vector_bytes, registers)
    assert machine.lanes("float32") == float_lanes
    assert machine.lanes("float64") == float_lanes // 2
    assert machine.lanes("int8") == vector_bytes


def test_the_host_is_complete() -> None:
    machine = Machine.from_target(host_target())
    assert machine.cores == host_cores() >= 1
    assert (machine.l1_bytes, machine.l2_bytes, machine.l3_bytes) == host_caches()
    assert machine.l1_bytes <= machine.l2_bytes
    assert str(parse_target("llvm")) == str(host_target())
    assert int(host_target().attrs["num-cores"]) == machine.cores


def test_options_reach_the_target() -> None:
    target = parse_target("llvm -mcpu x86-64-v3 -num-cores=3 -mattr=-avx2,+sse4.2 -mtriple=x86_64-linux-gnu")
    assert (str(target.attrs["mcpu"]), int(target.attrs["num-cores"])) == ("x86-64-v3", 3)
    assert [str(a) for a in target.attrs["mattr"]] == ["-avx2", "+sse4.2"]
    assert Machine.from_target(target).cores == 3
    assert int(parse_target('{"kind": "llvm", "num-cores": 1}').attrs["num-cores"]) == 1


def test_a_gpu_target_carries_the_host_as_its_host() -> None:
    target = parse_target("cuda -arch=sm_90")
    assert str(target.attrs["arch"]) == "sm_90"
    assert Machine.from_target(target) == Machine.from_target(target.host)
    assert Machine.from_target(target).arch == Machine.from_target(host_target()).arch


def test_what_the_hypervisor_hides_is_found() -> None:
    implied = frozenset({"avx512f", "avx2", "fast-lzcnt"})
    assert hidden_features(implied, {"avx512f": False, "avx2": True}) == ["avx512f"]


@pytest.mark.parametrize(
    ("detected", "beyond", "name"),
    [
        ("rocketlake", ("avx512fp16", "avx512bf16", "amx-tile", "amx-int8", "amx-bf16", "avxvnni"), "sapphirerapids"),
        ("rocketlake", (), "rocketlake"),
        ("znver4", (), "znver4"),
    ],
)
def test_a_core_is_named_by_its_vector_instructions(detected: str, beyond: tuple[str, ...], name: str) -> None:
    config = {"kind": "llvm", "mcpu": detected, "mtriple": "x86_64-linux-gnu"}
    implied = [str(f) for f in codegen.llvm_get_cpu_features(Target(config))]
    every = [str(f) for f in codegen.llvm_get_cpu_features(Target({**config, "mcpu": "graniterapids"}))]
    present = {**dict.fromkeys(every, False), **dict.fromkeys((*implied, *beyond), True)}
    assert name_by_features(config, present) == name


def test_a_target_is_taken_as_it_is() -> None:
    target = Target({"kind": "llvm", "mcpu": "x86-64-v3", "mtriple": "x86_64-linux-gnu"})
    assert parse_target(target).same_as(target)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("llvm -mcpu=zenver4 -mtriple=x86_64-linux-gnu", "did you mean znver4"),
        ({"kind": "llvm", "mcpu": "x86-64-v5", "mtriple": "x86_64-linux-gnu"}, "x86-64-v4"),
        ("llvm -mtriple=x68_64-linux-gnu", "LLVM knows no architecture 'x68_64'; did you mean x86_64"),
        ("foo", "foo"),
        ("llvm -bar=1", "bar"),
        ("llvm mcpu=x", "expected an option"),
        ("llvm -mcpu", "needs a value"),
        ("llvm -num-cores=many", "whole number"),
        ("{no json}", "not valid JSON"),
        ("", "empty"),
        ("a/b", "tags"),
        (Target({"kind": "vulkan"}), "a Machine describes a CPU"),
    ],
)
def test_a_wrong_target_is_refused_in_words(spec: object, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        Machine.from_target(parse_target(spec))  # type: ignore[arg-type]
