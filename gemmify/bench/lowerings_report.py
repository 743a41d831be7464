"""The result of `run_lowerings` as text and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemmify.bench.sections import Part, Section, milliseconds, percent
from gemmify.report import count, problem_text, size


def lowerings_parts(result: Mapping[str, Any]) -> list[Part]:
    """One table a layer, the tables over all layers, and what failed."""
    counts = result["threads"]
    limits = ", ".join(f"{limit['gflops']:.0f} GFLOP/s on {_threads(limit['threads'])}" for limit in result["limits"])
    parts: list[Part] = [f"multiply-add peak measured in this run: {limits}; inputs of seed {result['seed']}", *NOTES]
    for layer in result["layers"]:
        parts.append(_layer(layer, result["rows"], counts))
        refused = layer.get("inapplicable", {})
        parts += [f"{key} does not apply: {refused[key]}" for key in result.get("asked", ()) if key in refused]
    if len(result["layers"]) > 1:
        parts.append(_fastest(result["by_layer"], counts))
        parts.append(_over_layers(result, counts))
    parts += _auto_lines(result["auto"])
    parts += _claim(result["claim"])
    if result["failures"]:
        rows = [(f["name"], f["lowering"], str(f["threads"]), f["what"]) for f in result["failures"]]
        parts.append(Section("FAILED", ("layer", "lowering", "threads", "what"), rows))
    return parts


NOTES = (
    "bias and ReLU included; share of the peak by the definition's multiply-adds, whatever a lowering does (minimal "
    "filtering may exceed it)",
    "workspace is what is allocated, scratch inside the kernels included; error is the largest difference of an output "
    "from float64, of all outputs, over the largest output",
)


def _threads(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _layer(layer: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> Part:
    """One layer: a row a lowering, the fastest on all threads first; a star marks what `auto` takes."""
    mine = {(row["lowering"], row["threads"]): row for row in rows if row["name"] == layer["name"] and "best" in row}
    times = [[f"ms on {_threads(t)}", "median", "of peak"] for t in counts]
    memory = [f"workspace on {_threads(t)}" for t in counts]
    columns = [
        "lowering",
        *(heading for group in times for heading in group),
        *memory,
        "by formula",
        "weights",
        "error",
    ]

    def place(key: str) -> float:
        return next(float(mine[key, t]["best"]) for t in reversed(counts) if (key, t) in mine)

    table = []
    for key in sorted(dict.fromkeys(key for key, _ in mine), key=place):
        there = [mine.get((key, threads)) for threads in counts]
        last = next(row for row in reversed(there) if row is not None)
        star = "".join(f" *{t}" for t in counts if layer["auto"][str(t)] == key)
        cells = [key + star]
        for row in there:
            cells += ["-"] * 3 if row is None else _times(row)
        cells += ["-" if row is None else size(row["workspace_bytes"]) for row in there]
        cells += [size(last["workspace_formula_bytes"]), size(last["weight_bytes"]), _error(last["error"])]
        table.append(cells)
    title = f"{layer['name']}: {problem_text(layer['problem'])}, {count(layer['macs'])} multiply-adds"
    if any("*" in row[0] for row in table):
        title += "; *N: what auto takes on N threads"
    return Section(title, columns, table) if table else title


def _times(row: Mapping[str, Any]) -> list[str]:
    return [milliseconds(row["best"]), milliseconds(row["median"]), percent(row["peak_share"])]


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def _fastest(by_layer: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> Section:
    headings = [
        (f"fastest on {_threads(t)}", "ms", "of peak", "workspace", "auto takes", "auto over fastest") for t in counts
    ]
    rows = []
    for layer in by_layer:
        entries = {entry["threads"]: entry for entry in layer["threads"]}
        cells = [layer["name"]]
        for threads in counts:
            e = entries.get(threads)
            if e is None:
                cells += ["-"] * 6
                continue
            ratio = "-" if e["auto_ratio"] is None else f"{e['auto_ratio']:.2f}"
            rates = (milliseconds(e["best"]), percent(e["peak_share"]), size(e["workspace_bytes"]))
            cells += [e["fastest"], *rates, e["auto"], ratio]
        rows.append(cells)
    return Section("by layer", ("layer", *(h for group in headings for h in group)), rows)


def _over_layers(result: Mapping[str, Any], counts: Sequence[int]) -> Section:
    groups = [(f"fastest of, {_threads(t)}", "time over fastest", "of peak") for t in counts]
    columns = ("lowering", "layers", *(h for group in groups for h in group), "largest workspace", "largest error")
    rows = []
    for entry in result["by_lowering"]:
        there = {found["threads"]: found for found in entry["threads"]}
        cells = [entry["lowering"], str(entry["layers"])]
        for threads in counts:
            f = there.get(threads)
            cells += (
                ["-"] * 3
                if f is None
                else [str(f["fastest_on"]), f"{f['behind_fastest']:.2f}", percent(f["peak_share"])]
            )
        rows.append([*cells, size(entry["workspace_bytes"]), _error(entry["error"])])
    chosen = f"{result['shapes']} of {result['of']} layers"
    return Section(f"over {chosen}, geometric means over those to which the lowering applies", columns, rows)


def _auto_lines(found: Sequence[Mapping[str, Any]]) -> list[Part]:
    lines: list[Part] = []
    for auto in found:
        worst = auto["worst"]
        instead = f"{worst['name']}: {worst['auto']}, where {worst['fastest']} is fastest"
        least = f"; at worst {worst['auto_ratio']:.2f} ({instead})"
        lines.append(
            f"auto on {_threads(auto['threads'])}: the fastest lowering on {auto['fastest_on']} of {auto['layers']} "
            f"layers; its time over the fastest: geometric mean {auto['behind_fastest']:.2f}"
            + (least if worst["auto_ratio"] > 1 else "")
        )
    return lines


def _claim(claim: Mapping[str, Any] | None) -> list[Part]:
    """The claim of the low-memory paper, and what came out."""
    if claim is None:
        return []
    groups = [claim["low_memory"], "the faster of " + ", ".join(claim["patches"])]
    rows = []
    for name in dict.fromkeys(entry["name"] for found in claim["threads"] for entry in found["layers"]):
        cells = [name]
        for found in claim["threads"]:
            e = next((entry for entry in found["layers"] if entry["name"] == name), None)
            cells += (
                ["-"] * 4
                if e is None
                else [
                    e["patches"],
                    f"{e['ratio']:.2f}",
                    size(e["workspace"]),
                    size(e["workspace_patches"]),
                ]
            )
        rows.append(cells)
    headings = [
        (f"against, {_threads(f['threads'])}", "time over time", "workspace", "its workspace") for f in claim["threads"]
    ]
    title = f"{groups[0]} over {groups[1]}: stride 1, kernel above 1x1"
    parts: list[Part] = [Section(title, ("layer", *(h for group in headings for h in group)), rows)]
    for found in claim["threads"]:
        share = found["workspace"] / found["workspace_patches"] if found["workspace_patches"] else 0.0
        parts.append(
            f"{groups[0]} over {groups[1]} on {_threads(found['threads'])}, {len(found['layers'])} layers: time "
            f"{found['geomean']:.2f} x (geometric mean of best times; medians {found['geomean_median']:.2f}; "
            f"{found['min']:.2f} to {found['max']:.2f}), workspace {percent(share)} "
            f"({size(found['workspace'])} for {size(found['workspace_patches'])} in all); claimed at most "
            f"{found['claimed']:.2f} x: {'holds' if found['holds'] else 'does NOT hold'} ({claim['source']})"
        )
    return parts
