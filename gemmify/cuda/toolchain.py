"""CUDA text -> machine code: nvcc found, called, and what it says of registers and spills kept.

nvcc is looked for on the PATH, below CUDA_HOME and CUDA_PATH, in the packages that the extra `cuda` installs, and in
/usr/local/cuda. Nothing is asked of it before code is compiled: `explain` and `plan` work without.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import GemmifyError
from ..host import usable_cpus
from .archs import portable, specific
from .resources import KernelResources, parse_resources

_INSTALL = "`pip install gemmify[cuda]`, or put nvcc of a CUDA toolkit on the PATH, or set CUDA_HOME"
_HOST_COMPILER = "nvcc needs a C++ compiler of the host: install g++, or name one in NVCC_CCBIN"
_USUAL = Path("/usr/local/cuda")
_OLDEST = (12, 0)
"""Of nvcc: the first that knows sm_90."""


@dataclass(frozen=True)
class DeviceCode:
    """Machine code for `archs`, as the CUDA driver loads it (a fatbin), and what each kernel takes on each of them."""

    archs: tuple[str, ...]
    image: bytes
    resources: tuple[KernelResources, ...] = ()


@lru_cache(maxsize=1)
def _search(path: str, homes: tuple[str, ...]) -> str | None:
    found = shutil.which("nvcc", path=path)
    if found:
        return found
    for home in (*map(Path, homes), *_packages(), _USUAL):
        nvcc = home / "bin" / "nvcc"
        if os.access(nvcc, os.X_OK):
            return str(nvcc)
    return None


def _packages() -> list[Path]:
    """Where the packages of the extra `cuda` lie: site-packages/nvidia/cu13."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return sorted((path for place in places for path in Path(place).glob("cu[0-9]*")), reverse=True)


def find_nvcc() -> str:
    """The nvcc to use; GemmifyError, saying what to install, where there is none."""
    homes = tuple(os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
    found = _search(os.environ.get("PATH", ""), homes)
    if found is None:
        raise GemmifyError(f"compiling for CUDA needs nvcc, and none was found; {_INSTALL}")
    return found


def _environment(nvcc: str) -> dict[str, str]:
    """nvcc of the packages finds the rest of itself beside it, whatever the PATH says."""
    path = os.environ.get("PATH", os.defpath)
    return {**os.environ, "PATH": f"{Path(nvcc).parent}{os.pathsep}{path}"}


@lru_cache(maxsize=4)
def toolkit(nvcc: str) -> tuple[tuple[int, int], frozenset[str]]:
    """nvcc's version, and the architectures that it makes code for: `((13, 0), {"sm_75", ...})`."""
    said = _call(nvcc, ["--version"])
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version is None:
        raise GemmifyError(f"{nvcc} does not say its version; {_INSTALL}")
    archs = frozenset(f"sm_{number}" for number in re.findall(r"compute_(\d+)", _call(nvcc, ["--list-gpu-arch"])))
    return (int(version[1]), int(version[2])), archs


def _call(nvcc: str, words: Sequence[str]) -> str:
    try:
        done = subprocess.run([nvcc, *words], capture_output=True, text=True, env=_environment(nvcc), check=False)
    except OSError as err:
        raise GemmifyError(f"cannot run {nvcc}: {err.strerror or err}; {_INSTALL}") from err
    if done.returncode:
        raise GemmifyError(f"{nvcc} {words[0]} failed: {_first_complaint(done.stdout + done.stderr)}; {_INSTALL}")
    return done.stdout


def _code_options(archs: Sequence[str]) -> list[str]:
    words = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in specific(archs)]
    newest = portable(archs)
    return words + ([f"-gencode=arch=compute_{newest[3:]},code=compute_{newest[3:]}"] if newest else [])


def options(archs: Sequence[str]) -> list[str]:
    """nvcc's options for code that runs on `archs`. No --use_fast_math: exp and division keep their accuracy."""
    # One process for each architecture. Dividing the kernels among processes gains nothing: 66 kernels take 4 s.
    words = ["-O3", "-std=c++17", "-w", "-Xptxas=-v", f"--threads={usable_cpus()}"]
    host = os.environ.get("NVCC_CCBIN")
    return words + _code_options(archs) + ([f"-ccbin={host}"] if host else [])


@lru_cache(maxsize=64)
def compile_cuda(source: str, archs: tuple[str, ...]) -> DeviceCode:
    """The machine code of CUDA text for every one of `archs` ("sm_80", ...) in one image.

    Raises GemmifyError where nvcc is missing, too old for an architecture, or refuses the text (with its first
    complaint).
    """
    nvcc = check_toolchain(archs)
    with tempfile.TemporaryDirectory(prefix="gemmify-cuda-") as folder:
        text, image = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        text.write_text(source, encoding="utf-8")
        words = [nvcc, "-fatbin", *options(archs), "-o", str(image), str(text)]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, errors="replace", env=_environment(nvcc), check=False
            )
        except OSError as err:
            raise GemmifyError(f"cannot run {nvcc}: {err.strerror or err}; {_INSTALL}") from err
        said = done.stdout + done.stderr
        if done.returncode or not image.is_file():
            raise _refused(nvcc, archs, said.strip() or f"exit status {done.returncode}")
        return DeviceCode(tuple(archs), image.read_bytes(), parse_resources(said))


def check_toolchain(archs: Sequence[str]) -> str:
    """The nvcc that compiles for `archs`; GemmifyError where none is found, or where it is too old for them."""
    nvcc = find_nvcc()
    version, known = toolkit(nvcc)
    said = ".".join(map(str, version))
    if version < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise GemmifyError(f"compiling for CUDA needs nvcc {needed} or newer, {nvcc} is {said}; {_INSTALL}")
    missing = [arch for arch in archs if arch not in known]
    if missing:
        have = ", ".join(sorted(known, key=lambda arch: int(arch[3:])))
        raise GemmifyError(
            f"nvcc {said} makes no code for {', '.join(missing)}; it knows {have}: take one of them, or a newer nvcc"
        )
    return nvcc


def _refused(nvcc: str, archs: Sequence[str], said: str) -> GemmifyError:
    for_what = f"nvcc cannot compile for {', '.join(archs)}"
    lines = said.splitlines()
    if any("cc1plus" in line or "Failed to preprocess host compiler" in line for line in lines):
        return GemmifyError(f"{for_what}: {_first_complaint(said)}; {_HOST_COMPILER}")
    full = [line for line in lines if "No space left" in line]
    if full:
        return GemmifyError(f"{for_what}: {full[0].strip()}; free space in {tempfile.gettempdir()}")
    return GemmifyError(f"{for_what}: {_first_complaint(said)} ({nvcc})")


def _first_complaint(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip() and "ptxas info" not in line]
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    return (errors or lines or ["it says nothing"])[0][:300]
