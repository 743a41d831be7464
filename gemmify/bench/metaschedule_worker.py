"""The processes of the peer MetaSchedule: `python -m gemmify.bench.metaschedule_worker tune|build REQUEST.json`.

`tune` imports the model, extracts its tasks, and tunes them until the time is over; `build` applies the database and
writes the library. Both prepare the module alike, so that the tasks found are those tuned.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemmify.bench.metaschedule import SENT, build_candidate
from gemmify.bench.worker import tether

WHOLE_ROUND = 0.5  # of the time, for the first round over all tasks
START_SECONDS = 30.0  # import of TVM and the model, extraction of the tasks, first use of the design spaces
SEARCH_SECONDS = 10.0  # of an iteration that is no building and measuring: evolution and the start of the builders
TRIAL_SECONDS = 0.8
STOCK_TRIALS = 64  # MetaSchedule's default trials an iteration
LEAST_TRIALS = 4


def trials_an_iteration(seconds: float, tasks: int) -> int:
    """So many that the first round over `tasks` takes half of `seconds`; between 4 and the default of 64."""
    share = WHOLE_ROUND * max(0.0, seconds - START_SECONDS) / max(1, tasks)
    return max(LEAST_TRIALS, min(STOCK_TRIALS, int((share - SEARCH_SECONDS) / TRIAL_SECONDS)))


def _prepared(request: dict[str, Any]) -> tuple[Any, Any]:
    """(module, target): the passes of TVM's `static_shape_tuning_pipeline` in front of its tuning."""
    import onnx
    import tvm
    from tvm.relax import transform
    from tvm.relax.frontend.onnx import from_onnx
    from tvm.relax.pipeline import zero_pipeline

    target = tvm.target.Target({**request["target"], "num-cores": request["threads"]})
    mod = from_onnx(onnx.load(request["model"]), keep_params_in_input=False)
    before = [
        transform.DecomposeOpsForInference(),
        transform.CanonicalizeBindings(),
        zero_pipeline(),
        transform.AttachAttrLayoutFreeBuffers(),
    ]
    with target:
        return tvm.transform.Sequential(before)(mod), target


class _TimeOver(Exception):
    pass


def _timed_builder(builder: Any, over: Callable[[], bool], sent: Path) -> Any:
    """A MetaSchedule builder that hands its batches to `builder` until the time is `over`, and counts into `sent`."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.builder import PyBuilder

    @derived_object
    class Timed(PyBuilder):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def build(self, build_inputs: list[Any]) -> list[Any]:
            if over():
                raise _TimeOver
            self.count += len(build_inputs)
            sent.write_text(str(self.count))
            return list(builder.build(build_inputs))

    return Timed()


def tune(request: dict[str, Any]) -> None:
    """Tune until the time is over. The scheduler writes what it measured in its first round only at the end of that
    round, and knows no clock: the builder ends it, and then each task is told to write what it has."""
    begin = time.monotonic()
    from tvm.s_tir import meta_schedule as ms

    mod, target = _prepared(request)
    tasks = ms.relax_integration.extract_tasks(mod, target, {})
    count = trials_an_iteration(request["seconds"], len(tasks))
    work = Path(request["work"])
    (work / "tasks.json").write_text(json.dumps({"tasks": len(tasks), "per_iteration": count}))

    def over() -> bool:
        return time.monotonic() - begin >= float(request["seconds"])

    local = ms.builder.LocalBuilder(max_workers=request["threads"], f_build=build_candidate)
    scheduler = ms.task_scheduler.GradientBased()
    try:
        ms.relax_integration.tune_relax(
            mod=mod,
            params={},
            target=target,
            work_dir=str(work),
            max_trials_global=1_000_000,
            num_trials_per_iter=count,
            builder=_timed_builder(local, over, work / SENT),
            task_scheduler=scheduler,
            seed=0,
        )
    except Exception:
        if not over():
            raise
    for index, task in enumerate(scheduler.tasks_):
        if task.runner_futures is not None:
            scheduler.join_running_task(index)


def build(request: dict[str, Any]) -> None:
    """The library of the module with the best record of each task; its weights are laid out as the records want."""
    import tvm
    from tvm.relax import transform

    mod, target = _prepared(request)
    with target:  # some of the passes look for it when they are made
        after = [
            transform.MetaScheduleApplyDatabase(request["work"]),
            transform.SplitLayoutRewritePreproc(),
            transform.LiftTransformParams(),
            transform.FoldConstant(),
        ]
        tvm.compile(tvm.transform.Sequential(after)(mod), target=target).export_library(request["library"])


def main() -> None:
    tether()
    step, path = sys.argv[1:]
    {"tune": tune, "build": build}[step](json.loads(Path(path).read_text()))


if __name__ == "__main__":
    main()
