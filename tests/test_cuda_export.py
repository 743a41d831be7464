"""Device code without a GPU: compiled by nvcc, its resources read, packed into a library; and what goes wrong."""

from __future__ import annotations

import ctypes
import io
import json
import os
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from models import small_cnn
from tvm.script import tirx as T

import gemmify
from gemmify.commands import verify
from gemmify.cuda import packing, toolchain
from gemmify.cuda.packing import SYMBOL, CudaModule, Packed, device_modules
from gemmify.cuda.resources import KernelResources, parse_resources
from gemmify.errors import GemmifyError, IncompatibleError, InputError
from gemmify.export import write_library
from gemmify.pipeline_build import TIR_PIPELINE, check_launches
from schedules import parse_target

needs_nvcc = pytest.mark.skipif(
    toolchain._search(os.environ.get("PATH", ""), ()) is None, reason="nvcc is not installed (the extra `cuda`)"
)
TEXT = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }\n'


@T.prim_func(s_tir=True)
def plus_one(a: T.Buffer((64,), "float32"), b: T.Buffer((64,), "float32")) -> None:
    T.func_attr({"global_symbol": "plus_one", "tirx.noalias": True})
    block = T.launch_thread("blockIdx.x", 2)
    thread = T.launch_thread("threadIdx.x", 32)
    b[block * 32 + thread] = a[block * 32 + thread] + T.float32(1)


def _built(archs: str) -> Any:
    target = parse_target(f"cuda -arch={archs}")
    return tvm.compile(tvm.IRModule({"plus_one": plus_one}), target=target, tir_pipeline=TIR_PIPELINE), target


def _packed(path: Path) -> Packed:
    """The imports of a library, as the loader will find them: through its symbol."""
    library = ctypes.CDLL(str(path))
    size = ctypes.c_uint64.in_dll(library, SYMBOL)
    assert ctypes.addressof(size) % 64 == 0, "weights are read in place"
    return Packed.unpack(memoryview(ctypes.string_at(ctypes.addressof(size), size.value + 8)))


@needs_nvcc
@pytest.mark.parametrize(
    ("archs", "made_for"),
    [(("sm_90",), ["sm_90"]), (("sm_80", "sm_100"), ["sm_80", "sm_100"]), (("sm_75",), ["sm_75"])],
)
def test_one_image_for_all_architectures_with_what_its_kernels_take(
    archs: tuple[str, ...], made_for: list[str]
) -> None:
    code = toolchain.compile_cuda(TEXT, archs)
    assert code.image[:4] == struct.pack("<I", 0xBA55ED50), "the magic number of a fatbin"
    assert sorted(found.arch for found in code.resources) == sorted(made_for)
    assert all(found.name == "twice" and 0 < found.registers < 32 and not found.spills for found in code.resources)


@needs_nvcc
def test_the_options_keep_accuracy_and_ptx_goes_along_but_for_sm_90_alone() -> None:
    alone, several = toolchain.options(("sm_90",)), toolchain.options(("sm_80", "sm_90"))
    assert not any("fast_math" in word or "fast-math" in word for word in alone + several)
    assert [word for word in alone if "gencode" in word] == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert "-gencode=arch=compute_90,code=compute_90" in several


@needs_nvcc
@pytest.mark.parametrize("archs", ["sm_90", "sm_80,sm_90"])
def test_a_library_holds_machine_code_and_no_text(archs: str, tmp_path: Path) -> None:
    executable, target = _built(archs)
    (source,) = device_modules(executable.mod)
    assert source.format == "cuda" and source.kernels == ("plus_one_kernel",) and b"__global__" in source.code
    path = write_library(executable, target, tmp_path / "kernels.so")
    packed = _packed(path)
    assert [kind for kind, _ in packed.modules] == ["_lib", "cuda"]
    (device,) = packed.cuda_modules()
    assert device.format == "fatbin" and device.kernels == source.kernels and device.table == source.table
    assert device.code == toolchain.compile_cuda(source.code.decode(), tuple(archs.split(","))).image
    assert b"__global__" not in path.read_bytes()


@needs_nvcc
def test_a_network_is_compiled_exported_and_inspected_without_a_gpu(tmp_path: Path) -> None:
    said: list[str] = []
    model = gemmify.compile(
        small_cnn(),
        target="cuda -arch=sm_80",
        cuda_graph=True,
        progress=lambda stage, _seconds: said.append(stage),
        dump_dir=tmp_path / "dump",
    )
    assert said[-2:] == ["build", "nvcc"]
    assert "__global__" in (tmp_path / "dump/5_kernels.cu").read_text()
    path = model.export(tmp_path / "net.so")
    manifest = json.loads((tmp_path / "net.so.json").read_text())
    assert manifest["target"]["arch"] == "sm_80" and manifest["cuda_graph"] is True and manifest["threads"] == 1
    weights = sum(w.size for w in _floats(small_cnn()))
    assert 0 < manifest["memory"]["weights"] <= 4 * weights + 4096 and manifest["memory"]["arena"] > 0
    packed = _packed(path)
    assert [kind for kind, _ in packed.modules] == ["relax.VMExecutable", "_lib", "cuda"]
    assert packed.cuda_modules()[0].format == "fatbin"
    assert b"".join(packed.parts()) == b"".join(Packed.unpack(memoryview(b"".join(packed.parts()))).parts())


def _floats(model: Any) -> list[np.ndarray]:
    from onnx import numpy_helper

    return [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]


def test_a_run_without_a_gpu_is_refused_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmify.cuda import device

    if device.gpu_here() is not None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(gemmify, "compile", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(IncompatibleError, match=r"made for a GPU \(sm_90\), and .*run it where there is one"):
        verify.execute("squeezenet", options={"target": "cuda -arch=sm_90"})


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="a CUDA graph was asked for, and the code is for a CPU"):
        gemmify.compile(small_cnn(), cuda_graph=True)


def test_a_kernel_that_stays_on_the_host_is_named() -> None:
    host = tvm.te.create_prim_func([x := tvm.te.placeholder((4,), name="x"), tvm.te.compute((4,), lambda i: x[i] + 1)])
    check_launches(tvm.IRModule({"plus_one": plus_one}))
    with pytest.raises(GemmifyError, match="kernel lazy launches nothing on the GPU"):
        check_launches(tvm.IRModule({"plus_one": plus_one, "lazy": host}))


# --- nvcc ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is the whole PATH; nothing else holds an nvcc."""
    toolchain._search.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "_packages", list)
    monkeypatch.setattr(toolchain, "_USUAL", tmp_path / "nowhere")
    return tmp_path


def _fake_nvcc(folder: Path, compiles: str) -> Path:
    """An nvcc that knows sm_80, and does `compiles` when it is to compile."""
    path = folder / "nvcc"
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in --version) echo "Cuda compilation tools, release 12.9, V12.9.1";;\n'
        "--list-gpu-arch) echo compute_80;;\n"
        f"*) {compiles};; esac\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    toolchain.toolkit.cache_clear()
    return path


def test_without_nvcc_the_error_says_what_to_install(no_toolkit: Path) -> None:
    with pytest.raises(GemmifyError, match=r"needs nvcc, and none was found; `pip install gemmify\[cuda\]`"):
        toolchain.compile_cuda(TEXT + "// nobody", ("sm_80",))


def test_nvcc_is_found_below_cuda_home_and_in_the_packages(no_toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("home", "package"):
        (no_toolkit / place / "bin").mkdir(parents=True)
        _fake_nvcc(no_toolkit / place / "bin", "exit 0")
    monkeypatch.setattr(toolchain, "_packages", lambda: [no_toolkit / "package"])
    assert toolchain.find_nvcc() == str(no_toolkit / "package/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(no_toolkit / "home"))
    assert toolchain.find_nvcc() == str(no_toolkit / "home/bin/nvcc")
    _fake_nvcc(no_toolkit, "exit 0")
    monkeypatch.setenv("PATH", f"{no_toolkit}:")
    assert toolchain.find_nvcc() == str(no_toolkit / "nvcc"), "the PATH is asked first"


def test_a_compilation_asks_for_nvcc_before_the_work(no_toolkit: Path) -> None:
    said: list[str] = []
    with pytest.raises(GemmifyError, match="needs nvcc"):
        gemmify.compile(small_cnn(), target="cuda -arch=sm_80", progress=lambda stage, _seconds: said.append(stage))
    assert said == []


@pytest.mark.parametrize(
    ("archs", "compiles", "words"),
    [
        (("sm_120",), "exit 0", "nvcc 12.9 makes no code for sm_120; it knows sm_80"),
        (
            ("sm_80",),
            "echo 'k.cu(3): error: no such thing' >&2; echo 'k.cu(4): error: more' >&2; exit 2",
            "no such thing",
        ),
        (("sm_80",), "echo 'cc1plus: fatal error: cuda.h: gone' >&2; exit 1", "install g"),
        (("sm_80",), "echo 'write: No space left on device' >&2; exit 1", "free space in"),
        (("sm_80",), "exit 3", "exit status 3"),
        (("sm_80",), "exit 0", "exit status 0"),  # and no file
    ],
)
def test_the_first_complaint_of_nvcc_is_the_error(
    no_toolkit: Path, archs: tuple[str, ...], compiles: str, words: str
) -> None:
    _fake_nvcc(no_toolkit, compiles)
    with pytest.raises(GemmifyError) as caught:
        toolchain.compile_cuda(f"{TEXT}// {compiles}", archs)
    assert words in str(caught.value) and "error: more" not in str(caught.value)


@needs_nvcc
def test_text_that_nvcc_refuses_leaves_the_old_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable, target = _built("sm_80")
    path = tmp_path / "kernels.so"
    path.write_bytes(b"old")
    broken = packing.pack_imports
    monkeypatch.setattr(
        packing, "pack_imports", lambda module, compiler: broken(module, lambda t: compiler(t + "what?"))
    )
    with pytest.raises(GemmifyError, match="nvcc cannot compile for sm_80"):
        write_library(executable, target, path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["kernels.so"]


def test_resources_are_read_for_every_kernel_and_architecture() -> None:
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemm' for 'sm_90a'
ptxas info    : Function properties for gemm
    16 bytes stack frame, 24 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compile time = 10 ms
ptxas info    : Function properties for helper
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'relu' for 'sm_80'
ptxas info    : Function properties for relu
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, 368 bytes cmem[0]
"""
    gemm, relu = parse_resources(said)
    assert gemm == KernelResources("gemm", "sm_90", 255, 2048, 16, 24, 12) and gemm.spills
    assert relu == KernelResources("relu", "sm_80", 10) and not relu.spills
    assert parse_resources("nothing of the kind") == ()


# --- the binary ------------------------------------------------------------------------------------------------------


def test_a_damaged_binary_is_refused_and_never_read_beyond() -> None:
    executable, _ = _built("sm_80")
    whole = tvm.get_global_func("runtime.ModulePackImportsToTensor")(executable.mod).numpy().tobytes()
    assert b"".join(Packed.unpack(memoryview(whole)).parts()) == whole
    for size in [*range(0, 300, 7), len(whole) - 1]:
        with pytest.raises(ValueError):
            Packed.unpack(memoryview(whole[:size]))
    with pytest.raises(ValueError):
        Packed.unpack(memoryview(whole + b"\0"))
    module = Packed.unpack(memoryview(whole)).modules[1][1]
    assert module is not None and CudaModule.unpack(module).pack() == bytes(module)
    with pytest.raises(ValueError, match="bytes too many"):
        CudaModule.unpack(memoryview(bytes(module) + b"x"))


def test_the_object_file_is_one_that_linkers_take(tmp_path: Path) -> None:
    source = tmp_path / "empty.o"
    command = ["gcc", "-c", "-x", "c", "/dev/null", "-o", str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler")
    data = np.random.default_rng(0).bytes(1001)
    with (tmp_path / "data.o").open("wb") as file:
        packing.write_object(source, iter([data[:600], data[600:]]), file)
    subprocess.run(["gcc", "-shared", "-o", str(tmp_path / "d.so"), str(tmp_path / "data.o")], check=True)
    symbol = (ctypes.c_char * len(data)).in_dll(ctypes.CDLL(str(tmp_path / "d.so")), SYMBOL)
    assert bytes(symbol) == data
    (tmp_path / "text.o").write_text("not an object file, but long enough to hold a header of one, 64 bytes")
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        packing.write_object(tmp_path / "text.o", iter([b"x"]), io.BytesIO())


@needs_nvcc
def test_an_old_gpu_is_compiled_for(tmp_path: Path) -> None:
    """Without asynchronous copies; several kernels of a text share the name of their shared memory."""
    network = gemmify.compile(small_cnn(), target="cuda -arch=sm_75")
    assert network.export(tmp_path / "old.so").is_file()
