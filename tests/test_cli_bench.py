"""`gemmify bench` on the command line: what it takes, what it refuses, where progress and results go."""

from __future__ import annotations

import json

import onnx
import pytest
from test_cli import fails, make_onnx

from gemmify import bench, cli


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    onnx.save(make_onnx(), str(path))
    return str(path)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["bench", "a", "--suite", "gemm"], ["either MODELs or --suite"]),
        (["bench", "a", "--layer", "x"], ["--layer belongs to --suite"]),
        (["bench", "a", "--quick"], ["--quick belongs to --suite"]),
        (["bench", "--suite", "gemm", "--peers", "onnxruntime"], ["--peers belongs to a model"]),
        (["bench", "--suite", "gemm", "--shape", "x=1"], ["--shape belongs to a model"]),
        (["bench", "--suite", "gemm", "--dtype", "float16"], ["--dtype belongs to a model"]),
        (["bench", "squeezenet", "--dtype", "float16", "--peers", "onnxruntime"], ["the peers run a model as it is"]),
        (["bench", "--suite", "gem"], ["unknown suite 'gem'", "layers, gemm"]),
        (["bench", "--suite", "gemm", "--lowering", "a=im2row"], ["keys, not LAYER=KEY"]),
        (["bench", "--suite", "gemm", "--lowering", "plain,,auto"], ["is not NAME,NAME"]),
        (["bench", "--suite", "gemm", "--target", "bogus"], ["'bogus'"]),
        (["bench", "--suite", "gemm", "--layer", "conv:1"], ["no layer 'conv:1'", "conv:"]),
        (["bench", "x.onnx", "--peers", "tflite"], ["unknown peer 'tflite'", "openvino"]),
        (["bench", "none.onnx", "alexnet"], ["none.onnx does not exist"]),
        (["bench", "none.onnx", "--target", "bogus"], ["'bogus'"]),
        (["bench", "none.onnx", "--json", "no/r.json"], ["there is no folder no"]),
    ],
)
def test_wrong_calls(capfd, words, parts):
    fails(capfd, words, 2, *parts)


def test_a_suite_takes_keys_and_tells_its_progress(capfd, monkeypatch):
    seen = {}

    def run_suite(suite, **options):
        options["progress"]("half way")
        seen.update(options, suite=suite)
        return {"rows": []}

    monkeypatch.setattr(bench, "run_suite", run_suite, raising=False)
    words = "bench --suite layers --layer vgg16:* --quick --lowering plain,im2row --threads 1 --repeat 4 --json -"
    assert cli.main(words.split()) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"rows": []} and err == "half way\n"
    del seen["progress"]
    keys = ["plain", "im2row"]
    wanted = {"suite": "layers", "layer": "vgg16:*", "quick": True, "lowerings": keys, "threads": 1, "repeat": 4}
    assert seen == wanted


def test_several_models_make_one_table(tiny, capfd, tmp_path):
    path = tmp_path / "r.json"
    words = ["bench", tiny, tiny, "--repeat", "2", "--threads", "1", "--markdown", "--json", str(path)]
    assert cli.main(words) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0] == "| network | gemmify ms | of peak | conv + fc |"
    assert [line.startswith("| tiny |") for line in lines[2:4]] == [True, True]
    assert all(f"{tiny}: {what}" in err for what in ("peak ", "tiny compiled in", "gemmify ", "round 2/2: gemmify "))
    found = json.loads(path.read_text())
    assert [row["model"] for row in found["rows"]] == ["tiny", "tiny"] and found["geomean"] is None
    for row, result in zip(found["rows"], found["results"], strict=True):
        assert row["medians"]["gemmify"] >= row["bests"]["gemmify"] > 0
        assert [layer["name"] for layer in result["layers"]] == ["stem", "fc"]
        assert row["conv_fc_share"] == pytest.approx(sum(layer["share"] for layer in result["layers"]), rel=1e-6), (
            "every convolution and fully connected kernel belongs to a layer"
        )
        assert result["peak"]["samples"] and result["bandwidth"]["read"] > 0
