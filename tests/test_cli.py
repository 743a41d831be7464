"""The command line: what each verb prints and writes, the exit codes, and that an error is one line."""

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
import standin
from onnx import TensorProto, helper, numpy_helper

import gemmify
from gemmify import cli, verify
from gemmify.commands import run as run_command
from gemmify.manifest import TensorSpec

ROOT = Path(__file__).resolve().parent.parent


def make_onnx() -> onnx.ModelProto:
    """conv 3x3 + relu -> global average pool -> flatten -> fully connected."""
    rng = np.random.default_rng(3)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / 4).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["data", "w1", "b1"], ["c"], name="stem", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["scores"], name="fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 4, 10, 9])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 5])],
        [weight("w1", 16, 4, 3, 3), weight("b1", 16), weight("w2", 5, 16), weight("b2", 5)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    onnx.save(make_onnx(), str(path))
    return path


@pytest.fixture(scope="module")
def standin_library(tmp_path_factory) -> Path:
    return standin.model().export(tmp_path_factory.mktemp("lib") / "standin.so")


@pytest.fixture(scope="module")
def tiny_library(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lib") / "tiny.so"
    assert cli.main(["compile", str(tiny), "-o", str(path)]) == 0
    return path


def gemmify_process(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TVM_")} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "gemmify", *words], capture_output=True, text=True, env=env, cwd=cwd, timeout=120
    )


def fails(capfd, words: list[str], code: int, *parts: str) -> None:
    """`gemmify words` ends with `code` and one line on stderr that holds all `parts`."""
    assert cli.main(words) == code
    err = capfd.readouterr().err
    lines = err.splitlines()
    assert lines and lines[-1].startswith("gemmify: error: ") and "Traceback" not in err, err
    assert all(part in lines[-1] for part in parts), lines[-1]
    assert sum(line.startswith("gemmify: error") for line in lines) == 1


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_a_library(standin_library, capfd):
    assert cli.main(["run", str(standin_library), "--repeat", "3", "--seed", "5"]) == 0
    out, err = capfd.readouterr()
    hidden, total = standin.reference(gemmify.runtime.random_inputs(standin.model().inputs, 5)["data"])
    first, second, last = out.splitlines()
    assert first.startswith("hidden  1x8x64 float32") and f"argmax {hidden.argmax()}" in first
    assert second.startswith("total  1x8 float32") and f"max {total.max():.4g}"[:8] in second
    assert last.startswith("time median ") and "of 3 on " in last
    assert err == ""


def test_run_reads_and_writes_numpy_files(standin_library, tmp_path):
    x = standin.data(9)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", data=x)
    for given in ("x.npy", "data=x.npy", "x.npz"):
        name, _, file = given.rpartition("=")
        argument = (name + "=" if name else "") + str(tmp_path / file)
        out = tmp_path / "y.npz"
        assert cli.main(["run", str(standin_library), "--input", argument, "--output", str(out)]) == 0
        with np.load(out) as y:
            assert y.files == ["hidden", "total"]
            assert np.allclose(y["total"], standin.reference(x)[1], rtol=1e-4, atol=1e-3)
        out.unlink()
    assert not list(tmp_path.glob(".gemmify-*"))


def test_random_inputs_by_name_and_for_the_rest(tmp_path):
    specs = [TensorSpec("a", (2,), "float32"), TensorSpec("b", (3,), "float32")]
    drawn = gemmify.runtime.random_inputs(specs, 4)
    np.save(tmp_path / "a.npy", np.ones(2, np.float32))
    both = [f"a={tmp_path / 'a.npy'}", "b=random"]
    for given, ones in (
        (["random"], False),
        (["a=random", "b=random"], False),
        (both, True),
        ([both[0], "random"], True),
    ):
        found = run_command.read_inputs(given, specs, 4)
        assert np.array_equal(found["b"], drawn["b"])
        assert np.array_equal(found["a"], np.ones(2) if ones else drawn["a"])


def test_outputs_of_any_name_are_written(tmp_path):
    arrays = {"file": np.ones(2), "a/b:0": np.zeros((0, 3), np.float32), "s": np.float32(3)}
    run_command.write_npz(str(tmp_path / "y.npz"), arrays)
    with np.load(tmp_path / "y.npz") as y:
        assert sorted(y.files) == sorted(arrays)
        assert y["a/b:0"].shape == (0, 3) and y["s"] == 3


def test_json_goes_to_a_file_or_alone_to_stdout(standin_library, tmp_path, capfd):
    assert cli.main(["run", str(standin_library), "--json", str(tmp_path / "r.json")]) == 0
    assert "hidden" in capfd.readouterr().out
    assert cli.main(["run", str(standin_library), "--json", "-"]) == 0
    printed = json.loads(capfd.readouterr().out)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["outputs"] == printed["outputs"] and printed["outputs"][0]["shape"] == [1, 8, 64]


def test_run_in_a_process_of_its_own_imports_no_model_reader(standin_library):
    code = (
        "import sys\nfrom gemmify.cli import main\nassert main(['run', sys.argv[1]]) == 0\n"
        "heavy = {'onnx', 'xgboost', 'scipy', 'torch'} & {m.split('.')[0] for m in sys.modules}\n"
        "assert not heavy, heavy\nassert 'libtvm_compiler' not in open('/proc/self/maps').read()\n"
    )
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, str(standin_library)], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, parts",
    [
        ([], ["VERB", "gemmify --help"]),
        (["fly"], ["invalid choice: 'fly'"]),
        (["run"], ["LIB|MODEL"]),
        (["run", "x.so", "--threads", "0"], ["'0' is not a whole number"]),
        (["run", "x.so", "--repeat", "many"], ["'many'"]),
        (["compile", "x.onnx", "--shape", "data"], ["NAME=SIZES"]),
        (["compile", "x.onnx", "--shape", "data=1,0"], ["NAME=SIZES"]),
        (["compile", "x.onnx", "--lowering", "a=im2col,b"], ["'b' is not LAYER=KEY"]),
        (["compile", "x.onnx", "--max-workspace", "lots"], ["number of bytes"]),
        (["compile", "x.onnx", "--lowering", "a=im2col,a=direct"], ["layer a is given both im2col and direct"]),
        (["compile", "x.onnx", "--lowering", "a=im2col", "--lowering", "a=direct"], ["layer a both im2col and direct"]),
        (["compile", "x.onnx", "--lowering", "im2col", "--lowering", "direct"], ["every layer both im2col and direct"]),
        (["compile", "squeezenet", "--threads", "9999"], ["9999 threads", "may use", "or fewer"]),
        (["plan", "squeezenet", "--threads", "9999"], ["9999 threads"]),
        (["verify", "squeezenet", "--threads", "9999"], ["9999 threads"]),
        (["bench", "squeezenet", "--threads", "9999"], ["9999 threads"]),
        (["bench", "--suite", "gemm", "--quick", "--threads", "9999"], ["9999 threads"]),
        (["run", "nothing.so"], ["there is no file nothing.so"]),
        (["bench"], ["either MODELs or --suite"]),
        (["verify", "tiny.onnx", "tiny.so", "--lowering", "im2col"], ["either a library or lowering"]),
    ],
)
def test_wrong_calls(capfd, words, parts):
    fails(capfd, words, 2, *parts)


def test_wrong_inputs(standin_library, tmp_path, capfd):
    library = str(standin_library)
    np.save(tmp_path / "x.npy", np.zeros((2, 2), np.float32))
    (tmp_path / "bad.npy").write_text("no array")
    fails(capfd, ["run", library, "--input", "data=none.npy"], 2, "there is no file none.npy")
    fails(capfd, ["run", library, "--input", f"data={tmp_path / 'bad.npy'}"], 2, "cannot read", "numpy.save")
    fails(capfd, ["run", library, "--input", f"other={tmp_path / 'x.npy'}"], 2, "unknown input other")
    fails(capfd, ["run", library, "--input", str(tmp_path / "x.npy")], 2, "must have shape (1, 8, 64), got (2, 2)")
    fails(capfd, ["run", library, "--input", "data="], 2, "'data=' lacks a name or a file", "NAME=random")
    fails(capfd, ["run", library, "--input", "dta=random"], 2, "unknown input dta", "data: 1x8x64 float32")
    fails(capfd, ["run", library, "--threads", "9999"], 2, "9999 threads")
    fails(capfd, ["run", library, "--strict"], 2, "compiled already")
    fails(capfd, ["run", library, "--output", str(tmp_path / "no" / "y.npz")], 2, "there is no folder")


def test_debug_shows_the_traceback(capfd):
    assert cli.main(["run", "nothing.so", "--debug"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("gemmify: error: there is no file")


def test_a_fault_of_ours_is_one_line_too(standin_library, capfd, monkeypatch):
    def broken(*_a, **_k):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(run_command, "execute", broken)
    fails(capfd, ["run", str(standin_library)], 1, "RuntimeError: second line", "--debug")


def test_interrupted(standin_library, capfd, monkeypatch):
    def interrupted(*_a, **_k):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_command, "execute", interrupted)
    fails(capfd, ["run", str(standin_library)], 130, "interrupted")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling_leaves_no_file(tmp_path, sent):
    """Sent at a moment when the linker runs: a linker that waits stands in for a long one."""
    onnx.save(make_onnx(), str(tmp_path / "tiny.onnx"))
    slow, out = tmp_path / "slow-cc", tmp_path / "out"
    slow.write_text('#!/bin/sh\necho half > "$4"\n: > "$(dirname "$0")/linking"\nexec sleep 60\n')
    slow.chmod(0o755)
    out.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("TVM_")}
    env |= {"PYTHONPATH": str(ROOT), "CXX": str(slow)}
    process = subprocess.Popen(
        [sys.executable, "-m", "gemmify", "compile", str(tmp_path / "tiny.onnx"), "-o", str(out / "tiny.so")],
        env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # A shell starts its background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for _ in range(600):
        if (tmp_path / "linking").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "gemmify: error: interrupted"
    assert not list(out.iterdir())


# --- compile, inspect, verify, list ----------------------------------------------------------------------------------


def test_compile_writes_a_library_and_says_what_became_of_each_layer(tiny, tmp_path, capfd):
    out = tmp_path / "tiny.so"
    assert cli.main(["compile", str(tiny), "-o", str(out), "--json", str(tmp_path / "r.json")]) == 0
    said, err = capfd.readouterr()
    assert "stem" in said and "fc" in said and f"wrote {out}" in said and "memory: weights" in said
    assert " (in the arena), outputs " in said and " (scratch inside kernels); at most " in said
    assert [line.split()[0] for line in err.splitlines()][-1] == "export", "progress by stage on stderr"
    result = json.loads((tmp_path / "r.json").read_text())
    assert {layer["name"] for layer in result["layers"]} == {"stem", "fc"}
    assert result["bytes"] == out.stat().st_size
    x = gemmify.runtime.random_inputs(gemmify.load(out).inputs, 1)
    (want,), engine = verify.reference_outputs(make_onnx(), x, ["scores"], "float64")
    assert engine == "float64" and np.abs(gemmify.load(out).run(x)[0] - want).max() < 1e-5 * np.abs(want).max()


def test_compile_takes_a_lowering_and_refuses_unknown_ones(tiny, tmp_path, capfd):
    out = str(tmp_path / "t.so")
    assert cli.main(["compile", str(tiny), "-o", out, "--lowering", "stem=im2row", "--json", "-"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert {layer["name"]: layer["lowering"] for layer in result["layers"]}["stem"] == "im2row"
    several = ["--lowering", "fc=dense", "--lowering", "im2col", "--max-workspace", "10MiB"]
    assert cli.main(["compile", str(tiny), "-o", out, *several, "--json", "-"]) == 0
    layers = json.loads(capfd.readouterr().out)["layers"]
    assert {layer["name"]: layer["lowering"] for layer in layers} == {"stem": "im2col", "fc": "dense"}
    fails(capfd, ["compile", str(tiny), "-o", out, "--lowering", "im2pony"], 2, "im2pony", "im2row")
    fails(capfd, ["compile", str(tiny), "-o", out, "--lowering", "stern=im2row"], 2, "stern", "stem")
    fails(capfd, ["compile", str(tiny), "-o", str(tmp_path / "no" / "t.so")], 2, "there is no folder")


def test_inspect_counts_the_arithmetic(tiny, tiny_library, capfd):
    for what in (tiny, tiny_library):
        assert cli.main(["inspect", str(what), "--json", "-"]) == 0
        result = json.loads(capfd.readouterr().out)
        layers = {layer["name"]: layer for layer in result["layers"]}
        assert list(layers) == ["stem", "fc"], "in the order in which they run"
        assert layers["stem"]["macs"] == 16 * 90 * 9 * 4 and layers["fc"]["macs"] == 16 * 5
        assert result["macs"] == layers["stem"]["macs"] + layers["fc"]["macs"]
        assert sum(layer["share"] for layer in layers.values()) == pytest.approx(1)
        assert cli.main(["inspect", str(what)]) == 0
        assert "stem" in capfd.readouterr().out


@pytest.mark.parametrize("reference", ["float64", "auto"])
def test_verify_holds_for_a_library_and_for_a_lowering(tiny, tiny_library, capfd, reference):
    assert cli.main(["verify", str(tiny), str(tiny_library), "--reference", reference]) == 0
    assert "yes" in capfd.readouterr().out
    assert cli.main(["verify", str(tiny), "--lowering", "im2col", "--reference", reference]) == 0


def test_verify_fails_where_the_numbers_differ(tiny, tiny_library, tmp_path, capfd):
    changed = make_onnx()
    weight = next(t for t in changed.graph.initializer if t.name == "w2")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), "w2"))
    onnx.save(changed, str(tmp_path / "changed.onnx"))
    words = ["verify", str(tmp_path / "changed.onnx"), str(tiny_library), "--reference", "float64"]
    fails(capfd, words, 1, "does not agree with float64", "scores: relative error", "was made from tiny")
    fails(capfd, [*words[:3], "--reference", "oracle"], 2, "'oracle' is unknown")
    fails(capfd, ["verify", "none.onnx", str(tiny_library)], 2, "there is no file none.onnx")
    fails(capfd, ["verify", "small.txt", str(tiny_library)], 2, "has no reference")


def test_verify_refuses_a_library_of_another_model(tiny, tiny_library, standin_library, tmp_path, capfd):
    fails(capfd, ["verify", str(tiny), str(standin_library)], 2, "inputs are data: 1x4x10x9", "data: 1x8x64")
    for change, side in (
        ("scores", "outputs are logits: 1x5, the library's are scores: 1x5"),
        ("data", "inputs are logits"),
    ):
        renamed = make_onnx()
        for node in renamed.graph.node:
            for names in (node.input, node.output):
                for i in [i for i, name in enumerate(names) if name == change]:
                    names[i] = "logits"
        for value in [*renamed.graph.input, *renamed.graph.output]:
            value.name = "logits" if value.name == change else value.name
        onnx.save(renamed, str(tmp_path / "renamed.onnx"))
        fails(capfd, ["verify", str(tmp_path / "renamed.onnx"), str(tiny_library)], 2, "was not made from", side)


def test_verify_takes_another_batch(tiny, tmp_path, capfd):
    out = str(tmp_path / "batch.so")
    assert cli.main(["compile", str(tiny), "-o", out, "--shape", "data=2,4,10,9"]) == 0
    for reference in ("auto", "float64"):
        assert cli.main(["verify", str(tiny), out, "--reference", reference]) == 0
    capfd.readouterr()


def test_bfloat16_layers_are_refused_in_words(tmp_path, capfd):
    elem = TensorProto.BFLOAT16
    weight = helper.make_tensor("w", elem, [4, 2, 3, 3], np.ones(72))
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="stem")],
        "half",
        [helper.make_tensor_value_info("x", elem, [1, 2, 5, 5])],
        [helper.make_tensor_value_info("y", elem, [1, 4, 3, 3])],
        [weight],
    )
    path = tmp_path / "half.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), str(path))
    for verb in ("plan", "verify"):
        fails(capfd, [verb, str(path), *(["-o", str(tmp_path / "p.json")] if verb == "plan" else [])], 2,
              "layer stem computes in bfloat16", "float16, float32 and float64")  # fmt: skip


def test_the_reason_names_what_the_workspace_bound_removed(tmp_path):
    from gemmify.pipeline import plan_model
    from gemmify.select import make_policy

    free = plan_model("squeezenet").layers
    bound = plan_model("squeezenet", max_workspace="0KiB").layers
    changed = [(a, b) for a, b in zip(free, bound, strict=True) if a["lowering"] != b["lowering"]]
    assert changed, "some layer takes workspace where it may"
    for before, after in changed:
        assert f"; {before['lowering']} needs " in after["reason"] and "above the bound" in after["reason"]
    assert all("bound" not in layer["reason"] for layer in free)
    assert make_policy("auto", False, "64KiB").max_workspace == 65536
    for wrong in ("many", 1.5, True, b"1"):
        with pytest.raises(gemmify.InputError, match=r"max_workspace: .* is not a number of bytes"):
            make_policy("auto", False, wrong)


# --- where nothing can be written ------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "line, said",
    [
        ("inspect {lib} > /dev/full", "cannot write to the standard output: No space left on device"),
        ("inspect {lib} --json - > /dev/full", "cannot write to the standard output"),
        ("--version > /dev/full", "cannot write to the standard output"),
        ("inspect {lib} >&-", "the standard output is closed"),
    ],
)
def test_a_standard_output_that_takes_nothing(standin_library, line, said):
    command = f"{sys.executable} -m gemmify {line.format(lib=standin_library)}"
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.startswith(f"gemmify: error: {said}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_disk_under_the_dump(tiny, tmp_path, capfd):
    (tmp_path / "1_imported.py").symlink_to("/dev/full")
    words = ["compile", str(tiny), "-o", str(tmp_path / "t.so"), "--dump", str(tmp_path)]
    fails(capfd, words, 1, f"cannot dump into {tmp_path}: No space left on device")


def test_the_float64_reference_is_in_float64():
    x = {"data": np.random.default_rng(0).standard_normal((1, 4, 10, 9)).astype(np.float32)}
    (got,), _ = verify.reference_outputs(make_onnx(), x, ["scores"], "float64")
    assert got.dtype == np.float64
    w = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in make_onnx().graph.initializer}
    padded = np.pad(x["data"].astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    conv = np.einsum("nchwij,mcij->nmhw", windows, w["w1"]) + w["b1"][None, :, None, None]
    want = np.maximum(conv, 0).mean(axis=(2, 3)) @ w["w2"].T + w["b2"]
    assert np.abs(got - want).max() < 1e-13


def test_list_names_every_lowering_and_network(capfd):
    from gemmify.zoo import ZOO
    from lowering import LOWERINGS

    assert cli.main(["list"]) == 0
    out = capfd.readouterr().out
    assert all(key in out for key in [*LOWERINGS, *ZOO])
    assert cli.main(["list", "--json", "-"]) == 0
    assert [low["key"] for low in json.loads(capfd.readouterr().out)["lowerings"]] == list(LOWERINGS)


def test_python_m_gemmify():
    done = gemmify_process("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"gemmify {gemmify.__version__}")
    done = gemmify_process("run", "nothing.so")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_error(standin_library):
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    command = f"{sys.executable} -m gemmify inspect {standin_library} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
