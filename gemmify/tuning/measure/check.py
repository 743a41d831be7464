"""The arrays of a task and its result in float64, made once and shared by the processes of all its candidates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ...conformance import Expected
from ...kernels import operand_shape
from ...layer_reference import apply_epilogue, magnitude, random_arrays, reference
from ..task import Task

_DONE = "task.json"


def write_arrays(task: Task, folder: Path, seed: int) -> None:
    """Write the task's random input, weight and epilogue operands (channels last), and its float64 result.

    All are standard normal, the same for the same seed. OSError where the folder is full.
    """
    problem = task.problem
    data, weight = random_arrays(problem, seed)
    rng = np.random.default_rng((seed, 1))
    shapes = [operand_shape(op, problem, "NHWC") for op in task.epilogue if op.operand is not None]
    operands = [rng.standard_normal(shape).astype(problem.dtype) for shape in shapes]
    result = apply_epilogue(reference(problem, data, weight), task.epilogue, operands)
    peak = float(magnitude(problem, data, weight).max())
    for name, array in (("data", data), ("weight", weight), ("result", result)):
        np.save(folder / f"{name}.npy", array)
    for number, operand in enumerate(operands):
        np.save(folder / f"operand{number}.npy", operand)
    (folder / _DONE).write_text(json.dumps({"peak": peak, "operands": len(operands)}))


def read_arrays(folder: Path) -> Expected:
    """What `write_arrays` wrote, mapped into memory, not copied."""
    made = json.loads((folder / _DONE).read_text())

    def array(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    operands = [array(f"operand{i}") for i in range(made["operands"])]
    return Expected(array("data"), array("weight"), operands, array("result"), made["peak"])
