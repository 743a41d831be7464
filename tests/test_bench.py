"""`gemmify.measure` and `gemmify.bench`: kernels that measure what they say, workers that fail clearly, results as JSON."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper

from gemmify import measure
from gemmify.bench import header, network, peers, report, rounds, shapes, worker
from gemmify.bench.process import WorkerProcess
from gemmify.errors import GemmifyError, InputError
from lowering import ConvProblem, conv2d
from schedules.machine import Machine, host_target

# ---------------------------------------------------------------- measure


def test_peak_kernel_computes_its_recurrence() -> None:
    kernel = measure._peak_kernel(2, 8, 4, "float32", str(host_target()))["main"]
    factors = np.array([[0.9] * 4, [0.2] * 4], "float32")
    out = tvm.runtime.tensor(np.zeros((2, 8, 4), "float32"))
    measure.set_threads(1)
    kernel(tvm.runtime.tensor(factors), out, 7)
    want = np.arange(8, dtype="float64")
    for _ in range(7):
        want = want * 0.9 + 0.2
    np.testing.assert_allclose(out.numpy(), np.broadcast_to(want[None, :, None], (2, 8, 4)), rtol=1e-5)


@pytest.mark.parametrize("dtype", measure.PEAK_DTYPES)
def test_peak_kernel_keeps_its_accumulators_in_vector_registers(dtype: str) -> None:
    machine = Machine.from_target(host_target())
    if machine.arch != "x86_64" or not {"fma", "avx2"} <= machine.features:
        pytest.skip("the names of registers and instructions are x86's")
    chains = machine.vector_registers * 3 // 4
    kernel = measure._peak_kernel(1, chains, machine.lanes(dtype), dtype, str(host_target()))
    lines = kernel.mod.inspect_source("asm").splitlines()
    register = {64: "%zmm", 32: "%ymm"}[machine.vector_bytes]
    fma = [i for i, line in enumerate(lines) if "vfmadd" in line and line.count(register) == 3]
    assert len(fma) >= chains
    between = [line for line in lines[fma[0] : fma[chains - 1]] if "vmov" in line]
    assert not between, "an accumulator is spilled inside the loop"


def test_peak_is_positive_and_grows_with_the_vector_width() -> None:
    assert measure.multiply_add_peak(1) > 0
    assert measure.multiply_add_peak(1, "float64") > 0


def test_read_and_triad_touch_every_element() -> None:
    rng = np.random.default_rng(0)
    b, c = (rng.random((2, 3, 8, 4), dtype=np.float32) for _ in range(2))
    measure.set_threads(1)
    total = tvm.runtime.tensor(np.zeros((2, 8, 4), "float32"))
    measure._read_kernel(2, 3, 4)["main"](tvm.runtime.tensor(b), total)
    np.testing.assert_allclose(total.numpy(), b.astype("float64").sum(1), rtol=1e-6)
    a = tvm.runtime.tensor(np.full(b.shape, np.nan, "float32"))
    measure._triad_kernel(2, 3, 4)["main"](a, tvm.runtime.tensor(b), tvm.runtime.tensor(c))
    np.testing.assert_allclose(a.numpy(), b + 3 * c.astype("float64"), rtol=1e-6)


def test_bandwidth_is_positive() -> None:
    assert measure.memory_bandwidth(1) > 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: measure.multiply_add_peak(1, "int8"), "float32 or float64, got 'int8'"),
        (lambda: measure.multiply_add_peak(0), "at least 1, got 0"),
        (lambda: measure.multiply_add_peak(1, target="llvm -mtriple=riscv64-linux-gnu"), "is for riscv64"),
        (lambda: measure.memory_bandwidth(1, "write"), "'read' or 'triad', got 'write'"),
        (lambda: measure.time_call(lambda: None, repeat=0), "at least 1 is required"),
        (lambda: measure.alternate({}, rounds=0), "at least 1 is required"),
        (lambda: measure.summarize([]), "at least 1 run"),
    ],
)
def test_measure_refuses(call: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call()  # type: ignore[operator]


def test_peak_refuses_a_target_whose_instructions_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cpu_flags", lambda: frozenset({"sse4_2"}))
    with pytest.raises(InputError, match="CPU features that this machine lacks"):
        measure.multiply_add_peak(1)


def test_a_pool_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "use_threads", lambda n: n - 1)
    with pytest.raises(InputError, match=r"asked for 3 threads.*holds 2.*TVM_NUM_THREADS=3"):
        measure.set_threads(3)


def test_summarize_orders_and_counts() -> None:
    found = measure.summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert found == {"best": 1.0, "median": 5.5, "p90": 9.0, "runs": 10}
    assert measure.summarize([2.0]) == {"best": 2.0, "median": 2.0, "p90": 2.0, "runs": 1}


def test_geomean() -> None:
    assert measure.geomean([]) is None
    assert measure.geomean([2.0, 8.0]) == pytest.approx(4.0)


def test_alternate_turns_the_order_round() -> None:
    order: list[str] = []
    times = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=0)
    assert "".join(order) == "abbaab"
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_time_call_does_not_count_the_warmup() -> None:
    calls: list[int] = []
    assert len(measure.time_call(lambda: calls.append(1), repeat=4, warmup=2)) == 4
    assert len(calls) == 6


# ---------------------------------------------------------------- workers

# A worker whose engine doubles its input; `run` may be replaced to fail in some way.
_FAKE = """
import os, signal, sys, time
import numpy as np
from gemmify.bench import peers, worker

class Fake:
    version = "1"
    def __init__(self, path, threads):
        print("libraries print what they like")
        self.runs = 0
    def run(self, inputs):
        self.runs += 1
        {body}
        return [2 * inputs["x"]]
    def profile(self, inputs, repeat):
        return [("k", 0.5 * repeat)]

peers.ENGINES["fake"] = (Fake, "numpy", "", ".onnx")
worker.main()
"""


def _start(body: str = "pass", timeout: float = 30.0):  # noqa: ANN202
    script = _FAKE.format(body=body)
    return lambda name: WorkerProcess("fake", [sys.executable, "-c", script], timeout)


def _loaded(tmp_path: Path, body: str = "pass", timeout: float = 30.0) -> WorkerProcess:
    np.savez(tmp_path / "in.npz", x=np.ones(3, "float32"))
    process = _start(body, timeout)("fake")
    process.ask("load", engine="fake", model="none", threads=1, inputs=str(tmp_path / "in.npz"))
    return process


def test_worker_answers_its_requests(tmp_path: Path) -> None:
    with _loaded(tmp_path) as process:
        reply = process.ask("burst", runs=3, drop=2)
        assert len(reply["seconds"]) == 3 and all(s >= 0 for s in reply["seconds"])
        process.ask("outputs", path=str(tmp_path / "out.npz"))
        with np.load(tmp_path / "out.npz") as data:
            np.testing.assert_array_equal(data["arr_0"], np.full(3, 2, "float32"))
        assert process.ask("profile", repeat=4)["kernels"] == [["k", 2.0]]


def test_paused_worker_uses_no_cpu(tmp_path: Path) -> None:
    spin = "import threading; threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()"
    with _loaded(tmp_path, spin) as process:
        if not process._tethered:
            pytest.skip("this system cannot tie a worker to its parent's life")
        process.ask("burst", runs=1, drop=0)
        process.pause()
        time.sleep(0.5)
        reply = process.ask("burst", runs=1, drop=0)
        assert reply["idle"] >= 0.5
        assert reply["idle_cpu"] < 0.5 * reply["idle"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"engine fake: its process ended by SIGSEGV during 'burst'"),
        ("print('out of luck', file=sys.stderr); os._exit(3)", r"ended with exit status 3.*it said: out of luck"),
        ("raise ValueError('no such kernel')", r"engine fake failed in 'burst': ValueError: no such kernel"),
        ("time.sleep(60)", r"no answer to 'burst' within 0.5 s"),
    ],
)
def test_failing_worker_gives_one_clear_error(tmp_path: Path, body: str, text: str) -> None:
    with _loaded(tmp_path, body) as process, pytest.raises(GemmifyError, match=text) as caught:
        process._timeout = 0.5 if "sleep" in body else 30.0
        process.ask("burst", runs=1, drop=0)
    assert "\n" not in str(caught.value)
    assert process._process.poll() is not None


def test_worker_that_does_not_start_gives_one_clear_error() -> None:
    with (
        WorkerProcess("fake", [sys.executable, "-c", "raise SystemExit('bad installation')"]) as process,
        pytest.raises(GemmifyError, match=r"ended with exit status 1 during 'load'; it said: bad installation"),
    ):
        process.ask("load")


def test_reply_that_is_not_json_is_told() -> None:
    with (
        WorkerProcess("fake", [sys.executable, "-c", "input(); print('hello')"]) as process,
        pytest.raises(GemmifyError, match="is not JSON: b'hello'"),
    ):
        process.ask("load")


def test_worker_survives_bad_requests() -> None:
    requests = io.StringIO('{"do": "burst", "runs": 1, "drop": 0}\n{"do": "nonsense"}\n{"do": "quit"}\n{"do": "late"}\n')
    replies = io.StringIO()
    worker.serve(requests, replies)
    answers = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert len(answers) == 2
    assert all("needs a loaded engine" in answer["error"] for answer in answers)


def test_missing_and_unknown_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.ENGINES, "openvino", (peers.OpenVino, "no_such_module_here", "peers", ".onnx"))
    with pytest.raises(InputError, match=r"'openvino' is not installed; try: pip install 'gemmify\[peers\]'"):
        peers.check_peers(["openvino"])
    with pytest.raises(InputError, match="unknown peer 'tflite'; choose from onnxruntime, openvino, torch"):
        peers.check_peers(["tflite"])
    monkeypatch.setitem(peers.ENGINES, "onnxruntime", (peers.OnnxRuntime, "json", "peers", ".onnx"))
    with pytest.raises(InputError, match="named twice"):
        peers.check_peers(["onnxruntime", "onnxruntime"])


# ---------------------------------------------------------------- rounds


def test_engines_take_turns_and_run_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "SETTLE_SECONDS", 0.0)
    log: list[tuple[str, str]] = []

    class Logged(WorkerProcess):
        def ask(self, do: str, **fields: object) -> dict[str, object]:
            log.append((self.name, do))
            return super().ask(do, **{**fields, **({"engine": "fake"} if do == "load" else {})})

    def start(name: str) -> WorkerProcess:
        process = Logged("fake", [sys.executable, "-c", _FAKE.format(body="time.sleep(0.002)")])
        process.name = name
        return process

    ticks: list[int] = []
    found = rounds.measure_engines(
        {"a": Path("a"), "b": Path("b")},
        {"x": np.arange(3, dtype="float32")},
        1,
        repeat=7,
        profile="a",
        start=start,
        between=lambda: ticks.append(1),
    )
    for name in "ab":
        engine = found["engines"][name]
        assert len(engine["times"]) == engine["runs"] == 7
        assert engine["best"] <= engine["median"] <= engine["p90"]
        np.testing.assert_array_equal(found["outputs"][name][0], 2 * np.arange(3, dtype="float32"))
    assert found["kernels"] == [["k", 3.5]]
    assert len(ticks) == 3
    turns = "".join(name for name, do in log if do == "burst")[2:]  # the first two are the probes
    assert turns.startswith("abbaab") and turns.count("a") == turns.count("b") >= 3
    json.dumps(found["engines"], allow_nan=False)


def test_a_dead_engine_ends_the_measurement_with_its_name() -> None:
    start = _start("os._exit(5) if self.runs > 3 else None")
    with pytest.raises(GemmifyError, match="engine fake: its process ended with exit status 5"):
        rounds.measure_engines({"fake": Path("m")}, {"x": np.ones(2, "float32")}, 1, repeat=20, start=start)


@pytest.mark.parametrize(("seconds", "repeat", "size"), [(1e-3, 1000, 150), (1e-3, 40, 8), (1.0, 40, 1), (1e-3, 1, 1)])
def test_burst_size(seconds: float, repeat: int, size: int) -> None:
    assert rounds.burst_size(seconds, repeat) == size


def test_agreement() -> None:
    a, b = [np.array([1.0, -4.0])], [np.array([1.1, -4.0])]
    found = rounds.agreement(a, b, "peer")
    assert found == {"max_abs": pytest.approx(0.1), "relative": pytest.approx(0.025)}
    assert rounds.agreement(a, [np.array([np.nan, -4.0])], "peer") == {"max_abs": None, "relative": None}
    with pytest.raises(GemmifyError, match=r"engine peer returns outputs of shapes \[\(3,\)\]"):
        rounds.agreement(a, [np.zeros(3)], "peer")


# ---------------------------------------------------------------- suites


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


def test_suite_result_is_json_with_its_schema() -> None:
    from gemmify.bench import render, run_suite

    found = run_suite("gemm", layer="odd:31x37x41", threads=1, repeat=2)
    assert found["schema"] == header.SCHEMA and found["kind"] == "suite"
    assert {"date", "command", "machine", "versions", "peak", "bandwidth", "rows", "geomean"} <= set(found)
    assert found["machine"]["threads"] == 1 and found["peak"]["gflops"] > 0
    (row,) = found["rows"]
    assert row["macs"] == 31 * 37 * 41 and row["runs"] >= 2 and 0 < row["best"] <= row["median"]
    assert row["gflops"] == pytest.approx(2 * row["macs"] / row["best"] / 1e9)
    assert found["geomean"]["auto"] == pytest.approx(row["peak_share"])
    assert "odd:31x37x41" in _text(render(json.loads(json.dumps(found, allow_nan=False))))


def test_suite_tells_why_a_lowering_does_not_apply() -> None:
    from gemmify.bench import render, run_suite

    found = run_suite("layers", layer="alexnet:conv1", lowerings=["pointwise"], threads=1)
    assert "best" not in found["rows"][0] and found["rows"][0]["reason"]
    assert found["geomean"] == {"pointwise": None}
    assert "not applicable" in _text(render(found))
    with pytest.raises(InputError, match="unknown lowering 'magic'"):
        run_suite("layers", lowerings=["magic"])


# ---------------------------------------------------------------- networks


def _layer(name: str, op: str, kernels: list[str]) -> dict[str, object]:
    return {"name": name, "op": op, "kernels": kernels, "lowering": "x"}


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
    assert list(by_kind)[0] == "conv"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fused_lrn_avg_pool", "lrn"), ("adaptive_avg_pool2d", "pooling"), ("concatenate", "concat"), ("reshape2", "other")],
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


def test_peers_that_cannot_read_the_model_are_told() -> None:
    with pytest.raises(InputError, match=r"peer 'torch' reads \.pt2 files, and alexnet is not one"):
        network._source(Path("alexnet.pt2").stem, ["torch"])
    with pytest.raises(InputError, match=r"peer 'onnxruntime' reads \.onnx files, and net is not one"):
        network._source("net.pt2", ["onnxruntime"])


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
    kernels = network.kernel_rows([("dense_gemm", ours)], [_layer("fc[0]", "dense", ["dense_gemm"])])
    return {
        **header.header("model", 2, "llvm"),
        "peak": {"gflops": 100.0, "samples": [100.0]},
        "bandwidth": {"read": 10.0, "triad": 12.0},
        "model": {"name": "net", "macs": 10**9, "layers": 1, "inputs": {}, "memory": {}},
        "engines": network.compare_engines(_measured(ours, peer, wrong), 10**9, 100.0),
        "tolerance": network.TOLERANCE,
        "kernels": kernels,
        "kinds": network.kinds(kernels),
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
    for part in ("onnxruntime 1", "150.00", "1.50", "fc[0]", "100.0 %", "100 GFLOP/s"):
        assert part in shown
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
    assert lines[0] == "| network | gemmify ms | onnxruntime ms | speedup | of peak |"
    assert lines[2] == "| net | 100.00 | 200.00 | 2.00 | 20 % |"
    assert lines[4].endswith("| 10.00 | - | 20 % |")
    assert "geometric mean 1.00, least 0.50" in found["markdown"]
    assert "geometric mean 1.00" in _text(report.render(json.loads(json.dumps(found, allow_nan=False))))
    with pytest.raises(InputError, match="at least one model and one peer"):
        report.peers_report(["alexnet"], peers=())


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
    import importlib.util

    return importlib.util.find_spec(module) is not None


def test_worker_package_loads_no_compiler() -> None:
    code = "import sys, gemmify.bench.worker; print(sorted({'tvm', 'onnx', 'rich'} & set(sys.modules)))"
    import subprocess

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert found.stdout.strip() == "[]"
