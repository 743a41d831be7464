"""Tuning on a GPU, in fresh processes as a user's are: the measurer, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gemmify.tuning.log import read

_MEASURE = """
import json, sys
from dataclasses import replace

import lowering
from lowering import ImplicitGemm, Pointwise, conv2d, Tile
from lowering.epilogue import EpilogueOp
from gemmify.tuning.measure.gpu import GpuMeasurer
from gemmify.tuning.point import Point
from gemmify.tuning.task import Task


class OffByOne(Pointwise):
    key = "off-by-one"

    def build(self, problem, tile, epilogue=lowering.base.no_epilogue):
        return super().build(problem, tile, lambda value, index: epilogue(value, index) + 1)


class Outside(Pointwise):
    key = "outside"

    def build(self, problem, tile, epilogue=lowering.base.no_epilogue):
        *first, last = super().build(problem, tile, epilogue)
        shifted = lambda data, *rest: last.compute(lambda *at: data(*at[:-1], at[-1] + 100_000_000), *rest)
        return (*first, replace(last, compute=shifted))


for made in (OffByOne(), Outside()):
    lowering.register(made)
task = Task(conv2d(8, 6, 6, 12, 1), (EpilogueOp("bias", 0), EpilogueOp("relu")))
points = [Point(key, Tile(1, 1)) for key in ("pointwise", "off-by-one", "outside", "implicit-gemm", "no-such")]
with GpuMeasurer("cuda -arch=sm_90", builders=2) as measurer:
    found = dict(measurer.measure(task, points))
    finals = measurer.finals(task, [points[0], points[3]], rounds=2)
    machine = measurer.machine()
print(json.dumps({
    "outcomes": [found[i].outcome for i in range(len(points))],
    "why": [found[i].why for i in range(len(points))],
    "times": [len(found[i].cold) for i in range(len(points))],
    "finals": [(f.outcome, len(f.cold)) for f in finals],
    "machine": machine.to_dict(),
}))
"""


def _environment(emulated: bool) -> dict[str, str]:
    return emulator.environment() if emulated else dict(os.environ)


def test_a_candidate_that_is_wrong_or_crashes_costs_one_trial(emulated: bool) -> None:
    if not emulated:
        pytest.skip("for code of sm_90, which the GPU here may not be")
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, env=_environment(emulated))
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["outcomes"] == ["ok", "wrong", "crash", "ok", "build"], found["why"]
    assert "off by" in found["why"][1] and "CUDA" in found["why"][2] and "no-such" in found["why"][4]
    assert found["times"][0] >= 2 and found["times"][3] >= 2
    assert all(outcome == "ok" and count >= 4 for outcome, count in found["finals"])
    assert found["machine"]["target"] == "cuda" and found["machine"]["mcpu"] == "sm_90"
    assert found["machine"]["threads"] == 1 and found["machine"]["cpu"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((12, 16)).astype("float32"), "w")
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1, name="fc")],
        "one_layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 12])],
        [weight],
    )
    path = tmp_path / "one_layer.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_the_command_writes_a_log_that_compile_takes(emulated: bool, model: Path, tmp_path: Path) -> None:
    if not emulated:
        pytest.skip("for code of sm_90, which the GPU here may not be")
    logs, target = tmp_path / "logs", ["--target", "cuda -arch=sm_90"]

    def gemmify(*words: str) -> str:
        command = [sys.executable, "-m", "gemmify", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(emulated), cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    gemmify("tune", str(model), *target, "--trials", "3", "--budget", "50s", "--logs", str(logs))
    records = read(logs).records
    assert [path.parent.name for path in logs.rglob("*.jsonl")] == ["cuda-sm_90"]
    assert len(records) >= 3 and all(record.ok for record in records), [record.why for record in records]
    assert {record.machine.mcpu for record in records} == {"sm_90"}
    # The records of this GPU are for it alone; without one here they still fit: which board will run it is not known.
    said = gemmify("compile", str(model), *target, "--logs", str(logs), "--frozen")
    assert "1 of 1 layers tuned" in said


def test_a_bundle_measures_where_there_is_no_gemmify(emulated: bool, model: Path, tmp_path: Path) -> None:
    if not emulated:
        pytest.skip("for code of sm_90, which the GPU here may not be")
    environment, logs = _environment(emulated), tmp_path / "logs"

    def run(*words: str, within: Path = tmp_path) -> str:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=within)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("-m", "gemmify", "tune", str(model), "--target", "cuda -arch=sm_90", "--trials", "2", "--bundle", "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "gemmify-bundle"
    assert "us cold" in run("-S", "-c", _WITHOUT_GEMMIFY, *_site_packages(), within=folder)
    run("-m", "gemmify", "logs", "import", str(folder / "results.jsonl"), "--logs", str(logs))
    records = read(logs).records
    assert records and all(record.ok for record in records), [record.why for record in records]
    assert {(record.machine.target, record.machine.mcpu) for record in records} == {("cuda", "sm_90")}


_WITHOUT_GEMMIFY = """
import sys
import tarfile
places, sys.argv = sys.argv[1:], ["run.py", "--limit", "3"]
sys.path += places  # without the .pth files that put gemmify beside them
sys.modules["gemmify"] = None
exec(open("run.py").read())
"""


def _site_packages() -> list[str]:
    import site

    return [place for place in (*site.getsitepackages(), site.getusersitepackages()) if Path(place).is_dir()]
