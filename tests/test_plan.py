"""`gemmify plan`, and compilations that are held to a plan or to a bound on the workspace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import gemmify
from gemmify import cli, cli_options
from gemmify.errors import InputError
from gemmify.plan import Plan


def make_model() -> onnx.ModelProto:
    """conv 3x3 -> conv 1x1 -> global average pool -> fully connected."""
    rng = np.random.default_rng(5)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / 4).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["data", "w1"], ["a"], name="stem", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w2"], ["b"], name="mix", kernel_shape=[1, 1]),
        helper.make_node("GlobalAveragePool", ["b"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w3"], ["scores"], name="fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 5])],
        [weight("w1", 8, 3, 3, 3), weight("w2", 16, 8, 1, 1), weight("w3", 5, 16)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "small.onnx"
    onnx.save(make_model(), str(path))
    return str(path)


def write_plan(path: Path, **layers: Any) -> str:
    path.write_text(json.dumps({"format": 1, "layers": layers}))
    return str(path)


def keys(layers: list[dict[str, Any]]) -> dict[str, str]:
    return {layer["name"]: layer["lowering"] for layer in layers}


def refused(capfd: pytest.CaptureFixture[str], words: list[str], *parts: str) -> None:
    assert cli.main(words) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err and all(part in err.splitlines()[-1] for part in parts), err


def test_the_written_plan_is_what_compile_does_and_follows(model, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", model, "--lowering", "stem=im2row", "--json", "r.json"]) == 0
    assert "wrote small.plan.json" in capfd.readouterr().out
    plan = json.loads(Path("small.plan.json").read_text())
    result = json.loads(Path("r.json").read_text())
    assert list(plan["layers"]) == ["stem", "mix", "fc"], "in the order in which they run"
    assert plan["layers"]["stem"] == "im2row" and keys(result["layers"]) == plan["layers"] == result["plan"]["layers"]
    assert not list(tmp_path.glob("*.so")), "nothing is compiled"
    compiled = gemmify.compile(model, plan="small.plan.json")
    assert keys(compiled.layers) == plan["layers"]
    for planned, done in zip(result["layers"], json.loads(json.dumps(compiled.layers)), strict=True):
        assert {k: v for k, v in done.items() if k in planned} == planned | {"reason": done["reason"]}


def test_a_plan_of_some_layers_leaves_the_rest_to_auto(model, tmp_path):
    free = keys(gemmify.compile(model).layers)
    asked = "im2col" if free["mix"] != "im2col" else "im2row"
    held = keys(gemmify.compile(model, plan=write_plan(tmp_path / "p.json", mix=asked, fc="auto")).layers)
    assert held == free | {"mix": asked}
    assert keys(gemmify.compile(model, plan=Plan({"mix": asked})).layers) == held


@pytest.mark.parametrize("verb", ["plan", "compile"])
def test_plans_that_do_not_fit_are_refused_in_words(model, tmp_path, capfd, verb):
    words = [verb, model, "-o", str(tmp_path / "out"), "--plan"]
    bad = tmp_path / "p.json"
    refused(capfd, [*words, write_plan(bad, stern="im2row")], "p.json: no layer is named 'stern'", "stem, mix, fc")
    refused(capfd, [*words, write_plan(bad, stem="im2pony")], "p.json", "'im2pony' (of layer stem)", "im2row")
    refused(
        capfd,
        [*words, write_plan(bad, stem=3)],
        "must give layer 'stem' a lowering's key, auto or {lowering",
        "found 3",
    )
    refused(capfd, [*words, write_plan(bad), "--lowering", "im2row"], "both a plan and a lowering")
    refused(capfd, [*words, write_plan(bad, fc="im2row"), "--strict"], "layer fc: im2row does not apply", "dense")
    bad.write_text('{"format": 1, "layers"')
    refused(capfd, [*words, str(bad)], "p.json is not JSON")
    bad.write_text('{"layers": {}}')
    refused(capfd, [*words, str(bad)], 'must be {"format": 1')
    refused(capfd, [*words, str(tmp_path / "none.json")], "cannot read the plan", "No such file")
    assert not (tmp_path / "out").exists()


def test_wrong_places_for_a_plan(model, tmp_path, capfd):
    refused(capfd, ["plan", model, "-o", str(tmp_path)], "it is a folder")
    refused(capfd, ["plan", model, "-o", str(tmp_path / "no" / "p.json")], "there is no folder")
    refused(capfd, ["plan", model, "-o", "-"], "--json -")
    refused(capfd, ["plan", str(tmp_path / "none.onnx")], "does not exist")
    refused(capfd, ["plan", model, "--json", str(tmp_path)], "it is a folder")
    with pytest.raises(InputError, match="there is no folder"):
        Plan({}).save(tmp_path / "no" / "p.json")


def test_a_saved_plan_is_read_again(tmp_path):
    plan = Plan({"Conv_ä/1": "im2row", "fc[0]": "auto"})
    assert Plan.load(plan.save(tmp_path / "p.json")) == plan


def test_the_bound_on_the_workspace_holds(model, tmp_path, capfd):
    options = ["plan", model, "-o", str(tmp_path / "p.json"), "--lowering", "im2row", "--json", "-"]
    assert cli.main(options) == 0
    free = json.loads(capfd.readouterr().out)["layers"]
    assert max(layer["workspace_bytes"] for layer in free) > 1024
    assert cli.main([*options, "--max-workspace", "1KiB"]) == 0
    bound = json.loads(capfd.readouterr().out)["layers"]
    assert max(layer["workspace_bytes"] for layer in bound) <= 1024
    stem = next(layer for layer in bound if layer["name"] == "stem")
    assert stem["lowering"] != "im2row" and "the bound is 1024" in stem["reason"]
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    small, large = gemmify.compile(model, lowering="im2row", max_workspace=0), gemmify.compile(model)
    assert small.memory()["workspace"] == 0
    np.testing.assert_allclose(small(x), large(x), rtol=1e-4, atol=1e-5)


def test_the_bound_holds_for_the_sums_of_split_reductions(tmp_path, capfd):
    """A GPU splits a long reduction of few outputs; its partial sums are workspace too."""
    weight = numpy_helper.from_array(np.ones((16, 2048, 1, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["data", "w"], ["y"], name="long", kernel_shape=[1, 1])],
        "split",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 2048, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 4, 4])],
        [weight],
    )
    path, place = tmp_path / "split.onnx", tmp_path / "p.json"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    words = [str(path), "--target", "cuda -arch=sm_90", "--lowering", "pointwise", "--json", "-"]
    assert cli.main(["plan", *words, "-o", str(place)]) == 0
    assert json.loads(capfd.readouterr().out)["layers"][0]["workspace_bytes"] > 0
    assert cli.main(["plan", *words, "-o", str(place), "--max-workspace", "0"]) == 0
    (bound,) = json.loads(capfd.readouterr().out)["layers"]
    assert bound["workspace_bytes"] == 0 and "not split" in bound["reason"]
    assert Plan.load(place).to_dict()["layers"]["long"]["schedule"] == {"split_k": 1}
    assert cli.main(["explain", *words, "--max-workspace", "0"]) == 0
    (group,) = json.loads(capfd.readouterr().out)["layers"]
    chosen = next(row for row in group["candidates"] if row["verdict"] == "chosen")
    assert (chosen["key"], chosen["workspace_bytes"]) == ("pointwise", 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("8B", 8), ("2K", 2048), ("2KiB", 2048), ("3mib", 3 << 20), ("1G", 1 << 30)],
)
def test_sizes(text, size):
    assert cli_options.size(text) == size


@pytest.mark.parametrize("text", ["", "K", "1.5M", "-1", "1KB", "1KiBiB", "1 K", "KiB", "1BK", "²"])
def test_sizes_that_are_none(text):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of bytes"):
        cli_options.size(text)


def test_dump_writes_the_module_after_each_stage(model, tmp_path, capfd):
    out, folder = str(tmp_path / "small.so"), tmp_path / "new" / "dump"
    assert cli.main(["compile", model, "-o", out, "--dump", str(folder)]) == 0
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["1_imported.py", "2_canonical.py", "3_lowered.py", "4_scheduled.py"]
    assert "conv2d" in (folder / files[0]).read_text() and "prim_func" in (folder / files[3]).read_text()
    refused(capfd, ["compile", model, "-o", out, "--dump", model], "cannot dump into", "give a folder")
