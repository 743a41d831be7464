"""The suite `gpu`: a bundle built and run on this machine (`run_gpu`), and what a bundle's runner brought back
(`import_result`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemmify.bench.gpu_report import summarize
from gemmify.bench.gpu_runner.script import RESULTS_FORMAT
from gemmify.bench.header import header
from gemmify.errors import GemmifyError, IncompatibleError, InputError

MINUTES = 8.0
"""What building and measuring may take together."""
LEAST_MINUTES = 3.0
"""What is left for measuring where building took longer than it should."""
Report = Callable[[str], None]


def run_gpu(
    *, target: Any = None, minutes: float | None = None, progress: Report = lambda line: None, **chosen: Any
) -> dict[str, Any]:
    """Build the suite for this machine's GPU and run it, within `minutes` (default: 8): correctness of every lowering x
    precision, the speed of layers and networks beside PyTorch's, bandwidth and matrix peak.

    `chosen` are the keywords of `gpu_bundle.fill`. Returns a dict that is ready for JSON, of kind "gpu". Raises
    InputError for a target that is no GPU, IncompatibleError where this machine has none, GemmifyError where nothing
    could be built or the runner fails.
    """
    from gemmify.bench.gpu_bundle import fill, require_gpu

    resolved, begin = require_gpu("cuda" if target is None else target), time.monotonic()
    limit = MINUTES if minutes is None else minutes
    with tempfile.TemporaryDirectory(prefix="gemmify-gpu-") as made:
        folder = Path(made)
        _require_device(folder)
        described = fill(folder, resolved if target is None else target, progress=progress, **chosen)
        spent = (time.monotonic() - begin) / 60
        left = max(limit - spent, min(limit, LEAST_MINUTES))
        progress(f"built {len(described['entries'])} entries in {60 * spent:.0f} s")
        result = _run(folder, left, progress)
    return _finished(result, described["failures"], resolved)


def _require_device(folder: Path) -> None:
    """IncompatibleError where there is no GPU: before minutes of building, not after."""
    from gemmify.bench.gpu_bundle import find_cudart

    found = find_cudart()
    place = str(found.parent) if found is not None else str(folder)
    line = [sys.executable, "-c", _PROBE, str(Path(__file__).resolve().parents[2]), place]
    done = subprocess.run(line, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no GPU"])[-1].partition("CudaFailure: ")
        why = said[2] or said[0]
        raise IncompatibleError(
            f"the suite gpu needs a GPU, and {why}; write a bundle for a machine that "
            'has: --bundle out.tar --target "cuda -arch=sm_90"'
        )


_PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
from gemmify.bench.gpu_runner.cuda import Cuda, find_cudart
Cuda(find_cudart(sys.argv[2]))
"""


def _run(folder: Path, minutes: float, progress: Report) -> dict[str, Any]:
    """Run the bundle that lies unpacked in `folder`; what its runner wrote."""
    place = folder / "result.json"
    line = [sys.executable, str(folder / "run.py"), "--json", str(place), "--minutes", f"{minutes:.2f}"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stdout is not None and process.stderr is not None
    try:
        for text in process.stdout:
            progress(text.rstrip())
        said = process.stderr.read().strip()
    finally:
        process.kill()
        code = process.wait()
    if not place.is_file() or code == 2:
        raise GemmifyError(f"the suite gpu cannot run here: {(said or f'exit status {code}').splitlines()[-1]}")
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def import_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The result that run.py of a bundle wrote, as `run_gpu` returns it; a file of `--json` is taken, too.

    Raises InputError for a file that cannot be read or is none.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as err:
        said = err.strerror or err if isinstance(err, OSError) else f"it is no JSON: {err}"
        raise InputError(f"cannot read {path}: {said}; give the file that run.py --json of a bundle wrote") from err
    if isinstance(data, dict) and data.get("kind") == "gpu" and isinstance(data.get("result"), dict):
        data = data["result"] | {"build_failures": data.get("build_failures", [])}
    found = data.get("format") if isinstance(data, dict) else None
    if found != RESULTS_FORMAT:
        says = "none" if found is None else repr(found)
        raise InputError(f"{path}: expected a result of the format {RESULTS_FORMAT}, found {says}; give the file that "
                         "run.py --json of a bundle wrote")  # fmt: skip
    broken = [key for key in ("bundle", "machine", "entries", "seed", "date") if key not in data]
    if broken or not all(isinstance(e, dict) and "section" in e and "id" in e for e in data["entries"]):
        what = f"has no {broken[0]}" if broken else "holds entries that are none"
        raise InputError(f"{path} {what}; it is damaged: run the bundle again")
    failures = data.get("build_failures") or data["bundle"].get("failures", [])
    return _finished(data, failures, data["bundle"].get("target", "cuda"))


def _finished(result: dict[str, Any], failures: Any, target: Any) -> dict[str, Any]:
    summary = summarize(result)
    wrong = [
        {"lowering": e.get("lowering", ""), "name": e["id"], "what": e.get("crashed") or e.get("why", "")}
        for e in result["entries"]
        if "crashed" in e or not e.get("right", True)
    ]
    found = header("gpu", 1, target)
    return {
        **found,
        "suite": "gpu",
        "summary": summary,
        "failures": wrong,
        "build_failures": failures,
        "result": result,
    }
