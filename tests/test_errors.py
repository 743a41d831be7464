"""What is refused, in which words, and with which exit code: inputs, libraries, destinations."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import standin

import gemmify
from gemmify import GemmifyError, IncompatibleError, InputError, host
from gemmify import export as export_module
from gemmify.export import check_destination, find_linker
from gemmify.manifest import Manifest, append_manifest
from gemmify.runtime import check_host
from gemmify.verify import compare


@pytest.fixture(scope="module")
def model():
    return standin.model()


@pytest.fixture(scope="module")
def library(model, tmp_path_factory) -> Path:
    return model.export(tmp_path_factory.mktemp("lib") / "net.so")


def refused(error: type[Exception], *parts: str):
    """`error` whose one-line text holds all of `parts`."""
    text = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(error, match=rf"^{text}[^\n]*$")


def image(path: Path) -> bytes:
    """The library's ELF image alone, without the manifest."""
    content = path.read_bytes()
    return content[: struct.unpack("<Q", content[-28:-20])[0]]


def with_manifest(path: Path, manifest: Manifest, into: Path) -> Path:
    into.write_bytes(image(path))
    with into.open("r+b") as file:
        append_manifest(file, manifest)
    return into


# --- inputs ----------------------------------------------------------------------------------------------------------

X = standin.data()


@pytest.mark.parametrize(
    "inputs, parts",
    [
        ({"dta": X}, ["unknown input dta and missing input data", "data: 1x8x64 float32"]),
        ({"data": X, "mask": X}, ["unknown input mask", "takes data"]),
        ({}, ["missing input data"]),
        ([X, X], ["takes 1 inputs", "2 were given"]),
        ({"data": X[:, :4]}, ["must have shape (1, 8, 64)", "got (1, 4, 64)"]),
        ({"data": X.reshape(8, 64)}, ["got (8, 64)", "reshape or transpose"]),
        ({"data": X.astype(np.float64)}, ["must be float32, got float64", "astype('float32')"]),
        ({"data": "text"}, ["must be float32"]),
        (None, ["got NoneType", "the model takes data: 1x8x64 float32"]),
        (3, ["list of arrays, got int"]),
        ({1: X}, ["unknown input 1 and missing input data"]),
    ],
)
def test_inputs_that_do_not_fit(model, inputs, parts):
    with refused(InputError, *parts):
        model.run(inputs)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_thread_counts(model, library, threads):
    for call in (lambda: model.set_threads(threads), lambda: gemmify.load(library, threads)):
        with refused(InputError, "threads must be a whole number of at least 1", repr(threads)):
            call()


def test_more_threads_than_cpus(model, library):
    most = host.usable_cpus()
    for call in (
        lambda: model.set_threads(most + 1),
        lambda: gemmify.load(library, most + 1),
        lambda: gemmify.compile("no such model", threads=most + 1),
    ):
        with refused(InputError, f"{most + 1} threads", f"may use {most} CPUs"):
            call()
    assert model.threads == standin.THREADS


def test_more_threads_than_the_pool_has(model, monkeypatch):
    monkeypatch.setattr(host, "usable_cpus", lambda: 1000)
    with refused(InputError, "1000 threads", "TVM_NUM_THREADS=1000"):
        model.set_threads(1000)
    assert model.threads == standin.THREADS


def test_calls_of_the_wrong_kind(model):
    with refused(InputError, "the destination must be the path of a file, got None"):
        model.export(None)
    with refused(InputError, "must be given as the path of a file, got 3"):
        gemmify.load(3)
    with refused(InputError, "the target must be text", "got 3"):
        gemmify.compile("squeezenet", target=3)
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with refused(TypeError, "cannot be pickled or copied", "gemmify.load"):
            act(model)
    said = f"1 layers, {model.threads} threads>"
    assert (
        repr(model) == f"<gemmify.Model standin: data: 1x8x64 float32 -> {', '.join(map(str, model.outputs))}; {said}"
    )


@pytest.mark.parametrize("repeat, warmup", [(0, 0), (1, -1)])
def test_timing_counts(model, repeat, warmup):
    with refused(InputError, "repeat must be at least 1"):
        model.time(repeat=repeat, warmup=warmup)


# --- libraries -------------------------------------------------------------------------------------------------------


def test_a_missing_file_and_a_folder(tmp_path):
    with refused(InputError, "there is no file", "nothing.so"):
        gemmify.load(tmp_path / "nothing.so")
    with refused(InputError, "is a folder"):
        gemmify.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"text, and a good deal of it " * 40])
def test_a_file_that_is_no_library(tmp_path, content):
    (tmp_path / "a.so").write_bytes(content)
    with refused(InputError, "is not a shared library"):
        gemmify.load(tmp_path / "a.so")


def test_an_executable_is_no_library(tmp_path, library):
    content = bytearray(library.read_bytes())
    content[16:18] = struct.pack("<H", 2)
    (tmp_path / "a.so").write_bytes(content)
    with refused(InputError, "not a shared library"):
        gemmify.load(tmp_path / "a.so")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_image(tmp_path, library, part):
    content = image(library)
    (tmp_path / "a.so").write_bytes(content[: int(part * len(content))])
    with refused(InputError, "cut short"):
        gemmify.load(tmp_path / "a.so")


def test_a_library_without_its_manifest(tmp_path, library):
    content = library.read_bytes()
    for kept in (image(library), content[:-1], content[:-40]):
        (tmp_path / "a.so").write_bytes(kept)
        with refused(InputError, "no gemmify manifest"):
            gemmify.load(tmp_path / "a.so")


def test_a_damaged_manifest(tmp_path, library):
    content = bytearray(library.read_bytes())
    content[-200] ^= 1
    (tmp_path / "a.so").write_bytes(content)
    with refused(InputError, "does not match its checksum"):
        gemmify.load(tmp_path / "a.so")
    (tmp_path / "b.so").write_bytes(image(library) + b"x" + library.read_bytes()[len(image(library)) :])
    with refused(InputError, "parts do not add up"):
        gemmify.load(tmp_path / "b.so")


def test_a_foreign_architecture(tmp_path, library):
    other = 183 if host.host_arch() == "x86_64" else 62
    content = bytearray(library.read_bytes())
    content[18:20] = struct.pack("<H", other)
    (tmp_path / "a.so").write_bytes(content)
    with refused(IncompatibleError, "holds code for", host.host_arch()):
        gemmify.load(tmp_path / "a.so")


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"cpu_features": ("avx1024f", "sse9")}, ["lacks: avx1024f, sse9", "x86-64-v3"]),
        ({"triple": "riscv64-linux-gnu"}, ["code for riscv64"]),
        ({"target": {"kind": "vulkan"}}, ["target vulkan", "CPUs and CUDA only"]),
        ({"tvm": "0.26.1"}, ["made with apache-tvm 0.26.1", "install apache-tvm==0.26.1"]),
        ({"tvm_ffi": "0.9.0"}, ["apache-tvm-ffi 0.9.0"]),
        ({"format": 2}, ["manifest format 2", "reads format 1"]),
    ],
)
def test_libraries_of_other_machines_and_versions(tmp_path, library, model, change, parts, monkeypatch):
    changed = with_manifest(library, replace(model.manifest, **change), tmp_path / "a.so")
    monkeypatch.setattr(os, "dup", lambda _: pytest.fail("its code was about to be loaded"))
    with refused(IncompatibleError, *parts):
        gemmify.load(changed)


def test_a_host_without_a_feature_list_warns(model, monkeypatch):
    monkeypatch.setattr(host, "cpu_flags", lambda: None)
    with pytest.warns(gemmify.GemmifyWarning, match="cannot tell"):
        check_host(replace(model.manifest, cpu_features=("avx2",)))


def test_an_incomplete_manifest():
    with refused(InputError, "incomplete manifest", "inputs"):
        Manifest.from_json('{"format": 1}')
    with refused(InputError, "not JSON"):
        Manifest.from_json("{")
    with refused(IncompatibleError, "format None"):
        Manifest.from_json("[]")


# --- destinations ----------------------------------------------------------------------------------------------------


def test_destinations_that_cannot_be(tmp_path):
    with refused(InputError, "there is no folder", "create it first"):
        check_destination(tmp_path / "no" / "net.so")
    with refused(InputError, "is a folder"):
        check_destination(tmp_path)
    with refused(InputError, "is not writable"):
        check_destination("/proc/net.so")
    with pytest.raises(InputError, match="it is a device"):
        check_destination("/dev/null")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_while_writing_leaves_nothing(tmp_path, model, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_module.os, call, full)
    with refused(GemmifyError, "cannot write", "No space left on device", "free space"):
        model.export(tmp_path / "net.so")
    assert not list(tmp_path.iterdir())


def test_a_linker_that_fills_the_disk(tmp_path, model, monkeypatch):
    """A linker that leaves half a file, complains and fails."""
    (tmp_path / "out").mkdir()
    fake = tmp_path / "fake-cc"
    fake.write_text('#!/bin/sh\necho half > "$4"\necho "ld: final link failed: No space left on device" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with refused(GemmifyError, "cannot link net.so", "No space left on device"):
        model.export(tmp_path / "out" / "net.so")
    assert not list((tmp_path / "out").iterdir())


def test_a_really_full_file_system(tmp_path, model):
    """LLVM would end the process here, were it left to write its objects onto the disk."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", tmp_path]).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        with refused(GemmifyError, "net.so"):
            model.export(tmp_path / "net.so")
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_ctrl_c_while_linking_leaves_nothing(tmp_path, model, monkeypatch):
    def interrupted(*_args, **_kw):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.export(tmp_path / "net.so")
    assert not list(tmp_path.iterdir())


def test_no_linker_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CXX", "my-cxx -m64")
    with refused(GemmifyError, "CXX or CC names my-cxx"):
        find_linker("x86_64-linux-gnu")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda _: None)
    with refused(GemmifyError, "C compiler or a linker", "install gcc", "ziglang"):
        find_linker(f"{host.host_arch()}-linux-gnu")
    with refused(GemmifyError, "cross compiler for riscv64"):
        find_linker("riscv64-linux-gnu")
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda _: True)
    assert "ziglang" in find_linker("riscv64-linux-gnu")


# --- comparing with a reference --------------------------------------------------------------------------------------

ONE = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "got, want, why",
    [
        (ONE, ONE, None),
        (ONE * np.float32(1.00005), ONE, None),
        (ONE * np.float32(1.001), ONE, "relative error 0.001"),
        (ONE * np.nan, ONE, "not finite"),
        (ONE, ONE * np.nan, "not finite"),
        (ONE * np.nan, ONE * np.nan, None),
        (ONE * np.inf, -ONE * np.inf, "not finite"),
        (ONE.T, ONE, "shape (3, 2), the reference has (2, 3)"),
        (np.zeros(3), np.zeros(3), None),
        (np.full(3, 1e-3), np.zeros(3), "relative error 0.001"),
        (np.zeros((0, 3)), np.zeros((0, 3)), None),
    ],
)
def test_compare(got, want, why):
    (row,) = compare(["y"], [got], [want], 1e-4)
    assert row["holds"] is (why is None)
    assert why is None or why in row["why"]


def test_compare_needs_as_many_outputs():
    with refused(InputError, "2 outputs", "its reference 1"):
        compare(["a", "b"], [ONE, ONE], [ONE])


@pytest.mark.parametrize("kind", [GemmifyError, InputError, IncompatibleError, gemmify.CheckError])
def test_exit_codes(kind):
    assert kind.exit_code == (2 if issubclass(kind, InputError) else 1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GemmifyError, InputError, gemmify.UnsupportedError])
def test_errors_pass_through_a_pass_of_tvm_unchanged(kind, model):
    import tvm

    @tvm.transform.module_pass(opt_level=0)
    class Failing:
        def transform_module(self, mod, ctx):
            raise kind("the reason")

    with pytest.raises(kind, match="the reason"):
        tvm.transform.Sequential([Failing()])(tvm.IRModule({}))


def test_a_network_for_another_cpu_exports_but_does_not_run(tmp_path):
    executable, manifest = standin.compiled()
    other = gemmify.Model(replace(manifest, cpu_features=("avx1024f",)), executable=executable)
    path = other.export(tmp_path / "net.so")
    for run in (lambda: other(X), lambda: other.profile(), lambda: other.time(), lambda: gemmify.load(path)):
        with refused(IncompatibleError, "lacks: avx1024f"):
            run()
