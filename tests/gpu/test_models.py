"""Whole networks on a CUDA device: compiled, run, exported, loaded in a fresh process, repeated as a graph, refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest
from models import make_model, single, small_cnn
from onnx import helper

import gemmify
from gemmify.commands import verify
from gemmify.runtime import random_inputs
from gemmify.verify import reference_outputs

CLOSE = 1e-5
"""Of the largest output: sums of float32 in another order."""
FRESH = """
import sys, numpy as np, gemmify
model = gemmify.load(sys.argv[1])
inputs = dict(np.load(sys.argv[2]))
got = model.run(inputs)
np.savez(sys.argv[3], **{spec.name: array for spec, array in zip(model.outputs, got)})
import tvm.base
compiler = [name for name in ("onnx", "lowering", "schedules", "tvm.relax") if name in sys.modules]
print(tvm.base._RUNTIME_ONLY, compiler)
"""
REFUSED = """
import sys, gemmify
try:
    gemmify.load(sys.argv[1])
except gemmify.IncompatibleError as error:
    print(error)
"""


def _arch() -> str:
    import tvm

    return "sm_" + str(tvm.cuda(0).compute_version).replace(".", "")


@pytest.fixture(scope="module")
def network() -> Any:
    return gemmify.compile(small_cnn(), target=f"cuda -arch={_arch()}")


@pytest.fixture(scope="module")
def library(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(network.export(tmp_path_factory.mktemp("gpu") / "net.so"))


def _python(script: str, *words: str, **device: int) -> str:
    environment = emulator.environment(**device) if emulator.active() else dict(os.environ)
    path = os.pathsep.join([str(Path(gemmify.__file__).parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not registered" not in done.stderr
    return done.stdout.strip()


def _assert_close(got: list[np.ndarray], inputs: dict[str, np.ndarray], model: Any, names: list[str]) -> None:
    want, _ = reference_outputs(model, inputs, names, "float64")
    for have, ref in zip(got, want, strict=True):
        assert have.shape == ref.shape and np.abs(have - ref).max() <= CLOSE * np.abs(ref).max()


def test_a_network_computes_what_its_model_says_again_and_again(network: Any) -> None:
    names = [spec.name for spec in network.outputs]
    for seed in (1, 2):
        inputs = random_inputs(network.inputs, seed)
        _assert_close(network.run(inputs), inputs, small_cnn(), names)
    assert network.threads == 1 and _arch() in network.device


def test_an_exported_library_runs_in_a_fresh_process_without_the_compiler(library: Path, tmp_path: Path) -> None:
    inputs = {"x": np.random.default_rng(3).standard_normal((1, 3, 12, 12)).astype(np.float32)}
    np.savez(tmp_path / "in.npz", **inputs)
    said = _python(FRESH, str(library), str(tmp_path / "in.npz"), str(tmp_path / "out.npz"))
    assert said == "True []"
    got = np.load(tmp_path / "out.npz")
    _assert_close([got[name] for name in got.files], inputs, small_cnn(), got.files)


def test_a_recorded_graph_gives_the_same_bits_for_every_input(library: Path) -> None:
    plain, graph = gemmify.load(library), gemmify.load(library, cuda_graph=True)
    for seed in (4, 5, 4):
        inputs = random_inputs(plain.inputs, seed)
        for one, other in zip(plain.run(inputs), graph.run(inputs), strict=True):
            assert one.tobytes() == other.tobytes()
    assert len(graph.time(repeat=3, warmup=1)) == 3


def test_two_models_and_a_graph_do_not_disturb_one_another(library: Path) -> None:
    models = [gemmify.load(library, cuda_graph=graph) for graph in (True, False, True)]
    inputs = [random_inputs(models[0].inputs, seed) for seed in range(3)]
    alone = [models[1].run(given)[0] for given in inputs]
    for _ in range(2):
        for model, given, want in zip(models, inputs, alone, strict=True):
            assert model.run(given)[0].tobytes() == want.tobytes()


def test_every_kernel_is_profiled_and_none_runs_on_the_host(network: Any) -> None:
    rows = network.profile(repeat=2)
    called = [name for layer in network.layers for name in layer["kernels"]]
    assert set(called) <= {name for name, _ in rows}
    assert all(seconds > 0 for _, seconds in rows)
    assert not [name for name, _ in rows if name.startswith(("gemmify_", "vm."))]


def test_names_that_c_does_not_take_are_no_obstacle() -> None:
    nodes = [
        helper.make_node("Relu", ["in/x:0"], ["1"]),
        helper.make_node("MaxPool", ["1"], ["out-put.2"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    model = make_model(nodes, {"in/x:0": (1, 3, 4, 6)}, ["out-put.2"])
    compiled = gemmify.compile(model, target=f"cuda -arch={_arch()}")
    x = random_inputs(compiled.inputs, 6)
    want = np.maximum(x["in/x:0"], 0).reshape(1, 3, 2, 2, 3, 2).max((3, 5))
    assert np.array_equal(compiled.run(x)[0], want)


def test_weights_that_are_inputs_scratch_of_the_rest_and_graphs_without_kernels() -> None:
    """A layer packs its weights in every run; what takes several kernels beside the layers gets scratch; a model that
    only hands its input on has no kernel and no arena."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("InstanceNormalization", ["c", "scale", "bias"], ["y"]),
    ]
    values = {"scale": np.full(7, 0.5, np.float32), "bias": np.full(7, 0.25, np.float32)}
    model = make_model(nodes, {"x": (2, 5, 9, 8), "w": (7, 5, 3, 3)}, ["y"], values)
    compiled = gemmify.compile(model, target=f"cuda -arch={_arch()}")
    inputs = random_inputs(compiled.inputs, 9)
    _assert_close(compiled.run(inputs), inputs, model, ["y"])
    handed = gemmify.compile(single("Identity", [(3, 4)]), target=f"cuda -arch={_arch()}")
    x = random_inputs(handed.inputs, 10)["x0"]
    assert np.array_equal(handed.run([x])[0], x)


def test_verify_compares_with_the_reference(tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "small.onnx"
    onnx.save(small_cnn(), path)
    result = verify.execute(str(path), reference="float64", options={"target": f"cuda -arch={_arch()}"})
    assert result["holds"] and result["reference"] == "float64"


def test_a_library_for_another_gpu_or_without_one_is_refused_before_it_is_mapped(library: Path, emulated: bool) -> None:
    if not emulated:
        pytest.skip("needs devices to choose from")
    other = _python(REFUSED, str(library), capability=80)
    assert "is made for a GPU (sm_90), this machine has" in other and '--target "cuda -arch=sm_80"' in other
    assert "the NVIDIA driver finds no GPU" in _python(REFUSED, str(library), devices=0)


def test_a_network_that_does_not_fit_says_what_it_needs(library: Path, emulated: bool) -> None:
    if not emulated:
        pytest.skip("needs a device of little memory")
    large = f"""
import sys, gemmify
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from models import single
import numpy as np
model = gemmify.compile(single("Relu", [(1, 3 << 20)]), target="cuda -arch=sm_90")
try:
    model.run(np.zeros((1, 3 << 20), "float32"))
except gemmify.GemmifyError as error:
    print(type(error).__name__, error)
"""
    said = _python(large, memory_mib=16)
    assert said.startswith("GemmifyError the network needs ") and "which has 16 MiB in all" in said


def test_a_forked_process_is_told_why_it_cannot_run(network: Any) -> None:
    inputs = random_inputs(network.inputs, 7)
    network.run(inputs)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            network.run(inputs)
            said = "it ran"
        except gemmify.GemmifyError as error:
            said = str(error)
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert "was forked after a network had been loaded on the GPU" in pipe.read()
    os.waitpid(child, 0)


def test_our_own_compiler_hook_serves_a_process_with_a_gpu(network: Any) -> None:
    import tvm_ffi

    from gemmify.cuda import callback

    before = tvm_ffi.get_global_func("tvm_callback_cuda_compile")
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", callback.compile_text, override=True)
    try:
        compiled = gemmify.compile(small_cnn(seed=1), target=f"cuda -arch={_arch()}")
        inputs = random_inputs(compiled.inputs, 8)
        names = [spec.name for spec in compiled.outputs]
        _assert_close(compiled.run(inputs), inputs, small_cnn(seed=1), names)
    finally:
        tvm_ffi.register_global_func("tvm_callback_cuda_compile", before, override=True)
