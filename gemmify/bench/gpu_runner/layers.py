"""The speed of single layers with bias and ReLU, beside PyTorch's in the same turns."""

from __future__ import annotations

from typing import Any

from .box import Box
from .loaded import Entry, Libraries, Loaded
from .timing import Contestant, calls_for, in_turns

OURS = "ours"


def measure(box: Box, libraries: Libraries, entry: Entry, seed: int, share: float = 1.0) -> dict[str, Any]:
    """`{times: {name: ...}, gflops, ratio, error, right, ...}` of one layer.

    `ratio` is the median of the fastest of PyTorch's with bias and ReLU over ours: above 1 ours is faster;
    `ratio_alone` that of its convolution without them.
    """
    layer = Loaded(box, libraries, entry, poison=False)
    running: dict[str, Contestant] = {}
    try:
        for name in layer.given:
            layer.arrays[name].draw(seed, entry["id"], name)
        layer.prepare()
        layer.arrays[entry["output"]].poison_fast()
        layer()
        box.synchronize()
        result = _compared(box, layer)
        calls = calls_for(box.cuda.seconds(layer))
        running[OURS] = _graph(box, layer, calls)
        if box.torch is not None:
            result.update(_peers(box, layer, running))
        times = in_turns(box.cuda, running, share)
        box.synchronize()
    finally:
        for contestant in running.values():
            contestant.close()
        layer.close()
        if box.torch is not None:
            box.torch.cuda.empty_cache()
    return {**result, **rates(entry, times), "times": times}


def _graph(box: Box, layer: Loaded, calls: int) -> Contestant:
    def work() -> None:
        for _ in range(calls):
            layer()

    graph = box.cuda.capture(work)
    return Contestant(graph.launch, box.cuda.stream, calls, graph.close)


def _compared(box: Box, layer: Loaded) -> dict[str, Any]:
    """How far our output is from PyTorch's in float32; without PyTorch only whether all of it is written."""
    limit = float(layer.entry["limit"])
    if box.torch is None or _why_no_peer(layer):
        finite = layer.output()
        right = bool((finite == finite).all())
        return {"error": None, "limit": limit, "right": right, "why": "" if right else "outputs are not written"}
    from .peers import Peer

    error = Peer(box, layer).error()
    right = error <= limit
    why = "" if right else f"off by {error:.1e} of the largest output, {limit:.1e} is allowed"
    return {"error": error if error == error else None, "limit": limit, "right": right, "why": why}


def _why_no_peer(layer: Loaded) -> str:
    from .peers import Peer

    if layer.entry["layout"] != "NHWC":
        return "the lowering takes channels first"
    return Peer.refuses(layer.entry["problem"])


def _peers(box: Box, layer: Loaded, running: dict[str, Contestant]) -> dict[str, Any]:
    from .peers import contestants

    if why := _why_no_peer(layer):
        return {"no_peer": why}
    found, failed = contestants(box, layer, layer.entry["precision"], calls_for)
    running.update(found)
    return {"failed": failed}


def rates(entry: Entry, times: dict[str, Any]) -> dict[str, Any]:
    """GFLOP/s by the definition's multiply-adds, bytes a second by input, weight and output once each, and ratios."""
    ours = times[OURS]["median"]
    found: dict[str, Any] = {"gflops": 2 * entry["macs"] / ours / 1e9, "gbytes": entry["bytes"] / ours / 1e9}
    whole = [times[name]["median"] for name in ("eager", "fused") if name in times]
    if whole:
        found["ratio"] = min(whole) / ours
    if "alone" in times:
        found["ratio_alone"] = times["alone"]["median"] / ours
    return found
