"""The workers of `gemmify.bench`: they answer, they take turns, and every failure is one clear error."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemmify.bench import peers, rounds, worker
from gemmify.bench.process import WorkerProcess
from gemmify.errors import GemmifyError, InputError

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


def _start(body: str = "pass", timeout: float = 30.0) -> Callable[[str], WorkerProcess]:
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
    requests = io.StringIO(
        '{"do": "burst", "runs": 1, "drop": 0}\n{"do": "nonsense"}\n{"do": "quit"}\n{"do": "late"}\n'
    )
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


def test_worker_package_loads_no_compiler() -> None:
    code = "import sys, gemmify.bench.worker; print(sorted({'tvm', 'onnx', 'rich'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
