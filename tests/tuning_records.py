"""Records for tests of the tuning log: made up, valid, distinct."""

from __future__ import annotations

from gemmify.tuning.point import Point, knobs
from gemmify.tuning.record import MachineId, Record, Versions
from gemmify.tuning.task import Task
from lowering import DenseProblem, Tile, conv2d
from lowering.epilogue import EpilogueOp

MACHINE = MachineId("llvm", "sapphirerapids", "0123456789ab", "Xeon (family 6, model 143)", 2, 2)
VERSIONS = Versions("0.1.0", "0.27.0.post1", 1)
EPILOGUE = (EpilogueOp("bias", 0), EpilogueOp("clip", None, (0.0, 6.0)))
TASKS = (
    Task(conv2d(64, 56, 56, 64, 3), EPILOGUE),
    Task(conv2d(256, 14, 14, 512, 1), (EpilogueOp("bias", 0), EpilogueOp("add", 1), EpilogueOp("relu", None))),
    Task(DenseProblem(1, 2048, 1000)),
)


def record(number: int) -> Record:
    """A record that differs from that of every other number."""
    outcome = ("ok", "ok", "ok", "wrong", "timeout")[number % 5]
    times = tuple(1e-3 + number * 1e-6 + i * 1e-7 for i in range(3)) if outcome == "ok" else ()
    times = tuple(float(f"{t:.6g}") for t in times)
    return Record(
        TASKS[number % len(TASKS)],
        Point("im2col", Tile(8, 48), knobs({"strip": number}), knobs({"row_block": 4, "unroll": True})),
        MACHINE,
        VERSIONS,
        outcome,
        why="" if outcome == "ok" else 'it said {"when": "never"} and\n\u20ac \x00 ended',
        cold=times,
        warm=times[:2],
        error=1.5e-07,
        when=f"2026-11-21T10:{number // 60 % 60:02d}:{number % 60:02d}.{number // 3600:03d}Z",
        session=f"s{number}",
    )
