"""Stock MetaSchedule as a peer: TVM's own pipeline tunes the same ONNX file for a given wall time.

Nothing of it is replaced or held back: the ONNX front end of Relax, the passes of `relax.pipeline.static_shape_tuning`
with `cpu_weight_prepack`, its space, XGBoost cost model, evolutionary search, gradient task scheduler, builder and
runner. Three choices are in its favour:

- Trials an iteration are fewer than its default of 64 where the time is short, so that the first pass over all tasks
  takes about half of the time (a task without any trial runs as plain loops, a hundred times slower).
- Kernels are built as its default builder builds them, without first importing its tensor intrinsics, of which float32
  code for a CPU uses none: that import takes 12 s in each batch of candidates.
- All threads that ours uses: TVM by itself takes half of the hardware threads.

MetaSchedule counts trials and knows no clock, so it runs in a process of its own that ends it at the first batch of
candidates behind its time (some seconds more than it was given), and is killed where it does not come to one. A second
process applies the database and writes a library, which is measured with TVM's runtime only, as ours is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemmify.errors import GemmifyError, InputError

PEER = "metaschedule"
DEFAULT_MINUTES = 15.0
REPORT_SECONDS = 30.0
COMMAND = (sys.executable, "-m", "gemmify.bench.metaschedule_worker")
RECORDS = "database_tuning_record.json"
WORKLOADS = "database_workload.json"
SENT = "sent.txt"
LATE_SECONDS = 120.0
"""That a search and the writing of what was measured may take behind the time; what is killed then loses its batch."""
BUILD_SECONDS = 900.0
_ROOT = Path(__file__).resolve().parents[2]

Say = Callable[[str], None]


def check_minutes(minutes: float | None, peers: Sequence[str]) -> float:
    """The minutes that MetaSchedule tunes; InputError where they are given without that peer or are none."""
    if minutes is None:
        return DEFAULT_MINUTES
    if PEER not in peers:
        raise InputError(f"--tuning-minutes is the time of the peer {PEER}; add --peers {PEER} or leave it out")
    if not 0 < minutes < 7 * 24 * 60:
        raise InputError(f"--tuning-minutes must be above 0 and at most a week, got {minutes:g}")
    return minutes


def tuned_library(
    model: Path,
    folder: Path,
    *,
    target: dict[str, Any],
    threads: int,
    minutes: float,
    progress: Say = lambda line: None,
    command: tuple[str, ...] = COMMAND,
) -> tuple[Path, dict[str, Any]]:
    """Tune the ONNX file `model` for `minutes` of wall time, and compile it with what was found.

    Work is done in `folder`; `target` is TVM's dict. Returns the library and `{seconds, trials, failed, tasks, tuned,
    per_iteration}`: trials measured and of those failed, tasks that TVM extracted and of those with a valid record.
    Raises GemmifyError where either process fails by itself.
    """
    work = folder / PEER
    work.mkdir()
    library = work / "tuned.so"
    request = work / "request.json"
    seconds = 60 * minutes
    asked = {"model": str(model), "work": str(work), "library": str(library), "target": target, "threads": threads}
    request.write_text(json.dumps({**asked, "seconds": seconds}))

    def tell(passed: float) -> None:
        progress(f"{PEER}: {passed / 60:.1f} of {minutes:g} minutes, {_sent(work)} candidates")

    spent = _run([*command, "tune", str(request)], work / "tune.txt", threads, seconds + LATE_SECONDS, tell)
    kept = clean_database(work)
    begin = time.perf_counter()
    _run([*command, "build", str(request)], work / "build.txt", threads, BUILD_SECONDS, lambda _: None, must_end=True)
    progress(f"{PEER}: compiled in {time.perf_counter() - begin:.1f} s, {kept['trials']} trials in {spent:.0f} s")
    told = json.loads((work / "tasks.json").read_text())
    return library, {"seconds": spent, **kept, **told}


def _sent(work: Path) -> str:
    try:
        return (work / SENT).read_text() or "0"
    except OSError:
        return "0"


def _run(
    command: list[str], log: Path, threads: int, seconds: float, tell: Callable[[float], None], must_end: bool = False
) -> float:
    """Run `command` for at most `seconds`, then kill it and its children; returns the seconds that it ran.

    Raises GemmifyError where it fails, and with `must_end` where it had to be killed.
    """
    path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "TVM_NUM_THREADS": str(threads)}
    environment.pop("TVM_USE_RUNTIME_LIB", None)
    begin = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,  # its builders and runners end with it
        )
        try:
            while (passed := time.monotonic() - begin) < seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(REPORT_SECONDS, seconds - passed))
                    break
                tell(time.monotonic() - begin)
        finally:
            code = process.poll()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code is None and must_end:
        raise GemmifyError(f"engine {PEER}: no library came out within {seconds:g} s; stopped it{_said(log)}")
    if code:
        raise GemmifyError(f"engine {PEER} failed with exit status {code}{_said(log)}")
    return time.monotonic() - begin


def _said(log: Path) -> str:
    lines = log.read_bytes()[-4000:].decode("utf-8", "replace").strip().splitlines()
    return f"; it said: {lines[-1].strip()[:300]}" if lines else ""


def clean_database(work: Path) -> dict[str, int]:
    """Drop the lines that were not written to their end, and count: `{trials, failed, tuned}`.

    `tuned` are the workloads with at least one record that ran. Raises GemmifyError where there is no record at all:
    the time was too short for a first batch.
    """
    workloads = _whole_lines(work / WORKLOADS)
    records = [(text, row) for text, row in _whole_lines(work / RECORDS) if row[0] < len(workloads)]
    good = {row[0] for _, row in records if _ran(row)}
    if not good:
        raise GemmifyError(f"engine {PEER}: no candidate was measured in its time; give it more with --tuning-minutes")
    for name, lines in ((WORKLOADS, workloads), (RECORDS, records)):
        (work / name).write_text("".join(text + "\n" for text, _ in lines))
    failed = sum(not _ran(row) for _, row in records)
    return {"trials": len(records), "failed": failed, "tuned": len(good)}


def _whole_lines(path: Path) -> list[tuple[str, Any]]:
    """The lines up to the first that is no JSON: the rest of a file of numbered entries cannot be trusted."""
    found: list[tuple[str, Any]] = []
    if not path.is_file():
        return found
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append((line, json.loads(line)))
        except ValueError:
            break
    return found


def _ran(row: Any) -> bool:
    """Whether a record holds times of a run: MetaSchedule writes 1e10 seconds for a candidate that failed."""
    times = row[1][1]
    return bool(times) and all(float(getattr(t, "value", t)) < 1e9 for t in times)


def build_candidate(mod: Any, target: Any, _params: Any) -> Any:
    """MetaSchedule's `default_build` without the import of tensor intrinsics; called in its builder's processes."""
    from tvm.driver import build
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    return build(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(mod), target=target)
