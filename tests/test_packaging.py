"""The wheel: everything is inside, and it compiles and runs a network away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import onnx
import pytest
from models import small_cnn

import gemmify

ROOT = Path(gemmify.__file__).parent.parent
PARTS = ("gemmify", "lowering", "schedules", "tuning_logs")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the package is not run from a checkout"),
]


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """What a command prints; the test fails with its output where it fails. PYTHONPATH is not handed on."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, so that none of what a build leaves behind gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    # With a setuptools that builds wheels itself, the build asks no package index.
    own = tuple(int(v) for v in version("setuptools").split(".")[:2]) >= (70, 1) if _has("setuptools") else False
    if not own and not _has("build"):
        pytest.skip("building needs setuptools 70.1 or newer, or the package `build`")
    flags = ["--no-isolation"] if own and _has("build") else []
    command = ["-m", "build", "--wheel", "-o", str(folder), *flags, str(source)]
    if not _has("build"):
        command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    run(sys.executable, *command, folder=folder)
    (found,) = folder.glob("*.whl")
    return found


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except ImportError:
        return False


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment with the wheel, which borrows this one's other packages."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    (site,) = {Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))}
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", "--no-index"]
    run(*pip, str(wheel), folder=folder)
    borrowed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (site / "borrowed.pth").write_text("\n".join(dict.fromkeys(borrowed)))
    return scripts


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for part in PARTS
        for path in (ROOT / part).rglob("*")
        if path.is_file() and path.suffix in (".py", ".md", ".json", ".jsonl") and "__pycache__" not in path.parts
    }
    assert {"gemmify/cli.py", "lowering/graph/layout.py", "schedules/cpu/gemm.py"} <= wanted
    assert not wanted - names
    inside = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert inside <= set(PARTS)


def test_the_wheel_compiles_and_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    onnx.save(small_cnn(2), str(tmp_path / "small.onnx"))
    python = installed / "python"
    where = run(python, "-c", "import gemmify, lowering; print(gemmify.__file__, lowering.__file__)", folder=tmp_path)
    assert str(ROOT) not in where and all(path.startswith(str(installed.parent)) for path in where.split())
    program = installed / "gemmify"
    run(program, "compile", "small.onnx", "-o", "small.so", folder=tmp_path)
    run(program, "verify", "small.onnx", "small.so", "--reference", "float64", folder=tmp_path)
    run(program, "verify", "small.onnx", "--lowering", "im2col", "--reference", "float64", folder=tmp_path)


def test_the_tuning_logs_lie_beside_the_packages(installed: Path, tmp_path: Path) -> None:
    files = [path for path in (ROOT / "tuning_logs").rglob("*") if path.is_file()]
    code = "import gemmify, pathlib; print(*(pathlib.Path(gemmify.__file__).parent.parent / 'tuning_logs').rglob('*'))"
    found = run(installed / "python", "-c", code, folder=tmp_path)
    for path in files:
        assert path.name in found
