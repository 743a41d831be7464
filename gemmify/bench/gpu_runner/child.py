"""The process that touches the GPU. It takes one request as JSON on its standard input and answers in lines of JSON:
`{"begin": id}` and `{"end": id, "result": {...}}` of each entry. After a CUDA error the context is of no use: it ends,
and its parent starts another one for the rest."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from . import check, layers, networks, peaks
from .box import Box, check_capability
from .cuda import CudaFailure
from .ffi import RuntimeFailure
from .loaded import Libraries

FATAL = 3
"""Exit status after a CUDA error."""
Answer = Callable[[dict[str, Any]], None]


def main() -> None:
    """Answer the request on the standard input. What libraries print goes to the standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to end
    raise SystemExit(serve(json.load(sys.stdin), replies))


def serve(request: dict[str, Any], replies: TextIO) -> int:
    """Answer one request; the exit status."""

    def answer(line: dict[str, Any]) -> None:
        replies.write(json.dumps(line) + "\n")
        replies.flush()

    bundle = request["bundle"]
    try:
        box = Box(request["folder"])
        check_capability(bundle, box.cuda.capability)
    except (CudaFailure, RuntimeFailure) as err:
        answer({"refused": str(err)})
        return 2
    answer({"machine": box.describe()})
    work = _Work(box, request)
    for entry in request["entries"]:
        answer({"begin": entry["id"]})
        try:
            answer({"end": entry["id"], "result": work.one(entry)})
            box.synchronize()
        except Exception as err:
            traceback.print_exc()
            answer({"end": entry["id"], "failed": f"{type(err).__name__}: {' '.join(str(err).split())[:400]}"})
            if not _alive(box):
                return FATAL
    return 0


def _alive(box: Box) -> bool:
    """Whether the GPU still answers after a failure."""
    try:
        box.synchronize()
        box.cuda.free(box.cuda.allocate(16))
    except Exception:
        return False
    return True


class _Work:
    """What is done with an entry of each section."""

    def __init__(self, box: Box, request: dict[str, Any]) -> None:
        self.box, self.seed, self.share = box, int(request["seed"]), float(request["share"])
        self.libraries = Libraries(box)

    def one(self, entry: dict[str, Any]) -> dict[str, Any]:
        section = entry["section"]
        if section == "check":
            return check.check(self.box, self.libraries, entry, self.seed)
        if section == "layer":
            return layers.measure(self.box, self.libraries, entry, self.seed, self.share)
        if section == "network":
            return networks.measure(self.box, self.libraries, entry, self.seed, self.share)
        assert section == "peak", f"there is no section {section}"
        if entry["kind"] == "matrix":
            return peaks.matrix_peak(self.box, entry["precision"], self.seed, self.share)
        return peaks.bandwidth(self.box, entry["kind"], self.share)


if __name__ == "__main__":
    main()
