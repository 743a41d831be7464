"""Targets of a GPU: what a user may write, what it means, and what is refused in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tvm.target import Target

from gemmify.cuda.archs import arch_name, capability, portable, runs_on, specific
from gemmify.errors import GemmifyError, IncompatibleError, InputError
from gemmify.manifest import archs_of, required_cpu_features, target_archs, target_dict, target_triple
from gemmify.pipeline import resolve_target, threads_for
from schedules import Gpu, TargetError, host_target, machine_of, parse_target
from schedules.cuda.device import known_archs


@pytest.mark.parametrize("arch", known_archs())
def test_every_architecture_makes_a_gpu_with_its_own_limits(arch: str) -> None:
    target = parse_target(f"cuda -arch={arch}")
    gpu = machine_of(target)
    assert isinstance(gpu, Gpu) and gpu.archs == (arch,) and gpu.capability == capability(arch)
    assert int(target.attrs["max_shared_memory_per_block"]) == gpu.shared_per_block > 48 * 1024
    assert gpu.warp_group == (arch == "sm_90") and not gpu.allow_tf32


@pytest.mark.parametrize(
    ("spec", "archs", "tf32"),
    [
        ("cuda -arch=sm_90", ("sm_90",), False),
        ("cuda -arch=sm_90a", ("sm_90",), False),
        ("cuda -arch sm_86,sm_80,sm_86 -tf32", ("sm_80", "sm_86"), True),
        ("cuda -arch=sm_100,sm_90 -tf32=0", ("sm_90", "sm_100"), False),
        ({"kind": "cuda", "arch": ["sm_120", "sm_75"], "tf32": True}, ("sm_75", "sm_120"), True),
        ('{"kind": "cuda", "arch": "sm_80", "libs": ["sm_90", "tf32"]}', ("sm_80", "sm_90"), True),
        ("nvidia/nvidia-a100", ("sm_80",), False),
        (Target({"kind": "cuda", "arch": "sm_90"}), ("sm_90",), False),
    ],
)
def test_what_users_write_survives_every_form_of_a_target(spec: Any, archs: tuple[str, ...], tf32: bool) -> None:
    target = parse_target(spec)
    for same in (target, str(target), json.loads(str(target)), target_dict(target)):
        again = parse_target(same)
        gpu = machine_of(again)
        assert str(again) == str(target)
        assert isinstance(gpu, Gpu) and gpu.archs == target_archs(again) == archs and gpu.allow_tf32 == tf32
    assert archs_of(target_dict(target)) == archs


def test_several_architectures_share_the_least_of_their_limits() -> None:
    both, old, new = (machine_of(parse_target(f"cuda -arch={a}")) for a in ("sm_80,sm_86", "sm_80", "sm_86"))
    assert isinstance(both, Gpu) and isinstance(old, Gpu) and isinstance(new, Gpu)
    assert both.capability == (8, 0)
    assert both.shared_per_block == new.shared_per_block < old.shared_per_block
    assert both.threads_per_sm == new.threads_per_sm < old.threads_per_sm


def test_the_host_is_the_plainest_cpu_unless_another_is_named() -> None:
    plain = resolve_target("cuda -arch=sm_90")
    assert required_cpu_features(plain) == ()
    assert target_triple(plain) == str(host_target().attrs["mtriple"])
    named = resolve_target('cuda -arch=sm_90 -host="llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64-v3"')
    assert str(named.host.attrs["mcpu"]) == "x86-64-v3" and "avx2" in required_cpu_features(named)
    assert str(resolve_target(str(named))) == str(named)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cuda", ["needs an architecture", "cuda -arch=sm_90"]),
        ("cuda -arch=,", ["names no architecture"]),
        ("cuda -arch=sm_77", ["sm_77", "known are sm_75, sm_80"]),
        ("cuda -arch=hopper", ["sm_XX", "'hopper'"]),
        ({"kind": "cuda", "arch": 90}, ["'sm_90'", "got 90"]),
        ("cuda -arch=sm_90 -mcpu=x", ["no option -mcpu", "-tf32"]),
        ("cuda -arch=sm_90 -num-cores=4", ["no option -num-cores"]),
        ("cuda -arch=sm_90 -libs=cudnn", ["library cudnn"]),
        ("cuda -arch=sm_90 -tf32=maybe", ["switch", "'maybe'"]),
        ({"kind": "cuda", "arch": "sm_90", "tf32": "yes"}, ["tf32", "'yes'"]),
        ({"kind": "cuda", "arch": "sm_90", "host": "cuda -arch=sm_90"}, ["llvm target", "got cuda"]),
        ({"kind": "cuda", "arch": "sm_90", "host": "llvm -mcpu=zen9"}, ["no CPU 'zen9'"]),
        ("cuda sm_90", ["expected an option", "'sm_90'"]),
    ],
)
def test_what_cannot_be_compiled_for_is_refused_in_words(spec: Any, words: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        parse_target(spec)
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(InputError):
        resolve_target(spec)


def test_threads_belong_to_a_cpu() -> None:
    target = resolve_target("cuda -arch=sm_90")
    assert threads_for(target, None) == threads_for(target, 1) == 1
    with pytest.raises(InputError, match="2 CPU threads were asked for, but one launches"):
        threads_for(target, 2)


@pytest.mark.parametrize(
    ("archs", "gpu", "runs"),
    [
        (("sm_90",), (9, 0), True),  # compiled as sm_90a: nowhere else
        (("sm_90",), (10, 0), False),
        (("sm_80",), (8, 6), True),
        (("sm_80",), (9, 0), True),  # by its PTX
        (("sm_86",), (8, 0), False),
        (("sm_80", "sm_90"), (12, 0), True),
        (("sm_80", "sm_90"), (7, 5), False),
    ],
)
def test_which_gpus_run_code_for_which_architectures(archs: tuple[str, ...], gpu: tuple[int, int], runs: bool) -> None:
    assert runs_on(archs, gpu) is runs


def test_sm_90_alone_is_compiled_with_its_own_instructions() -> None:
    assert specific(("sm_90",)) == ("sm_90a",) and portable(("sm_90",)) is None
    assert specific(("sm_80", "sm_90")) == ("sm_80", "sm_90") and portable(("sm_90", "sm_100")) == "sm_100"
    assert arch_name(capability("sm_121")) == "sm_121"


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmify.cuda import device

    monkeypatch.setattr(device, "_DRIVER", "libcuda-of-nobody.so.1")
    device._found.cache_clear()
    try:
        assert device.gpu_here() is None
        with pytest.raises(
            IncompatibleError, match=r"net\.so is made for a GPU \(sm_80\), and this machine has no NVIDIA"
        ):
            device.require_archs(("sm_80",), "net.so")
    finally:
        device._found.cache_clear()


def test_a_missing_runtime_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmify.cuda import device

    here = device.HereGpu("a GPU", (9, 0), 132, 1 << 30)
    monkeypatch.setattr(device, "_found", lambda: here)
    monkeypatch.setattr(device, "_runtime", lambda: None)
    monkeypatch.setattr(device, "_registered", lambda _tvm: False)
    assert device.require_archs(("sm_80", "sm_90"), "x") is here
    with pytest.raises(
        GemmifyError, match=r"libcudart\.so\.13, and it was not found; `pip install 'nvidia-cuda-runtime"
    ):
        device.require_gpu(parse_target("cuda -arch=sm_90"))


def test_explain_needs_neither_a_gpu_nor_a_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    from models import small_cnn

    from gemmify.cuda import toolchain
    from gemmify.explain import explain_model

    monkeypatch.setattr(toolchain, "find_nvcc", lambda: pytest.fail("nvcc was asked for"))
    explained = explain_model(small_cnn(), target="cuda -arch=sm_75,sm_90")
    assert [group["names"] for group in explained["layers"]] == [["first/conv"], ["second/conv"], ["fc"]]
