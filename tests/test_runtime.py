"""Running, exporting and loading a compiled network, in this process and in fresh ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import standin

import gemmify
from gemmify import host
from gemmify.manifest import Manifest, read_manifest

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *args: str, prefix: tuple[str, ...] = (), **env: str) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TVM_")}
    kept |= {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, *args], capture_output=True, text=True, env=kept, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Scope" not in done.stderr, "TVM's log lines must not reach the user"
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return standin.model().export(tmp_path_factory.mktemp("lib") / "net.so")


def close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_run_gives_the_outputs_in_order():
    model, x = standin.model(), standin.data()
    close(model.run({"data": x}), standin.reference(x))
    close(model(x), standin.reference(x))
    assert [o.name for o in model.outputs] == ["hidden", "total"]


def test_results_are_copies_that_a_later_run_leaves_alone():
    model = standin.model()
    first = model(standin.data(1))
    kept = [a.copy() for a in first]
    model(standin.data(2))
    assert all((a == b).all() for a, b in zip(first, kept, strict=True))
    assert all(a.flags.writeable for a in first)


@pytest.mark.parametrize("view", ["transposed", "strided", "reversed", "fortran"])
def test_inputs_need_not_be_contiguous(view):
    x = standin.data(3)
    arrays = {
        "transposed": np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0),
        "strided": np.repeat(x, 2, axis=2)[:, :, ::2],
        "reversed": np.ascontiguousarray(x[:, ::-1])[:, ::-1],
        "fortran": np.asfortranarray(x),
    }
    assert not arrays[view].flags.c_contiguous
    assert (arrays[view] == x).all()
    close(standin.model()(arrays[view]), standin.reference(x))


def test_export_load_round_trip(library):
    built, loaded, x = standin.model(), gemmify.load(library), standin.data(4)
    assert all((a == b).all() for a, b in zip(built(x), loaded(x), strict=True))
    assert loaded.manifest == built.manifest
    assert loaded.layers == built.layers and loaded.memory() == built.memory()
    beside = json.loads(library.with_name("net.so.json").read_text())
    assert beside["plan"] == {"format": 1, "layers": {"product": "dense"}}


def test_a_moved_single_file_still_loads_and_copies_itself(library, tmp_path):
    moved = tmp_path / "renamed.bin"
    moved.write_bytes(library.read_bytes())
    model = gemmify.load(moved)
    copy = model.export(tmp_path / "again.so")
    assert copy.read_bytes() == library.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.so", "again.so.json", "renamed.bin"]


def test_a_failed_export_keeps_the_old_file(tmp_path, monkeypatch):
    place = tmp_path / "net.so"
    place.write_bytes(b"old")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(gemmify.GemmifyError, match=r"cannot link net.so"):
        standin.model().export(place)
    assert place.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["net.so"]


@pytest.mark.parametrize(
    "said, advice, other",
    [
        ("ld: final link failed: No space left on device", "free disk space", "install"),
        ("cc: error: unknown architecture", "set CXX to a compiler", "disk"),
    ],
)
def test_the_advice_fits_what_the_linker_said(tmp_path, monkeypatch, said, advice, other):
    linker = tmp_path / "cc"
    linker.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    linker.chmod(0o755)
    monkeypatch.setenv("CXX", str(linker))
    with pytest.raises(gemmify.GemmifyError) as caught:
        standin.model().export(tmp_path / "net.so")
    told = str(caught.value)
    assert f"cannot link net.so: {said}; " in told and advice in told and other not in told.split("; ", 1)[1]


def test_linking_without_a_compiler_uses_the_bare_linker(tmp_path, monkeypatch):
    import shutil

    linker = shutil.which("ld")
    if linker is None:
        pytest.skip("no ld on this machine")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ld").symlink_to(linker)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    place = standin.model().export(tmp_path / "net.so")
    x = standin.data(5)
    close(gemmify.load(place)(x), standin.reference(x))


def test_manifest_round_trip_and_names():
    _, manifest = standin.compiled()
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert host.arch_of(manifest.triple) == host.host_arch()
    assert set(manifest.cpu_features) <= (host.cpu_flags() or frozenset())


@pytest.mark.skipif(host.host_arch() != "x86_64", reason="x86 feature names")
def test_required_features_follow_the_target():
    import tvm

    from gemmify.manifest import required_cpu_features

    def needs(**target):
        return set(required_cpu_features(tvm.target.Target({"kind": "llvm", **target})))

    assert {"avx2", "fma", "bmi2", "movbe", "f16c", "abm"} <= needs(mcpu="x86-64-v3")
    assert not {f for f in needs(mcpu="x86-64-v3") if f.startswith("avx512")}
    assert {"avx512f", "avx512_vnni"} <= needs(mcpu="icelake-server")
    assert "avx512f" not in needs(mcpu="icelake-server", mattr=["-avx512f"])
    assert "asimd" in needs(mtriple="aarch64-linux-gnu", mattr=["+neon"])


FRESH = """
import sys, time
begin = time.perf_counter()
import gemmify
assert not {"tvm", "numpy", "onnx"} & set(sys.modules), "importing gemmify must be light"
import numpy as np
model = gemmify.load(sys.argv[1])
x = np.load(sys.argv[2])
out = model(x)
seconds = time.perf_counter() - begin
np.savez(sys.argv[3], *out)
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"onnx", "xgboost", "scipy", "torch"})
maps = open("/proc/self/maps").read()
import os
print(heavy, "libtvm_compiler" in maps, "libtvm_runtime" in maps, "TVM_USE_RUNTIME_LIB" in os.environ, seconds)
"""


def test_a_fresh_process_loads_only_the_runtime(library, tmp_path):
    x = standin.data(6)
    np.save(tmp_path / "x.npy", x)
    said = python(FRESH, str(library), str(tmp_path / "x.npy"), str(tmp_path / "y.npz")).split()
    assert said[:4] == ["[]", "False", "True", "False"]
    assert float(said[4]) < 1.0, "start to first answer"
    with np.load(tmp_path / "y.npz") as y:
        close([y["arr_0"], y["arr_1"]], standin.reference(x))


BUSY = """
import os, sys
import gemmify
model = gemmify.load(sys.argv[1], threads=int(sys.argv[2]) or None)
def ticks():
    return {t: sum(map(int, open(f"/proc/self/task/{t}/stat").read().rsplit(")")[-1].split()[11:13]))
            for t in os.listdir("/proc/self/task")}
model.time(repeat=1)
before = ticks()
model.time(repeat=12, warmup=0)
used = sorted((v - before.get(t, 0) for t, v in ticks().items()), reverse=True)
print(model.threads, sum(u > 0.25 * used[0] for u in used), sorted(os.sched_getaffinity(0)) == eval(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def big_library(tmp_path_factory) -> Path:
    from gemmify.runtime import Model

    executable, manifest = standin.compiled(256, 512)
    return Model(manifest, executable=executable).export(tmp_path_factory.mktemp("big") / "big.so")


@pytest.mark.skipif(len(host.allowed_cpus()) < 2 or host.physical_cores() < 2, reason="needs two cores")
@pytest.mark.parametrize("threads, busy", [(1, 1), (2, 2), (0, None)])
def test_threads_are_really_used(big_library, threads, busy):
    cpus = sorted(host.allowed_cpus())
    used, active, same = python(BUSY, str(big_library), str(threads), str(cpus)).split()
    assert int(used) == (threads or host.physical_cores())
    assert int(active) == (busy or host.physical_cores())
    assert same == "True"


@pytest.mark.skipif(not Path("/usr/bin/taskset").exists() or len(host.allowed_cpus()) < 2, reason="needs taskset")
def test_an_affinity_mask_is_kept(big_library):
    one = min(host.allowed_cpus())
    used, active, same = python(BUSY, str(big_library), "0", str([one]), prefix=("taskset", "-c", str(one))).split()
    assert (used, active, same) == ("1", "1", "True")


def test_a_forked_process_is_told_why_it_cannot_run(library):
    code = """
import os, sys, gemmify, numpy as np
model = gemmify.load(sys.argv[1])
x = np.zeros((1, 8, 64), np.float32)
def child(act):
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            act()
            os.write(write, b"ran")
        except gemmify.GemmifyError as err:
            os.write(write, str(err).encode())
        os._exit(0)
    os.wait()
    return os.read(read, 1000).decode()
print(child(lambda: model.run({"data": x})))
model.run({"data": x})
print(child(lambda: model.run({"data": x})))
print(child(lambda: model.time()))
print(child(lambda: gemmify.load(sys.argv[1], threads=1)))
model.run({"data": x})
"""
    before, *after = python(code, str(library)).splitlines()
    assert before == "ran", "nothing had started"
    assert len(after) == 3 and all(a.startswith("this process was forked after") and "spawn" in a for a in after)


def test_the_users_thread_count_is_the_default(library):
    code = "import sys, gemmify; print(gemmify.load(sys.argv[1]).threads)"
    assert python(code, str(library), TVM_NUM_THREADS="1").strip() == "1"
    assert python(code, str(library), TVM_NUM_THREADS="999").strip() == str(host.usable_cpus())


def test_physical_cores_counts_cores_not_hyperthreads(tmp_path):
    for cpu, core in enumerate([0, 1, 0, 1]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{core}\n")
        (folder / "physical_package_id").write_text("0\n")
    assert host.physical_cores({0, 1, 2, 3}, tmp_path, limit=99) == 2
    assert host.physical_cores({0, 2}, tmp_path, limit=99) == 1
    assert host.physical_cores({0, 1, 2, 3}, tmp_path, limit=1) == 1
    assert host.physical_cores({8, 9, 10}, tmp_path, limit=99) == 3, "no topology: every CPU is a core"


@pytest.mark.parametrize(
    "content, cpus", [("max 100000", None), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1)]
)
def test_cgroup_limit(tmp_path, content, cpus):
    (tmp_path / "cpu.max").write_text(content)
    assert host._cgroup_cpus([str(tmp_path / "cpu.max")]) == cpus


def test_threads_share_a_model_safely():
    model = standin.model()
    xs = [standin.data(seed) for seed in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            hidden, total = model(xs[i])
            want = standin.reference(xs[i])
            if np.abs(hidden - want[0]).max() > 1e-3 or np.abs(total - want[1]).max() > 1e-2:
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_profile_names_each_kernel_once_a_run_and_leaves_the_model_alone():
    model, x = standin.model(), standin.data(8)
    profile = model.profile({"data": x}, repeat=3)
    names = [name for name, _ in profile]
    assert len(names) == 3 and names[0] == "parallel_product" and not any("vm.builtin" in n for n in names)
    assert all(0 < seconds < 1 for _, seconds in profile)
    close(model(x), standin.reference(x))


def test_time_gives_a_figure_a_run():
    seconds = standin.model().time(repeat=5, warmup=0)
    assert len(seconds) == 5 and all(0 < s < 1 for s in seconds)


def test_one_process_can_load_then_not_compile_and_says_so(library):
    code = """
import sys, gemmify
gemmify.load(sys.argv[1])
try:
    gemmify.compile("squeezenet")
except gemmify.GemmifyError as err:
    print(err)
"""
    assert "has loaded TVM's runtime without the compiler" in python(code, str(library))


def test_the_manifest_is_read_without_loading_the_library(library):
    code = """
import sys
from pathlib import Path
from gemmify.manifest import read_manifest
manifest = read_manifest(Path(sys.argv[1]))
print(manifest.model, "tvm" in sys.modules)
"""
    assert python(code, str(library)).split() == ["standin", "False"]
    assert read_manifest(library).outputs[1].shape == (1, standin.ROWS)
