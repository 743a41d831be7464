"""The GPU suite end to end: a small bundle is built, run by its own runner, and comes back as tables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emulator
import pytest

from gemmify.bench import gpu_bundle, report
from gemmify.bench.gpu_problems import Wanted, WantedNetwork
from gemmify.bench.gpu_suite import import_result
from gemmify.commands import bench as command
from gemmify.errors import CheckError
from gemmify.zoo import ZOO
from gemmify.zoo.builder import Builder, Tensor
from lowering import DenseProblem, conv2d
from lowering.epilogue import EpilogueOp

BIAS, RELU = EpilogueOp("bias", 0), EpilogueOp("relu")
CHECKS = [
    Wanted("check", "conv", conv2d(5, 6, 7, 9, 3, n=2), "implicit-gemm", "float32", (BIAS, EpilogueOp("add", 1))),
    Wanted(
        "check", "conv", conv2d(4, 6, 6, 8, 3), "im2col", "float32", (BIAS, EpilogueOp("leaky_relu", None, (0.25,)))
    ),
    Wanted("check", "dense", DenseProblem(3, 20, 7, "bfloat16"), "direct", "bfloat16", ()),
    Wanted("layer", "conv", conv2d(4, 6, 6, 8, 3, n=2), "implicit-gemm", "float32", (BIAS, RELU), 2, "auto"),
]
NETWORK = WantedNetwork("tiny", "float32", 2)


def tiny(b: Builder, x: Tensor) -> Tensor:
    """Two convolutions, one with a batch norm and a weight that is not embedded, and a fully connected layer."""
    y = b.relu("relu1", b.conv("conv1", x, 24, 3, pad=1))
    y = b.relu("relu2", b.batch_norm("bn", b.conv("conv2", y, 24, 3, pad=1, bias=False), 0.5))
    return b.softmax(b.fc("fc", b.flatten("flatten", b.global_average_pool("pool", y)), 10))


def run(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """run.py of the bundle, in a process that can import nothing of gemmify."""
    environment = {**emulator.environment(), "GEMMIFY_NO_TORCH": "1", **more}
    without = folder / "without"
    without.mkdir(exist_ok=True)
    for name in ("gemmify", "lowering", "schedules", "tvm", "tvm_ffi", "onnx"):
        (without / f"{name}.py").write_text(f"raise ImportError('{name} must not be imported')\n")
    line = [sys.executable, str(folder / "run.py"), *words]
    environment["PYTHONPATH"] = str(without)
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, target: Any, emulated: bool) -> Path:
    """A bundle's files, with the peaks, a layer that cannot be built, and no tar around them."""
    made = tmp_path_factory.mktemp("bundle")
    refused = Wanted("check", "refused", conv2d(4, 6, 6, 8, 3, 2), "winograd-2", "float32", ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, "tiny", tiny)
        patch.setattr("gemmify.bench.gpu_networks.PICTURE", (3, 6, 6))
        described = gpu_bundle.fill(
            made,
            target(),
            sections=("peak", "check", "network"),
            checks=[*CHECKS, refused],
            networks=[NETWORK],
            workers=0,
        )
    assert [name for name, _ in described["failures"]] == [refused.id], described["failures"]
    return made


def ids(entries: Sequence[dict[str, Any]]) -> list[str]:
    return [entry["id"] for entry in entries]


def test_a_bundle_is_run_and_comes_back(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "result.json"
    done = run(folder, "--json", str(place), "--seed", "7", "--minutes", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    raw = json.loads(place.read_text())
    assert raw["seed"] == 7 and raw["machine"]["capability"] == raw["bundle"]["capabilities"][0] and not raw["not_run"]
    found = {e["id"]: e for e in raw["entries"]}
    assert found.keys() == {*(w.id for w in CHECKS), NETWORK.id, *ids(gpu_bundle._peaks())}
    for wanted in CHECKS:
        entry = found[wanted.id]
        assert entry["right"] and ("error" in entry), entry
    layer, network = found[CHECKS[3].id], found[NETWORK.id]
    assert layer["times"]["ours"]["median"] > 0 and layer["gflops"] > 0 and "ratio" not in layer
    assert network["right"] and network["times"]["ours"]["runs"] >= 3
    assert all("skipped" in found[name] for name in ids(gpu_bundle._peaks()))

    result = import_result(place)
    assert result["summary"]["checks"]["right"] == 3 == result["summary"]["checks"]["of"]
    assert not result["failures"] and len(result["build_failures"]) == 1
    command.check(result)
    text = report.render_markdown(result)
    for piece in ("correctness: 3 of 3", "implicit-gemm", "tiny", "not built: 1", "GEMMIFY_NO_TORCH is set"):
        assert piece in text, text


def test_an_entry_that_fails_takes_no_other_along(folder: Path, tmp_path: Path) -> None:
    """One calls a function that is not there, one writes beside its output, which ends the process's context."""
    bundle = json.loads((folder / "bundle.json").read_text())
    broken = json.loads(json.dumps([e for e in bundle["entries"] if e["section"] == "check"]))
    broken[0]["calls"][-1]["symbol"] = "nothing"
    broken[1]["limit"] = 1e-12
    shape = broken[2]["tensors"][broken[2]["output"]][0]
    broken[2]["tensors"][broken[2]["output"]][0] = [1, *shape[1:]]
    other = tmp_path / "bundle"
    other.mkdir()
    for name in ("runtime", "libraries", "graphs"):
        (other / name).symlink_to(folder / name)
    shutil.copytree(folder / "runner", other / "runner")  # it looks for the bundle's files around itself
    shutil.copyfile(folder / "run.py", other / "run.py")
    (other / "bundle.json").write_text(json.dumps({**bundle, "entries": broken}))
    place = tmp_path / "result.json"
    done = run(other, "--json", str(place), "--sections", "check")
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(place.read_text())["entries"]
    assert ids(found) == ids(broken)
    assert "no function nothing" in found[0]["crashed"]
    assert not found[1]["right"] and "of the largest output" in found[1]["why"]
    assert "crashed" in found[2]
    result = import_result(place)
    with pytest.raises(CheckError, match="implicit-gemm on check/conv"):
        command.check(result)
    assert "failed or wrong: 3" in report.render_markdown(result)


def test_refusals(folder: Path, tmp_path: Path, emulated: bool) -> None:
    place = tmp_path / "result.json"
    if emulated:
        other = run(folder, "--json", str(place), GEMMIFY_EMULATOR_CAPABILITY="80")
        assert other.returncode == 2 and "holds code for sm_90, this GPU is sm_80" in other.stderr
        none = run(folder, "--json", str(place), GEMMIFY_EMULATOR_DEVICES="0")
        assert none.returncode == 2 and "no GPU can be used" in none.stderr
    for words, said in (
        (("--sections", "chek"), "no section 'chek'"),
        (("--minutes", "0"), "must be above 0"),
        (("--only", "nothing*"), "no entry matches"),
        (("--json", str(tmp_path / "none" / "x.json")), "a place that can be written"),
    ):
        done = run(folder, *(words if words[0] == "--json" else ("--json", str(place), *words)))
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
