"""Results of the GPU suite as tables, and the means that they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemmify.bench.sections import Part, Section, percent
from gemmify.measure import geomean

Entry = Mapping[str, Any]
_SHOWN = 40
"""Rows of failures that are shown."""
ALL = "all"


def summarize(result: Mapping[str, Any]) -> dict[str, Any]:
    """`{checks, peaks, layers, networks}`: how many lowerings x precisions are right, the limits measured, and
    geometric means of PyTorch's time over ours by precision and batch; only right results count."""
    entries = result["entries"]
    return {
        "checks": _checks(entries),
        "peaks": peaks(entries),
        "layers": _means([e for e in entries if e["section"] == "layer" and e.get("batch")]),
        "networks": _means([e for e in entries if e["section"] == "network"]),
    }


def _checks(entries: Sequence[Entry]) -> dict[str, Any]:
    mine = [e for e in entries if e["section"] == "check"]
    table: dict[str, dict[str, list[int]]] = {}
    for entry in mine:
        cell = table.setdefault(entry["lowering"], {}).setdefault(entry["precision"], [0, 0])
        cell[0] += is_right(entry)
        cell[1] += 1
    return {"right": sum(map(is_right, mine)), "of": len(mine), "table": table}


def is_right(entry: Entry) -> bool:
    """Whether an entry ran and its numbers are right."""
    return "crashed" not in entry and bool(entry.get("right", True))


def peaks(entries: Sequence[Entry]) -> dict[str, float]:
    """TFLOP/s by precision and GB/s of `read` and `copy`, as PyTorch reached them in this run."""
    found = {}
    for entry in entries:
        if entry["section"] == "peak" and "tflops" in entry:
            found[str(entry["precision"])] = float(entry["tflops"])
        elif entry["section"] == "peak" and "gbytes" in entry:
            found[str(entry["kind"])] = float(entry["gbytes"])
    return found


def _means(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A row a precision and batch, and one a precision for all batches."""
    rows = []
    mine = [e for e in entries if is_right(e) and "ratio" in e]
    for precision in dict.fromkeys(e["precision"] for e in mine):
        batches = dict.fromkeys(e["batch"] for e in mine if e["precision"] == precision)
        for batch in (ALL, *sorted(batches)):
            chosen = [e for e in mine if e["precision"] == precision and batch in (ALL, e["batch"])]
            alone = [e["ratio_alone"] for e in chosen if "ratio_alone" in e]
            ratios = [e["ratio"] for e in chosen]
            row = {"precision": precision, "batch": batch, "count": len(chosen), "geomean": geomean(ratios)}
            rows.append({**row, "least": min(ratios), "geomean_alone": geomean(alone)})
    return rows


def gpu_parts(result: Mapping[str, Any]) -> list[Part]:
    """The tables of a result of kind "gpu"."""
    found, summary = result["result"], result["summary"]
    machine = found["machine"]
    torch = (
        f"PyTorch {machine['torch']}" if machine.get("torch") else f"no comparison: {machine.get('why_no_torch', '')}"
    )
    parts: list[Part] = [
        f"{machine.get('gpu', 'GPU')}, code for {', '.join(found['bundle']['archs'])}, {torch}, seed {found['seed']}, "
        f"{found['date']}"
    ]
    entries = found["entries"]
    if summary["peaks"]:
        parts.append(_peak_table(summary["peaks"], entries))
    if summary["checks"]["of"]:
        parts.append(_check_table(summary["checks"]))
    parts += _layer_tables([e for e in entries if e["section"] == "layer"], summary)
    parts += _network_tables([e for e in entries if e["section"] == "network"])
    return [*parts, *_failures(result), *_left_out(found)]


def _peak_table(found: Mapping[str, float], entries: Sequence[Entry]) -> Section:
    ours = {e["precision"]: e["gflops"] / 1e3 for e in entries if _is_gemm(e)}
    rows = []
    for name, value in found.items():
        memory = name in ("read", "copy")
        mine = ours.get(name)
        unit = "GB/s" if memory else "TFLOP/s"
        rows.append((name, unit, f"{value:.1f}", "-" if mine is None else f"{mine:.1f}",
                     "-" if mine is None else percent(mine / value)))  # fmt: skip
    return Section(
        "limits measured in this run: large matrix product, memory", ("what", "unit", "PyTorch", "ours", "share"), rows
    )


def _is_gemm(entry: Entry) -> bool:
    return entry["section"] == "layer" and not entry.get("batch") and "gflops" in entry and is_right(entry)


def _check_table(found: Mapping[str, Any]) -> Section:
    precisions = list(dict.fromkeys(p for row in found["table"].values() for p in row))
    rows = []
    for lowering, row in found["table"].items():
        cells = ["/".join(map(str, row[p])) if p in row else "-" for p in precisions]
        rows.append((lowering, *cells))
    title = f"correctness: {found['right']} of {found['of']} right, each against float64 on new random numbers"
    return Section(title, ("lowering", *precisions), rows)


def _layer_tables(entries: Sequence[Entry], summary: Mapping[str, Any]) -> list[Part]:
    parts: list[Part] = []
    if summary["layers"]:
        parts.append(_mean_table("layers with bias and ReLU: PyTorch's time over ours", summary["layers"]))
    columns = ("layer", "lowering", "ours us", "spread", "cuDNN us", "alone us", "ratio", "TFLOP/s", "of peak", "error")
    for precision, batch in dict.fromkeys((e["precision"], e.get("batch")) for e in entries):
        mine = [e for e in entries if (e["precision"], e.get("batch")) == (precision, batch) and "times" in e]
        if mine and batch:
            rows = [_layer_row(entry, summary["peaks"].get(precision)) for entry in mine]
            parts.append(Section(f"{precision}, batch {batch}", columns, rows))
    return parts


def _layer_row(entry: Entry, peak: float | None) -> tuple[str, ...]:
    times = entry["times"]
    whole = [times[name]["median"] for name in ("eager", "fused") if name in times]
    rate = entry["gflops"] / 1e3
    mark = "" if is_right(entry) else " WRONG"
    return (
        entry["name"] + mark,
        entry["lowering"],
        microseconds(times["ours"]["median"]),
        spread(times["ours"]),
        microseconds(min(whole)) if whole else "-",
        microseconds(times["alone"]["median"]) if "alone" in times else "-",
        f"{entry['ratio']:.2f}" if "ratio" in entry else "-",
        f"{rate:.1f}",
        percent(rate / peak) if peak else "-",
        "-" if entry.get("error") is None else f"{entry['error']:.1e}",
    )


def microseconds(seconds: float) -> str:
    """Seconds as a number of microseconds."""
    return f"{seconds * 1e6:.1f}"


def spread(times: Mapping[str, float]) -> str:
    """How far the tenths at both ends lie apart, relative to the median."""
    return percent((times["high"] - times["low"]) / times["median"])


def _network_tables(entries: Sequence[Entry]) -> list[Part]:
    rows = []
    for entry in (e for e in entries if "times" in e):
        times = entry["times"]
        peers = [times[name]["median"] for name in ("eager", "fused") if name in times]
        rows.append(
            (
                entry["name"] + ("" if is_right(entry) else " WRONG"),
                entry["precision"],
                str(entry["batch"]),
                f"{times['ours']['median'] * 1e3:.3f}",
                spread(times["ours"]),
                *(f"{times[name]['median'] * 1e3:.3f}" if name in times else "-" for name in ("eager", "fused")),
                f"{entry['ratio']:.2f}" if peers else "-",
                f"{entry['images']:.0f}",
                "-" if entry.get("error") is None else f"{entry['error']:.1e}",
            )
        )
    columns = (
        "network",
        "precision",
        "batch",
        "ours ms",
        "spread",
        "PyTorch ms",
        "fused ms",
        "ratio",
        "images/s",
        "error",
    )
    return [Section("networks as CUDA graphs; ratio: the faster of PyTorch's over ours", columns, rows)] if rows else []


def _mean_table(title: str, means: Sequence[Mapping[str, Any]]) -> Section:
    rows = []
    for row in means:
        alone = "-" if row["geomean_alone"] is None else f"{row['geomean_alone']:.2f}"
        rows.append((row["precision"], str(row["batch"]), str(row["count"]), f"{row['geomean']:.2f}",
                     f"{row['least']:.2f}", alone))  # fmt: skip
    return Section(title, ("precision", "batch", "layers", "geometric mean", "least", "conv alone"), rows)


def _failures(result: Mapping[str, Any]) -> list[Part]:
    wrong = [(f["name"], f["what"]) for f in result["failures"]]
    unbuilt = [(name, why) for name, why in result["build_failures"]]
    parts: list[Part] = []
    for title, rows in (("failed or wrong", wrong), ("not built", unbuilt)):
        if rows:
            more = f" ({len(rows) - _SHOWN} more)" if len(rows) > _SHOWN else ""
            parts.append(Section(f"{title}: {len(rows)}{more}", ("entry", "why"), rows[:_SHOWN]))
    return parts


def _left_out(found: Mapping[str, Any]) -> list[Part]:
    count = len(found.get("not_run", ()))
    return [f"{count} entries were not reached within {found['minutes']:g} minutes"] if count else []
