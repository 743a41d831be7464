"""A whole tuning run on a small network: its log, what it resumes, what it refuses, how it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import gemmify
from gemmify.cli import main
from gemmify.errors import InputError
from gemmify.pipeline import plan_model
from gemmify.tuning import tune as tune_module
from gemmify.tuning.log import read
from gemmify.tuning.settings import Settings

pytest.importorskip("xgboost")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two equal convolutions, another one, and a fully connected layer."""
    rng = np.random.default_rng(3)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((0.1 * rng.standard_normal(shape)).astype("float32"), name)

    shapes = {"w1": (16, 16, 3, 3), "w2": (16, 16, 3, 3), "w3": (24, 16, 1, 1), "w4": (10, 24 * 12 * 12)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="two", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "w3"], ["e"], name="three"),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "w4"], ["y"], name="four", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [weight(name, *shape) for name, shape in shapes.items()],
    )
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    logs = tmp_path_factory.mktemp("logs")
    return logs, gemmify.tune(str(model), budget=None, trials=6, logs=logs, from_nothing=True, quiet=True)


def test_equal_layers_are_one_task_and_every_trial_is_in_the_log(tuned: tuple[Path, dict]) -> None:
    logs, result = tuned
    assert sorted(row["count"] for row in result["layers"]) == [1, 1, 2]
    loaded = read(logs)
    assert not loaded.damaged
    trials = [record for record in loaded.records if record.stage == "trial"]
    assert len(trials) == result["trials"] == sum(row["fresh"] for row in result["layers"])
    assert all(row["fresh"] <= 6 for row in result["layers"])
    assert all(len(record.cold) > 1 and record.error is not None for record in trials if record.ok)
    assert len({(record.task, record.point) for record in trials}) == len(trials), "no point twice"


def test_finals_stand_beside_the_default_alone_and_inside_the_network(tuned: tuple[Path, dict]) -> None:
    records = read(tuned[0]).records
    for stage in ("final", "network"):
        groups: dict[tuple, set] = {}
        for record in records:
            if record.stage == stage:
                groups.setdefault((record.group, record.task), set()).add(record.point)
        assert groups, f"no {stage} was measured"
        assert all(len(points) > 1 for points in groups.values())
    assert [net["name"] for net in tuned[1]["networks"]] == ["small"]


def test_a_compilation_takes_what_the_result_says(model: Path, tuned: tuple[Path, dict]) -> None:
    logs, result = tuned
    compiled = gemmify.compile(str(model), logs=logs, frozen=True)
    untuned = gemmify.compile(str(model), logs=False)
    said = {name: row for row in result["layers"] for _, name in row["places"]}
    for layer in compiled.layers:
        assert layer["lowering"] == said[layer["name"]]["point"]["lowering"]
        assert layer["tile"] == said[layer["name"]]["point"]["tile"]
    x = np.random.default_rng(0).standard_normal((1, 16, 12, 12)).astype("float32")
    np.testing.assert_allclose(compiled(x), untuned(x), rtol=1e-4, atol=1e-4)


def test_same_log_same_plan(model: Path, tuned: tuple[Path, dict], tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = subprocess.run(
            [sys.executable, "-m", "gemmify", "plan", str(model), "--logs", str(tuned[0]), "-o", str(tmp_path / name)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_second_run_goes_on(model: Path, tuned: tuple[Path, dict]) -> None:
    logs, _ = tuned
    before = [record for record in read(logs).records if record.stage == "trial"]
    again = gemmify.tune(str(model), budget=None, trials=2, logs=logs, layers=["three"], quiet=True)
    after = [record for record in read(logs).records if record.stage == "trial"]
    assert [row["count"] for row in again["layers"]] == [1]
    assert len(after) == len(before) + again["trials"]
    assert len({(record.task, record.point) for record in after}) == len(after), "a point was measured twice"


def test_ctrl_c_keeps_the_trials(model: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    command = [sys.executable, "-m", "gemmify", "tune", str(model), "--budget", "50s", "--logs", str(logs)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_attend_to_interrupts
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(read(logs).records) < 3:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command goes on" in err
    assert out == ""
    kept = read(logs)
    assert len(kept.records) >= 3 and not kept.damaged


def _attend_to_interrupts() -> None:
    """A shell in the background tells its children to ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_one_model_twice_is_tuned_once(model: Path, tmp_path: Path) -> None:
    result = gemmify.tune(
        [str(model), str(model)], budget=None, trials=1, logs=tmp_path, layers=["three"], from_nothing=True, quiet=True
    )
    assert [row["count"] for row in result["layers"]] == [2]
    assert len([r for r in read(tmp_path).records if r.stage == "trial"]) == 1


@pytest.mark.parametrize("budget", ["30s", pytest.param(None, marks=pytest.mark.slow)])
def test_a_network_is_tuned_in_half_precision(model: Path, tmp_path: Path, budget: str | None) -> None:
    words = {"layers": ["three"], "logs": tmp_path, "quiet": True, "budget": budget, "trials": 2}
    gemmify.tune(str(model), dtype="float16", **words)
    records = read(tmp_path).records
    assert {record.task.problem.dtype for record in records} == {"float16"}
    assert {record.outcome for record in records} == {"ok"}
    assert ("network" in {record.stage for record in records}) == (budget is None)
    assert gemmify.compile(str(model), dtype="float16", logs=tmp_path).manifest.tuning["tuned"] == 1
    with pytest.raises(InputError, match="converted to float16, bfloat16 or float32"):
        gemmify.tune(str(model), dtype="float8", **words)


def test_what_was_asked_for_must_beat_what_compile_takes(model: Path, tmp_path: Path) -> None:
    """With --lowerings the untuned choice of `compile` is measured too: a slower lowering must not replace it."""
    words = {"layers": ["three"], "lowerings": ["im2row"], "logs": tmp_path, "quiet": True}
    gemmify.tune(str(model), budget=None, trials=2, from_nothing=True, **words)
    untuned = next(layer for layer in plan_model(str(model), logs=False).layers if layer["name"] == "three")
    records = read(tmp_path).records
    tried = {record.point.lowering for record in records if record.stage == "trial"}
    assert tried == {"im2row", untuned["lowering"]} and untuned["lowering"] != "im2row"
    for stage in ("final", "network"):
        points = {record.point.lowering for record in records if record.stage == stage}
        assert untuned["lowering"] in points, stage


GOOD = {
    "target": "llvm",
    "dtype": None,
    "budget": "20m",
    "trials": None,
    "layers": (),
    "lowerings": None,
    "logs": "logs",
    "from_nothing": False,
    "seed": 0,
    "threads": None,
    "max_workspace": None,
    "max_error": None,
    "shapes": None,
    "tracker": None,
    "key": None,
    "workers": None,
    "bundle": None,
}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budget": "soon"}, "not a length of time"),
        ({"budget": 0}, "not a length of time"),
        ({"budget": None}, "needs an end"),
        ({"trials": 0}, "at least 1"),
        ({"trials": True}, "at least 1"),
        ({"seed": -1}, "seed"),
        ({"tracker": "host:9190"}, "belong together"),
        ({"key": "cpu"}, "belong together"),
        ({"workers": 2}, "--tracker"),
        ({"tracker": "host:9190", "key": "cpu", "bundle": "b.tar"}, "one of the two"),
        ({"layers": "conv1"}, "lists of names"),
        ({"max_workspace": -1}, "at least 0"),
        ({"logs": __file__}, "must be a folder"),
        ({"logs": f"{__file__}/below"}, "must be a folder"),
        ({"logs": "/proc/logs"}, "not writable"),
        ({"lowerings": ()}, "no lowering is left"),
        ({"tracker": "host:9190", "key": "cpu", "threads": 0}, "threads must be"),
        ({"tracker": "host:9190", "key": "cpu", "workers": -2}, "workers must be"),
    ],
)
def test_settings_are_checked(wrong: dict, said: str) -> None:
    Settings.checked(**GOOD)
    with pytest.raises(InputError, match=said):
        Settings.checked(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layer", "nothing"], "no layer is named 'nothing'"),
        (["--lowerings", "im2roww"], "did you mean im2row"),
        (["--lowerings", "winograd-2", "--layer", "three"], "none of the lowerings asked for applies"),
        (["--budget", "never"], "not a length of time"),
        (["--threads", "9999"], "9999 threads"),
    ],
)
def test_the_command_line_refuses(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    logs = tmp_path / "logs"
    assert main(["tune", str(model), "--logs", str(logs), *words]) == 2
    assert said in capsys.readouterr().err
    assert not logs.exists()


def test_elsewhere_there_may_be_more_threads_than_here(model: Path, tmp_path: Path, capsys) -> None:
    assert Settings.checked(**{**GOOD, "tracker": "host:9190", "key": "cpu", "threads": 9999}).threads == 9999
    words = ["--tracker", "no address", "--key", "cpu", "--threads", "9999", "--logs", str(tmp_path)]
    assert main(["tune", str(model), *words]) == 2
    assert "9999 threads" not in capsys.readouterr().err


def test_without_xgboost_the_extra_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(InputError, match=r"gemmify\[tune\]"):
        tune_module.tune([str(model)], logs=tmp_path, quiet=True)


def test_json_result(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "result.json"
    words = ["--trials", "1", "--layer", "three", "--logs", str(tmp_path / "logs"), "--quiet", "--json", str(place)]
    done = subprocess.run(
        [sys.executable, "-m", "gemmify", "tune", str(model), *words, "--budget", "30s"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    data = json.loads(place.read_text())
    assert data["layers"][0]["point"]["lowering"] and "three" in str(data["layers"][0]["places"])
    assert "16x12x12 -> 24 1x1" in done.stdout
