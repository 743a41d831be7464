"""What the rows of `run_lowerings` come to: by layer, by lowering, and against a claim of the literature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gemmify.measure import geomean

Row = dict[str, Any]

LOW_MEMORY = "kn2row-aa"
PATCHES = ("im2row", "im2col")
CLAIMED_RATIO = 1.04
LOW_MEMORY_SOURCE = "Anderson, Vasudevan, Keane & Gregg, arXiv 1709.03395"
"""Their claim: the accumulating form of kn2row is as fast as building patches, with a fraction of the memory, and
ahead of it on several threads."""


def summarize_lowerings(
    rows: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> dict[str, Any]:
    """`{by_layer, by_lowering, auto, claim}` of finished rows; rows with a wrong result count nowhere."""
    right = [row for row in rows if row.get("right") and "best" in row]
    by_layer = [_layer(layer, right, counts) for layer in layers]
    return {
        "by_layer": by_layer,
        "by_lowering": _by_lowering(right, by_layer, counts),
        "auto": _auto(by_layer, counts),
        "claim": low_memory_claim(right, layers, counts),
    }


def _layer(layer: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> Row:
    """A layer's fastest lowering by number of threads, and how far the one that `auto` takes is behind it."""
    found = []
    for threads in counts:
        mine = {row["lowering"]: row for row in rows if row["name"] == layer["name"] and row["threads"] == threads}
        if not mine:
            continue
        best = min(mine.values(), key=lambda row: float(row["best"]))
        auto = layer["auto"][str(threads)]
        entry: Row = {"threads": threads, "fastest": best["lowering"], "best": best["best"], "auto": auto}
        entry["peak_share"] = best["peak_share"]
        entry["workspace_bytes"] = best["workspace_bytes"]
        entry["auto_ratio"] = mine[auto]["best"] / best["best"] if auto in mine else None
        found.append(entry)
    return {"name": layer["name"], "threads": found}


def _by_lowering(rows: Sequence[Mapping[str, Any]], by_layer: Sequence[Row], counts: Sequence[int]) -> list[Row]:
    """One entry a lowering: over its layers, the geometric means of its time over the fastest lowering's and of its
    share of the peak, by number of threads; its largest workspace and error."""
    fastest = {(layer["name"], entry["threads"]): entry for layer in by_layer for entry in layer["threads"]}
    found = []
    for key in dict.fromkeys(row["lowering"] for row in rows):
        mine = [row for row in rows if row["lowering"] == key]
        entry: Row = {"lowering": key, "layers": len({row["name"] for row in mine}), "threads": []}
        for threads in counts:
            there = [row for row in mine if row["threads"] == threads]
            if not there:
                continue
            behind = [row["best"] / fastest[row["name"], threads]["best"] for row in there]
            entry["threads"].append(
                {
                    "threads": threads,
                    "fastest_on": sum(ratio == 1.0 for ratio in behind),
                    "behind_fastest": geomean(behind),
                    "peak_share": geomean([row["peak_share"] for row in there]),
                }
            )
        entry["workspace_bytes"] = max(row["workspace_bytes"] for row in mine)
        entry["error"] = max(row["error"] for row in mine)
        found.append(entry)
    return found


def _auto(by_layer: Sequence[Row], counts: Sequence[int]) -> list[Row]:
    """By number of threads: on how many layers `auto` takes the fastest lowering, and how far behind it is."""
    found = []
    for threads in counts:
        entries = [
            (layer["name"], entry)
            for layer in by_layer
            for entry in layer["threads"]
            if entry["threads"] == threads and entry["auto_ratio"] is not None
        ]
        if not entries:
            continue
        name, worst = max(entries, key=lambda pair: float(pair[1]["auto_ratio"]))
        found.append(
            {
                "threads": threads,
                "layers": len(entries),
                "fastest_on": sum(entry["auto_ratio"] == 1.0 for _, entry in entries),
                "behind_fastest": geomean([entry["auto_ratio"] for _, entry in entries]),
                "worst": {"name": name, **{k: worst[k] for k in ("auto", "fastest", "auto_ratio")}},
            }
        )
    return found


def low_memory_claim(
    rows: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> Row | None:
    """The low-memory form against the faster of the patch-building ones, on the layers of stride 1 with a kernel larger
    than 1; None where the rows do not hold all of them.

    `ratio` is time over time (below 1 the low-memory form is ahead), `workspace` and `workspace_patches` the bytes of
    the two, by layer; by number of threads `geomean`, `min` and `max` of the ratios, the sums of the bytes, and whether
    the geometric mean is within `CLAIMED_RATIO`.
    """
    window = {layer["name"]: layer["problem"] for layer in layers}
    times = {(row["name"], row["threads"], row["lowering"]): row for row in rows}
    found = []
    for threads in counts:
        entries = []
        for name, problem in window.items():
            mine, others = times.get((name, threads, LOW_MEMORY)), [times.get((name, threads, key)) for key in PATCHES]
            stride, taps = problem.get("stride", ()), math.prod(problem.get("kernel", ()))
            if mine is None or None in others or taps == 1 or any(s != 1 for s in stride):
                continue
            best = min((row for row in others if row is not None), key=lambda row: float(row["best"]))
            entries.append(
                {
                    "name": name,
                    "patches": best["lowering"],
                    "ratio": mine["best"] / best["best"],
                    "ratio_median": mine["median"] / best["median"],
                    "workspace": mine["workspace_bytes"],
                    "workspace_patches": best["workspace_bytes"],
                }
            )
        if entries:
            found.append({"threads": threads, "layers": entries, **_ratios(entries)})
    if not found:
        return None
    return {"low_memory": LOW_MEMORY, "patches": list(PATCHES), "source": LOW_MEMORY_SOURCE, "threads": found}


def _ratios(entries: Sequence[Row]) -> Row:
    ratios = [entry["ratio"] for entry in entries]
    mean = geomean(ratios)
    assert mean is not None
    return {
        "geomean": mean,
        "geomean_median": geomean([entry["ratio_median"] for entry in entries]),
        "min": min(ratios),
        "max": max(ratios),
        "workspace": sum(entry["workspace"] for entry in entries),
        "workspace_patches": sum(entry["workspace_patches"] for entry in entries),
        "claimed": CLAIMED_RATIO,
        "holds": mean <= CLAIMED_RATIO,
    }
