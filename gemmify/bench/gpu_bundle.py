"""The GPU suite for a machine that has no compiler: built here, run there, brought back.

The tar holds, in the folder `gemmify-gpu`:

    run.py, runner/  the runner: needs Python, numpy, a driver, and PyTorch for the comparison
    bundle.json      the target and what the GPU must be, and for each entry how it is run and what it is compared with
    libraries/N.so   the layers, several in each, and the networks without their weights
    graphs/NAME.json the networks as PyTorch is to run them
    runtime/         TVM's runtime libraries, and libcudart where one was found
"""

from __future__ import annotations

import gzip
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import tvm
import tvm_ffi

from gemmify import __version__
from gemmify.archive import write_tar
from gemmify.bench import gpu_runner
from gemmify.bench.gpu_build import Built, build_all
from gemmify.bench.gpu_networks import build_network
from gemmify.bench.gpu_problems import BATCHES, NETWORKS, Wanted, WantedNetwork, wanted_checks, wanted_layers
from gemmify.bench.gpu_runner.cuda import NAME as CUDART
from gemmify.bench.gpu_runner.script import BUNDLE_FORMAT, SHARES
from gemmify.errors import GemmifyError, InputError
from gemmify.export import check_destination, write_file
from gemmify.pipeline import resolve_target
from schedules import machine_of
from schedules.cuda.device import capability_of

FOLDER = "gemmify-gpu"
LARGEST = 55 << 20
"""Bytes of a bundle that machines with small upload limits still take."""
_SHOWN = 3
Report = Callable[[str], None]
_LAUNCHER = '''"""python3 run.py --json result.json [--minutes 8]: measures this bundle on the GPU of this machine."""

from runner.script import main

main()
'''


def write_bundle(
    path: str | os.PathLike[str], target: Any, *, progress: Report = lambda line: None, **chosen: Any
) -> dict[str, Any]:
    """Build the suite for `target` (one or several architectures) and pack it into the tar `path`, whole or not at all.

    `chosen` are the keywords of `fill`. Returns {bundle, bytes, entries, build_failures, seconds}; an entry that could
    not be built is among the failures as (id, why), and the others are packed. Raises InputError for a target that is
    no GPU or a place that cannot be written, GemmifyError where nothing can be built.
    """
    place, begin = check_destination(path), time.monotonic()
    require_gpu(target)
    with tempfile.TemporaryDirectory(prefix="gemmify-gpu-") as made:
        folder = Path(made)
        described = fill(folder, target, progress=progress, **chosen)
        write_file(place, lambda file: _write(file, folder))
    size = place.stat().st_size
    if size > LARGEST:
        progress(
            f"note: {place} takes {size >> 20} MiB; leave out networks or batches where {LARGEST >> 20} MiB are allowed"
        )
    return {
        "bundle": str(place),
        "bytes": size,
        "entries": len(described["entries"]),
        "build_failures": described["failures"],
        "seconds": time.monotonic() - begin,
    }


def require_gpu(target: Any) -> Any:
    """The checked TVM target; InputError for one that is no GPU."""
    resolved = resolve_target(target)
    if resolved.kind.name != "cuda":
        raise InputError(
            f'the suite gpu needs a GPU as its target, got {resolved.kind.name}; give --target "cuda -arch=sm_90"'
        )
    return resolved


def fill(
    folder: Path,
    target: Any,
    *,
    layer: str | None = None,
    quick: bool = False,
    sections: Sequence[str] = tuple(SHARES),
    networks: Sequence[WantedNetwork] | None = None,
    checks: Sequence[Wanted] | None = None,
    workers: int | None = None,
    progress: Report = lambda line: None,
) -> dict[str, Any]:
    """Make the bundle's files in `folder`; returns what bundle.json holds.

    `layer` is a pattern of the names of layers and networks; `quick` takes a few layers and problems and one network.
    `sections` are some of peak, check, network and layer. `workers` processes build at once (0: this one alone).
    Raises GemmifyError where nothing could be built.
    """
    import json

    from schedules.cuda.target import archs_of

    resolved = require_gpu(target)
    text, archs = _target_text(target), tuple(archs_of(resolved))
    wanted = list(wanted_checks(1 if quick else 2) if checks is None else checks) if "check" in sections else []
    if "layer" in sections:
        batches, precisions = (BATCHES[:1], ("float16", "float32")) if quick else (BATCHES, None)
        more = {} if precisions is None else {"precisions": precisions}
        wanted += wanted_layers(machine_of(resolved), batches, pattern=layer or "*", **more)
    built = build_all(wanted, text, folder, progress, workers) if wanted else Built()
    if "network" in sections:
        asked = networks if networks is not None else NETWORKS[:2] if quick else NETWORKS
        built = _add_networks(built, [n for n in asked if _matches(n.name, layer)], text, folder, progress)
    if not built.entries:
        why = "; ".join(f"{name}: {why}" for name, why in built.failures[:_SHOWN]) or "nothing matches"
        raise GemmifyError(f"nothing of the suite could be built: {why}")
    entries = [*(_peaks() if "peak" in sections else ()), *built.entries]
    described = _description(text, archs) | {"failures": built.failures, "entries": entries}
    (folder / "bundle.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    _add_runner(folder)
    _add_runtime(folder / "runtime")
    return described


def _matches(name: str, pattern: str | None) -> bool:
    from fnmatch import fnmatchcase

    return pattern is None or fnmatchcase(name, pattern.partition(":")[0])


def _target_text(target: Any) -> str:
    """The target as text that another process reads."""
    import json

    if isinstance(target, str):
        return target
    return json.dumps(target) if isinstance(target, dict) else str(target)


def _add_networks(
    built: Built, networks: Sequence[WantedNetwork], target: str, folder: Path, progress: Report
) -> Built:
    """Build the networks one after the other: nvcc divides each among the CPUs itself."""
    (folder / "libraries").mkdir(exist_ok=True)
    for number, wanted in enumerate(networks, 1):
        begin = time.monotonic()
        try:
            built.entries.append(build_network(wanted, target, folder))
            progress(f"network {number} of {len(networks)}: {wanted.id} built in {time.monotonic() - begin:.0f} s")
        except Exception as err:  # one network must not take the others along
            built.failures.append((wanted.id, f"{type(err).__name__}: {' '.join(str(err).split())[:400]}"))
            progress(f"network {number} of {len(networks)}: {wanted.id} FAILED: {built.failures[-1][1]}")
    return built


def _peaks() -> list[dict[str, Any]]:
    matrix = [("matrix", precision) for precision in ("float16", "bfloat16", "tf32", "float32")]
    found = [("read", ""), ("copy", ""), *matrix]
    return [
        {
            "id": f"peak/{kind}{'/' + precision if precision else ''}",
            "section": "peak",
            "kind": kind,
            "precision": precision,
        }
        for kind, precision in found
    ]


def _description(target: str, archs: Sequence[str]) -> dict[str, Any]:
    capabilities = [list(capability_of(arch)) for arch in archs]
    return {
        "format": BUNDLE_FORMAT,
        "id": secrets.token_hex(8),
        "target": target,
        "archs": list(archs),
        "capabilities": capabilities,
        # Code for sm_90 alone uses its own instructions, which no other architecture has.
        "exact": capabilities == [[9, 0]],
        "gemmify": __version__,
        "tvm": str(tvm.__version__),
        "tvm_ffi": str(tvm_ffi.__version__),
        "numpy": np.__version__,
    }


def _add_runner(folder: Path) -> None:
    """Copy the runner, which is Python's text alone, and write what starts it."""
    (folder / "runner").mkdir()
    for place in Path(gpu_runner.__file__).parent.glob("*.py"):
        (folder / "runner" / place.name).write_bytes(place.read_bytes())
    (folder / "run.py").write_text(_LAUNCHER, encoding="utf-8")


def _add_runtime(folder: Path) -> None:
    """Copy TVM's runtime libraries, and libcudart where the toolkit or a package has it."""
    folder.mkdir()
    ffi, runtime = Path(tvm_ffi.__file__).parent / "lib", Path(tvm.__file__).parent / "lib"
    for place in (ffi / "libtvm_ffi.so", runtime / "libtvm_runtime.so", runtime / "libtvm_runtime_cuda.so"):
        if not place.is_file():
            raise GemmifyError(f"TVM's runtime library {place} is missing; install apache-tvm {tvm.__version__} again")
        shutil.copyfile(place, folder / place.name)
    found = find_cudart()
    if found is not None:
        shutil.copyfile(found, folder / CUDART)


def find_cudart() -> Path | None:
    """libcudart beside nvcc, or of its packages; None where there is none. The machine with the GPU may lack it."""
    from gemmify.cuda.toolchain import find_nvcc

    try:
        home = Path(find_nvcc()).resolve().parent.parent
    except GemmifyError:
        return None
    places = [home / "lib64" / CUDART, home / "lib" / CUDART, *home.glob(f"targets/*/lib/{CUDART}")]
    return next((place for place in places if place.is_file()), None)


def _write(file: IO[bytes], folder: Path) -> None:
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6) as packed:
        write_tar(packed, folder, FOLDER)
