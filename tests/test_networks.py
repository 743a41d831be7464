"""Whole networks, every lowering: the numbers of ONNX Runtime, every layer lowered, the same bits after an export.

The full cross product takes long: `pytest -m slow tests/test_networks.py`. A sample of it is in the default run.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
from network_checks import assert_close, assert_lowered, assert_memory, case, network, onnxruntime_outputs
from onnx import numpy_helper

import gemmify
from gemmify import zoo
from lowering import LOWERINGS

pytest.importorskip("onnxruntime")

KEYS = ("auto", *LOWERINGS)
BY_SIZE = ("squeezenet", "mobilenet_v2", "googlenet", "resnet50", "alexnet", "vgg16", "vgg19")
LIGHT = tuple(f"light_{name}" for name in models.LIGHT)
SAMPLE = (
    ("squeezenet", "auto"),
    ("squeezenet", "im2row"),
    ("squeezenet", "winograd-4"),
    ("mobilenet_v2", "auto"),
    ("googlenet", "auto"),
    ("resnet50", "auto"),
)
REST = [(name, key) for name in (*BY_SIZE, *LIGHT) for key in KEYS if (name, key) not in SAMPLE]


def check(name: str, key: str, batch: int = 1) -> gemmify.Model:
    """Compile the network with `key` for every layer that it fits, and hold it against everything asked of it."""
    model, inputs, want = case(name, batch)
    compiled = gemmify.compile(model, lowering=key)
    first = compiled.run(inputs)
    worst = assert_close(first, want)
    print(f"{name} batch {batch} {key}: relative error {worst:.2e}")
    second = compiled.run(inputs)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert_lowered(model, compiled.layers, key)
    assert_memory(compiled.layers, compiled.memory())
    return compiled


def test_every_network_of_the_zoo_is_here() -> None:
    assert set(BY_SIZE) == set(zoo.ZOO)


@pytest.mark.parametrize("key", KEYS)
def test_small_network(key: str) -> None:
    check("small", key, batch=2)


@pytest.mark.parametrize(("name", "key"), SAMPLE)
def test_network(name: str, key: str) -> None:
    check(name, key)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), REST)
def test_network_of_the_cross_product(name: str, key: str) -> None:
    check(name, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_SIZE)
def test_network_with_a_batch_of_two(name: str) -> None:
    check(name, "auto", batch=2)


# --- the check itself can fail ---------------------------------------------------------------------------------------


def changed_weight(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], None]) -> onnx.ModelProto:
    """A copy of `model` in which `change` was applied to the values of initializer `name`."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(t for t in changed.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return changed


def drop_the_largest(values: np.ndarray) -> None:
    values.flat[np.abs(values).argmax()] = 0


def shift_a_filter_by_a_tap(values: np.ndarray) -> None:
    values[-1] = np.roll(values[-1], 1, axis=-1)  # one whose ReLU lets something through


@pytest.mark.parametrize("weight", ["w1", "gamma", "beta", "mean", "var", "w2", "b2", "w3", "b3"])
def test_one_wrong_weight_is_seen(weight: str) -> None:
    model, inputs, want = case("small", 2)
    got = onnxruntime_outputs(changed_weight(model, weight, drop_the_largest), inputs)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(got, want)


@pytest.mark.parametrize("weight", ["conv1_weight", "fire5_expand3x3_weight", "fire9_expand3x3_weight"])
def test_one_wrong_filter_is_seen_at_the_end_of_a_network(weight: str) -> None:
    model, inputs, want = case("squeezenet")
    got = onnxruntime_outputs(changed_weight(model, weight, shift_a_filter_by_a_tap), inputs)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(got, want)


def test_a_reference_without_contrast_is_refused() -> None:
    flat = [np.linspace(1.0, 1.001, 1000, dtype=np.float32).reshape(1, 1000)]
    with pytest.raises(AssertionError, match="hardly differ"):
        assert_close(flat, flat)


# --- structure, and the library --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "key"), [("small", "auto"), ("small", "im2col"), ("squeezenet", "direct")])
def test_no_convolution_is_left_to_relax(name: str, key: str, tmp_path: Path) -> None:
    gemmify.compile(network(name), lowering=key, dump_dir=tmp_path)
    before = next(tmp_path.glob("*_imported.py")).read_text()
    assert "R.nn.conv2d" in before
    after = next(tmp_path.glob("*_lowered.py")).read_text()
    assert "R.call_tir" in after and not [op for op in ("R.nn.conv", "R.matmul", "R.nn.batch_norm") if op in after]


RUN = """
import sys
import numpy as np
import gemmify
library, inputs, outputs = sys.argv[1:]
np.savez(outputs, *gemmify.load(library).run(dict(np.load(inputs))))
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"onnx", "torch", "lowering", "schedules"}, loaded
"""


def run_elsewhere(library: Path, inputs: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
    """The outputs of an exported library, run in a process of its own that imports no compiler."""
    np.savez(folder / "in.npz", **inputs)  # type: ignore[arg-type]
    root = str(Path(gemmify.__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", RUN, str(library), str(folder / "in.npz"), str(folder / "out.npz")]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as found:
        return [found[key] for key in found.files]


def export_and_compare(name: str, key: str, folder: Path) -> None:
    model, inputs, _ = case(name)
    compiled = gemmify.compile(model, lowering=key)
    library = compiled.export(folder / "network.so")
    got = run_elsewhere(library, inputs, folder)
    for have, want in zip(got, compiled.run(inputs), strict=True):
        assert have.tobytes() == want.tobytes() and have.shape == want.shape


@pytest.mark.parametrize("key", ["auto", "im2col"])
def test_an_exported_network_gives_the_same_bits_in_a_fresh_process(key: str, tmp_path: Path) -> None:
    export_and_compare("small", key, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_SIZE)
def test_an_exported_zoo_network_gives_the_same_bits_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    export_and_compare(name, "auto", tmp_path)


def resident_bytes() -> int:
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's memory is read from /proc")
def test_a_network_that_is_let_go_frees_its_weights() -> None:
    """64 MB of weights, compiled and run four times: what the first leaves behind, the later ones find again."""
    weight = np.ones((4096, 4096), np.float32)
    model = models.single("Gemm", [(1, 4096)], [weight], transB=1)
    after = []
    for _ in range(4):
        gemmify.compile(model).run([weight[:1]])
        after.append(resident_bytes())
    assert after[-1] - after[0] < weight.nbytes
