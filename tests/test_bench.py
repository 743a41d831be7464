"""`gemmify.bench`: the suites' shapes, whole networks against peers, and the results as JSON and as tables."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gemmify import measure
from gemmify.bench import header, network, report, shapes
from gemmify.errors import InputError
from lowering import ConvProblem, conv2d


def test_layers_suite_holds_the_well_known_layers() -> None:
    suite = shapes.layers_suite()
    assert suite["alexnet:conv1"] == conv2d(3, 224, 224, 96, 11, 4, 0)
    assert suite["alexnet:conv2"].groups == 2
    problems = list(suite.values())
    assert len(problems) == len(set(problems)) > 100
    for problem in (
        conv2d(64, 56, 56, 64, 3),  # ResNet-50 and VGG's kind of layer
        conv2d(512, 7, 7, 512, 3),
        conv2d(64, 224, 224, 64, 3),  # VGG conv1_2
        conv2d(16, 28, 28, 32, 5),  # GoogLeNet 3a 5x5
        conv2d(144, 56, 56, 144, 3, 2, g=144),  # MobileNet v2 depthwise
    ):
        assert problem in problems
    networks = {name.split(":")[0] for name in suite}
    assert {"alexnet", "vgg16", "googlenet", "resnet50", "mobilenet_v2"} <= networks


def test_recorded_convolutions_are_those_of_the_built_model() -> None:
    from gemmify.zoo import build

    model = onnx.shape_inference.infer_shapes(build("squeezenet"))
    weights = {i.name: tuple(i.dims) for i in model.graph.initializer}
    outputs = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in model.graph.value_info}
    found = shapes.network_convolutions("squeezenet")
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [node.name for node in nodes] == list(found)
    for node in nodes:
        problem = found[node.name]
        assert (problem.m, problem.c_group, *problem.kernel) == weights[node.input[1]]
        assert (problem.n, problem.m, *problem.out_size) == outputs[node.output[0]]


def test_gemm_suite_names_say_their_sizes() -> None:
    suite = shapes.gemm_suite()
    for name, problem in suite.items():
        assert name.split(":")[1] == f"{problem.n}x{problem.m}x{problem.c}"
    sizes = {name.split(":")[1] for name in suite}
    assert {"64x64x64", "2048x2048x2048", "3136x64x576", "784x128x1152", "49x512x4608", "256x192x1152"} <= sizes
    assert any(size.startswith("1x") for size in sizes) and any(size.startswith("7x") for size in sizes)


def test_shapes_are_selected_by_name_or_pattern() -> None:
    assert list(shapes.select_shapes("gemm", "fc:256x192x1152")) == ["fc:256x192x1152"]
    found = shapes.select_shapes("layers", "resnet50:*")
    assert found and all(isinstance(p, ConvProblem) for p in found.values())
    with pytest.raises(InputError, match=r"no layer 'alexnet:conv9'; close ones are .*alexnet:conv"):
        shapes.select_shapes("layers", "alexnet:conv9")
    with pytest.raises(InputError, match="unknown suite 'pools'; choose from layers, gemm"):
        shapes.select_shapes("pools")


def _layer(name: str, op: str, kernels: list[str]) -> dict[str, object]:
    return {"name": name, "op": op, "kernels": kernels, "lowering": "x", "macs": 10**9}


def test_kernels_are_given_to_the_layers_that_wait_for_them() -> None:
    layers = [
        _layer("c1", "conv2d", ["im2row_lower", "im2row_gemm"]),
        _layer("c2", "conv2d", ["im2row_lower", "im2row_gemm"]),
        _layer("f", "dense", ["dense_gemm"]),
    ]
    ran = ["im2row_lower", "im2row_gemm", "fused_max_pool2d", "im2row_lower", "im2row_gemm", "dense_gemm", "softmax"]
    rows = network.kernel_rows([(name, 1.0 + i) for i, name in enumerate(ran)], layers)
    assert [row["layer"] for row in rows] == ["c1", "c1", None, "c2", "c2", "f", None]
    assert [row["kind"] for row in rows] == ["conv", "conv", "pooling", "conv", "conv", "fc", "softmax"]
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    by_kind = {entry["kind"]: entry for entry in network.kinds(rows)}
    assert by_kind["conv"]["seconds"] == 1 + 2 + 4 + 5 and by_kind["conv"]["calls"] == 4
    assert next(iter(by_kind)) == "conv"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fused_lrn_avg_pool", "lrn"),
        ("adaptive_avg_pool2d", "pooling"),
        ("concatenate", "concat"),
        ("reshape2", "other"),
    ],
)
def test_kernel_kind(name: str, kind: str) -> None:
    assert network.kernel_kind(name) == kind


def _tiny_model(with_weight_as_input: bool = False) -> onnx.ModelProto:
    """Conv 3x3 (5 -> 8), ReLU, on an input of free batch size."""
    rng = np.random.default_rng(3)
    weight = onnx.numpy_helper.from_array((rng.random((8, 5, 3, 3)) - 0.5).astype("float32"), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1] * 4, kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 9, 9])]
    if with_weight_as_input:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 5, 3, 3]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 9, 9])
    graph = helper.make_graph(nodes, "tiny", inputs, [output], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_peers_get_fixed_shapes_and_constant_weights() -> None:
    model = _tiny_model(with_weight_as_input=True)
    network.fix_inputs(model, {"x": np.zeros((2, 5, 9, 9), "float32")})
    (value,) = model.graph.input
    assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [2, 5, 9, 9]
    onnx.checker.check_model(model)
    with pytest.raises(InputError, match="differ in their inputs: x, z"):
        network.fix_inputs(model, {"z": np.zeros(1)})


def test_peers_that_cannot_read_the_model_are_told(tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    onnx.save_model(_tiny_model(), str(path))
    with pytest.raises(InputError, match=r"peer 'torch' reads \.pt2 files, and this model is not one"):
        network._source(path, ["torch"], {"x": (1, 5, 9, 9)})
    with pytest.raises(InputError, match=r"peer 'onnxruntime' reads \.onnx files, and this model is not one"):
        network._source("net.pt2", ["onnxruntime"], None)


def _measured(ours: float, peer: float, wrong: bool = False) -> dict[str, object]:
    out = [np.array([1.0, 2.0])]
    engines = {
        name: {"version": "1", "load": 0.1, "times": [t], "idle": 0.0, **measure.summarize([t])}
        for name, t in (("gemmify", ours), ("onnxruntime", peer))
    }
    other = [np.array([1.0, 2.5])] if wrong else out
    return {"engines": engines, "outputs": {"gemmify": out, "onnxruntime": other}}


def _result(ours: float, peer: float, wrong: bool = False) -> dict[str, object]:
    """A result of `run_model` with given medians (seconds)."""
    layers = [_layer("fc[0]", "dense", ["dense_gemm"])]
    kernels = network.kernel_rows([("dense_gemm", 0.75 * ours), ("lrn", 0.25 * ours)], layers)
    return {
        **header.header("model", 2, "llvm"),
        "peak": {"gflops": 100.0, "samples": [100.0]},
        "bandwidth": {"read": 10.0, "triad": 12.0},
        "model": {"name": "net", "macs": 10**9, "layers": 1, "inputs": {}, "memory": {}},
        "engines": network.compare_engines(_measured(ours, peer, wrong), 10**9, 100.0),
        "tolerance": network.TOLERANCE,
        "kernels": kernels,
        **network.breakdown(kernels, layers, 100.0),
    }


def test_ratio_is_the_peers_time_over_ours() -> None:
    engines = _result(0.1, 0.15)["engines"]
    assert engines["onnxruntime"]["ratio"] == pytest.approx(1.5)
    assert engines["gemmify"]["gflops"] == pytest.approx(20.0)
    assert engines["gemmify"]["peak_share"] == pytest.approx(0.2)
    assert engines["onnxruntime"]["agrees"] and not _result(0.1, 0.15, wrong=True)["engines"]["onnxruntime"]["agrees"]


def _text(renderable: object) -> str:
    from rich.console import Console

    console = Console(width=300, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_rendering_a_model_shows_engines_kinds_and_disagreement() -> None:
    shown = _text(report.render(json.loads(json.dumps(_result(0.1, 0.15), allow_nan=False))))
    for part in ("onnxruntime 1", "150.00", "1.50", "fc[0]", "75.0 %", "26.7", "100 GFLOP/s"):
        assert part in shown
    assert "convolutions and fully connected layers take 75.0 % of our time" in shown
    assert "warning" not in shown
    assert "warning: the outputs of onnxruntime and ours differ" in _text(report.render(_result(0.1, 0.15, wrong=True)))


def test_render_refuses_what_is_no_result() -> None:
    with pytest.raises(InputError, match="schema gemmify-bench/1 is required, found None"):
        report.render({"kind": "model"})


def test_peers_table_takes_the_fastest_right_peer() -> None:
    found = report.summarize_peers([_result(0.1, 0.2), _result(0.1, 0.05), _result(0.1, 0.01, wrong=True)], 2, "llvm")
    assert [row["speedup"] for row in found["rows"]] == [pytest.approx(2.0), pytest.approx(0.5), None]
    assert found["geomean"] == pytest.approx(1.0) and found["min"] == pytest.approx(0.5)
    lines = found["markdown"].splitlines()
    assert lines[0] == "| network | gemmify ms | onnxruntime ms | speedup | of peak | conv + fc |"
    assert lines[2] == "| net | 100.00 / 100.00 | 200.00 / 200.00 | 2.00 / 2.00 | 20 % | 75 % |"
    assert lines[4].endswith("| 10.00 / 10.00 | - | 20 % | 75 % |")
    assert "net: onnxruntime computed something else" in found["markdown"]
    assert "geometric mean 1.00, least 0.50 of the medians" in found["markdown"]
    assert "geometric mean 1.00" in _text(report.render(json.loads(json.dumps(found, allow_nan=False))))
    with pytest.raises(InputError, match="at least one model"):
        report.peers_report([], peers=("onnxruntime",))


def test_models_without_peers_make_a_table_without_ratios() -> None:
    alone = _result(0.1, 0.2)
    del alone["engines"]["onnxruntime"]
    found = report.summarize_peers([alone], 2, "llvm")
    assert found["geomean"] is None and found["min"] is None
    assert found["markdown"].splitlines()[0] == "| network | gemmify ms | of peak | conv + fc |"


def test_a_misspelt_model_is_found_before_any_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "run_model", lambda *_a, **_k: pytest.fail("a model was run"))
    with pytest.raises(InputError, match="'alexnett' is not a network of the zoo"):
        report.peers_report(["alexnet", "alexnett"])


def test_markdown_of_a_model_escapes_and_names_the_command() -> None:
    result = _result(0.1, 0.15)
    result["layers"][0]["name"] = "a|b"
    shown = report.render_markdown(result)
    assert "| a\\|b | - | x | 75.00 | 75.0 % | 26.7 | 26.7 % |" in shown
    assert "| engine | best ms |" in shown and f"Made by `{result['command']}`." in shown


def test_breakdown_adds_the_kernels_of_a_layer() -> None:
    layers = [_layer("c", "conv2d", ["lower", "gemm"]), _layer("unmeasured", "conv2d", ["gone"])]
    rows = network.kernel_rows([("lower", 1.0), ("gemm", 3.0), ("softmax", 4.0)], layers)
    found = network.breakdown(rows, layers, 1.0)
    assert [row["seconds"] for row in found["layers"]] == [4.0, 0.0] and found["conv_fc_share"] == 0.5
    assert found["layers"][0]["gflops"] == pytest.approx(0.5) == found["layers"][0]["peak_share"]


def test_header_says_what_was_run() -> None:
    found = header.header("suite", 1, "llvm")
    assert found["machine"]["cpu"] and found["machine"]["cores"] >= 1
    assert {"gemmify", "apache-tvm", "numpy", "python"} <= set(found["versions"])
    assert found["date"].endswith("+00:00")


def test_cpu_model_of_an_unknown_system(tmp_path: Path) -> None:
    assert header.cpu_model(tmp_path / "none")
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Some CPU\ncpu family\t: 26\nmodel\t\t: 2\n")
    assert header.cpu_model(file) == "Some CPU (family 26, model 2)"


def test_a_model_is_run_by_a_fresh_process_and_agrees_with_a_peer(tmp_path: Path) -> None:
    from gemmify.bench import render, run_model

    names = ["onnxruntime"] if _installed("onnxruntime") else []
    path = tmp_path / "tiny.onnx"
    onnx.save_model(_tiny_model(with_weight_as_input=True), str(path))
    found = run_model(str(path), peers=names, threads=1, repeat=3, shapes={"x": (1, 5, 9, 9)})
    assert set(found["engines"]) == {"gemmify", *names}
    ours = found["engines"]["gemmify"]
    assert len(ours["times"]) == 3 and ours["ratio"] == 1.0
    assert found["model"]["macs"] == 8 * 5 * 9 * 81 and found["model"]["inputs"] == {"x": [1, 5, 9, 9]}
    assert all(found["engines"][name]["agrees"] for name in names)
    conv = [row for row in found["kernels"] if row["kind"] == "conv"]
    assert conv and conv[0]["layer"] is not None
    assert math.isclose(sum(row["share"] for row in found["kinds"]), 1.0, rel_tol=1e-6)
    assert "tiny" in _text(render(json.loads(json.dumps(found, allow_nan=False))))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
