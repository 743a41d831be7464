"""Candidates for a machine that cannot be reached: packed here, measured there by a small runner, brought back.

The tar holds, in the folder `gemmify-bundle`:

    run.py, runner/  the runner: needs Python, numpy and TVM's runtime
    bundle.json      the target and what the CPU must have, the tasks, and for each candidate how its library is run
    libraries/N.so   the candidates
    expected/N.npz   a random sample of each task's output in float64; the runner checks these elements, and that all
                     others are finite. The inputs are made there from the seed.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import tempfile
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from lowering.base import activation_shape, weight_shape
from schedules import AnyMachine, Gpu, machine_of

from ...archive import write_tar
from ...conformance import Expected, tolerance
from ...errors import GemmifyError, GemmifyWarning
from ...export import check_destination, find_linker, write_file
from ...host import arch_of
from ...kernels import operand_shape
from ...manifest import required_cpu_features, target_archs, target_triple
from ...pipeline import resolve_target
from ..folder import this_machine, this_versions
from ..point import Point
from ..space import Space
from ..task import Task
from . import runner
from .builders import Builders, Built
from .bundle_import import import_results
from .check import read_arrays, write_arrays
from .placed import FLUSHED
from .runner.results import BUNDLE_FORMAT

__all__ = ["Bundle", "import_results", "write_bundle"]

FOLDER = "gemmify-bundle"
SAMPLED = 4096
"""Elements of each output that are compared with float64."""
_LAUNCHER = '''"""python run.py [--results results.jsonl] [--limit MINUTES]: measures the candidates of this bundle."""

from runner.script import main

main()
'''
_SHOWN = 3
NVCC_SLOWER = 6
"""How many times longer a candidate for a GPU may take to build: nvcc needs seconds."""


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written: where it is, how many candidates it holds, the untuned defaults among them, and how
    many could not be built. It can be used as the path that it has."""

    path: Path
    candidates: int
    left_out: int

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def write_bundle(
    path: str | os.PathLike[str],
    tasks: Sequence[Task],
    points_by_task: Mapping[Task, Sequence[Point]],
    target: Any,
    threads: int,
    seed: int = 0,
    *,
    build_limit: float = 20.0,
    run_limit: float = 10.0,
) -> Bundle:
    """Build every point of every task for `target` and pack them into the tar `path`, complete or not at all.

    The untuned default of each task is packed in any case, first, so that the runner can measure the best ones in turns
    with it. A point that cannot be built is left out, with one GemmifyWarning for all. Raises InputError for a place
    that cannot be written or a target that cannot be read, GemmifyError where nothing can be built.
    """
    check_destination(path)
    resolved = resolve_target(target)
    find_linker(target_triple(resolved))  # better said once than of every candidate
    with tempfile.TemporaryDirectory(prefix="gemmify-bundle-") as made:
        folder = Path(made)
        for name in ("libraries", "expected"):
            (folder / name).mkdir()
        machine = machine_of(resolved)
        builders = Builders(str(resolved), NVCC_SLOWER * build_limit if isinstance(machine, Gpu) else build_limit)
        try:
            packed = _Packing(folder, builders, machine, seed)
            for task in tasks:
                packed.add(task, points_by_task.get(task, ()))
        finally:
            builders.close()
        if not packed.candidates:
            raise GemmifyError(f"none of the candidates could be built: {'; '.join(packed.failures[:_SHOWN])}")
        if packed.failures:
            warnings.warn(
                f"{len(packed.failures)} candidates could not be built and are not in the bundle: "
                f"{'; '.join(packed.failures[:_SHOWN])}",
                GemmifyWarning,
                stacklevel=2,
            )
        described = _description(resolved, threads, run_limit) | {
            "tasks": packed.tasks,
            "candidates": packed.candidates,
        }
        (folder / "bundle.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        _add_runner(folder)
        written = write_file(path, lambda file: write_tar(file, folder, FOLDER))
        return Bundle(Path(written), len(packed.candidates), len(packed.failures))


def _add_runner(folder: Path) -> None:
    """Copy the runner, which is Python's text alone, and write what starts it."""
    (folder / "runner").mkdir()
    for place in Path(runner.__file__).parent.glob("*.py"):
        (folder / "runner" / place.name).write_bytes(place.read_bytes())
    (folder / "run.py").write_text(_LAUNCHER, encoding="utf-8")


def _description(target: tvm.target.Target, threads: int, run_limit: float) -> dict[str, Any]:
    triple = target_triple(target)
    return {
        "format": BUNDLE_FORMAT,
        "id": secrets.token_hex(8),
        "target": str(target),
        "triple": triple,
        "arch": arch_of(triple),
        "needs": list(required_cpu_features(target)),
        "machine": this_machine(target, threads).to_dict() | {"cpu": "", "threads": threads},
        "versions": this_versions().to_dict(),
        "tvm": str(tvm.__version__),
        "tvm_ffi": str(tvm_ffi.__version__),
        "threads": threads,
        "limit": run_limit,
        **_of_gpu(target),
    }


def _of_gpu(target: tvm.target.Target) -> dict[str, Any]:
    """What a runner must know of the GPU, where the code is for one."""
    machine = machine_of(target)
    if not isinstance(machine, Gpu):
        return {}
    return {"gpu": {"archs": list(target_archs(target)), "flush": FLUSHED * machine.l2_bytes}}


class _Packing:
    """The entries of a bundle as they are made."""

    def __init__(self, folder: Path, builders: Builders, machine: AnyMachine, seed: int) -> None:
        self.folder, self.builders, self.machine, self.seed = folder, builders, machine, seed
        self.tasks: list[dict[str, Any]] = []
        self.candidates: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._libraries = 0

    def add(self, task: Task, points: Sequence[Point]) -> None:
        """Build the points of `task`, its default before all others."""
        default = Space(task, self.machine).default()
        ordered = list(dict.fromkeys([default, *points]))
        number = len(self.tasks)
        names = [f"libraries/{self._libraries + i}.so" for i in range(len(ordered))]
        self._libraries += len(ordered)  # a number belongs to one point, whether or not that can be built
        assert not {c["library"] for c in self.candidates} & set(names), "two candidates share a library"
        building = [self.builders.submit(task, p, self.folder / name) for p, name in zip(ordered, names, strict=True)]
        with tempfile.TemporaryDirectory(prefix="gemmify-task-") as made:
            write_arrays(task, Path(made), self.seed)
            want = read_arrays(Path(made))
            self.tasks.append(self._task(task, want, number))
            for point, name, future in zip(ordered, names, building, strict=True):
                built = future.result()
                if built.spec is None:
                    assert built.failed is not None
                    self.failures.append(f"{point.title}: {built.failed.why}")
                    (self.folder / name).unlink(missing_ok=True)
                    continue
                self.candidates.append(self._candidate(task, point, name, number, built, want, point == default))

    def _candidate(
        self, task: Task, point: Point, name: str, number: int, built: Built, want: Expected, default: bool
    ) -> dict[str, Any]:
        assert built.spec is not None
        return {
            "id": f"{number}-{Path(name).stem}",
            "title": f"{task.title}  {point.title}",
            "task": number,
            "default": default,
            "library": name,
            "point": point.to_dict(),
            "spec": built.spec.to_dict(),
            "tolerance": tolerance(task.problem.dtype, want, built.spec.growth, task.epilogue),
        }

    def _task(self, task: Task, want: Expected, number: int) -> dict[str, Any]:
        problem = task.problem
        flat = want.result.reshape(-1)
        rng = np.random.default_rng((self.seed, 2))
        at = np.sort(rng.choice(flat.size, min(SAMPLED, flat.size), replace=False))
        made = io.BytesIO()
        np.savez(made, at=at, values=flat[at])
        name = f"expected/{number}.npz"
        (self.folder / name).write_bytes(made.getvalue())
        given = {"data": want.data, "weight": want.weight}
        given |= {f"operand {i}": operand for i, operand in enumerate(want.operands)}
        shapes: dict[str, Any] = {"data": activation_shape(problem), "weight": weight_shape(problem)}
        for i, op in enumerate(op for op in task.epilogue if op.operand is not None):
            shapes[f"operand {i}"] = operand_shape(op, problem, "NHWC")
        return {
            "task": task.to_dict(),
            "title": task.title,
            "seed": self.seed,
            "dtype": problem.dtype,
            "shapes": shapes,
            "checksums": {key: zlib.crc32(np.ascontiguousarray(array).tobytes()) for key, array in given.items()},
            "expected": name,
            "largest": float(np.abs(want.result).max()) or 1.0,
        }
