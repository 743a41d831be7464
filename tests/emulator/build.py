"""Run g++ for the emulated driver and for kernels, each once: a folder keeps what was made, by its input's hash."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
_DRIVER = ("driver", "block", "fibers", "memory", "shared", "streams", "async_copies", "races", "tensor_cores")
_HEADERS = (*sorted(HERE.glob("*.h")), *sorted((HERE / "include").glob("*.h")))
ARCH = ["-march=native"] if os.uname().machine == "x86_64" else []


class BuildError(RuntimeError):
    """g++ is missing or does not take a source; the message holds its first complaints."""


@cache
def compiler() -> str:
    """The C++ compiler: `$CXX`, or g++. BuildError where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise BuildError("the emulated GPU needs a C++ compiler: neither $CXX nor g++ was found")
    return found


def folder() -> Path:
    """Where results are kept: `$GEMMIFY_EMULATOR_CACHE`, or a folder of this user in the system's temporary one."""
    place = os.environ.get("GEMMIFY_EMULATOR_CACHE")
    path = Path(place) if place else Path(tempfile.gettempdir()) / f"gemmify-emulator-{os.getuid()}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def run(arguments: list[str]) -> None:
    """Run the compiler; BuildError with its first lines where it fails."""
    done = subprocess.run([compiler(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError("g++ does not take this: " + "\n".join(complaints[:8]))


def digest(*parts: object) -> str:
    """A name for what is made from `parts`, this compiler and machine."""
    text = "\0".join(str(part) for part in (compiler(), os.uname().machine, _cpu(), *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@cache
def _cpu() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


@cache
def headers_digest() -> str:
    return digest(*(path.read_text() for path in _HEADERS))


def make(name: str, command: Callable[[Path], None]) -> Path:
    """`name` in the folder, made by `command(path)` where it is not there; many processes may ask at once."""
    final = folder() / name
    with open(folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait, and find it made
        if final.exists():
            os.utime(final)
            return final
        with tempfile.TemporaryDirectory(dir=folder(), prefix="making-") as place:
            path = Path(place) / name
            command(path)
            path.rename(final)
    return final


@cache
def prune(days: float = 7) -> None:
    """Remove what nobody has used for some days."""
    for path in folder().iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - days * 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@cache
def libraries() -> Path:
    """A folder with libcuda.so.1 and libcudart.so.13, built where they are not there yet. BuildError."""
    prune()
    sources = [HERE / f"{name}.cpp" for name in (*_DRIVER, "runtime")]

    def build(place: Path) -> None:
        place.mkdir()
        flags = ["-std=c++17", "-O2", *ARCH, "-fPIC", "-shared", "-pthread", "-U_FORTIFY_SOURCE", "-Wall", "-Werror"]
        cuda, cudart = place / "libcuda.so.1", place / "libcudart.so.13"
        run([*flags, "-Wl,-soname,libcuda.so.1", *map(str, sources[:-1]), "-o", str(cuda), "-ldl"])
        version = f"-Wl,--version-script={HERE / 'runtime.map'}"
        run([*flags, "-Wl,-soname,libcudart.so.13", version, str(sources[-1]), str(cuda), "-o", str(cudart)])

    return make("driver-" + digest(headers_digest(), *(path.read_text() for path in sources)), build)
