"""Results for people: rich tables, and the README's comparison with other engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gemmify.bench.header import SCHEMA, header
from gemmify.bench.network import run_model
from gemmify.bench.peers import OURS, check_peers
from gemmify.bench.rounds import IDLE_LIMIT
from gemmify.errors import InputError
from gemmify.measure import geomean
from gemmify.threads import default_threads

MANY_KERNELS = 12


def render(result: Mapping[str, Any]) -> RenderableType:
    """A rich renderable of what `run_suite`, `run_model` or `peers_report` returned. Raises InputError for another."""
    if result.get("schema") != SCHEMA:
        raise InputError(f"this is not a benchmark result: schema {SCHEMA} is required, found {result.get('schema')!r}")
    parts: list[RenderableType] = [Text(line) for line in _machine_lines(result)]
    body = {"suite": _suite, "model": _model, "peers": _peers}.get(str(result["kind"]))
    if body is None:
        raise InputError(f"a benchmark result of kind {result['kind']!r} is not known")
    return Group(*parts, *body(result))


def _machine_lines(result: Mapping[str, Any]) -> list[str]:
    machine = result["machine"]
    lines = [f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {result['date']}"]
    if "peak" in result:
        lines.append(
            f"limits measured in this run: {result['peak']['gflops']:.0f} GFLOP/s of multiply-adds, "
            f"memory read {result['bandwidth']['read']:.1f} GB/s, triad {result['bandwidth']['triad']:.1f} GB/s"
        )
    return lines


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table; columns after the first are right-aligned where their first value is a number."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(columns):
        numeric = bool(rows) and rows[0][index][:1].isdigit()
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a layer's name may hold square brackets
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds >= 1e-4 else f"{seconds * 1e3:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _suite(result: Mapping[str, Any]) -> list[RenderableType]:
    rows = []
    for row in result["rows"]:
        gemm = "x".join(map(str, row["gemm"])) if row.get("gemm") else "-"
        if "best" not in row:
            rows.append((row["name"], row["lowering"], gemm, "-", "-", "-", f"not applicable: {row['reason']}"))
            continue
        rates = (f"{row['gflops']:.1f}", _percent(row["peak_share"]))
        rows.append((row["name"], row["lowering"], gemm, _time(row["best"]), _time(row["median"]), *rates))
    columns = ("layer", "lowering", "GEMM m x n x k", "best ms", "median ms", "GFLOP/s", "of peak")
    means = [
        Text(f"geometric mean of the shares, {key}: {_percent(mean)}")
        for key, mean in result["geomean"].items()
        if mean is not None
    ]
    return [_table(f"{result['suite']}, with bias and ReLU", columns, rows), *means]


def _model(result: Mapping[str, Any]) -> list[RenderableType]:
    rows, notes = [], []
    for name, engine in result["engines"].items():
        relative = engine["difference"]["relative"] if name != OURS else 0.0
        rows.append(
            (
                f"{name} {engine['version']}",
                *(_time(engine[key]) for key in ("best", "median", "p90")),
                f"{engine['gflops']:.1f}",
                _percent(engine["peak_share"]),
                f"{engine['ratio']:.2f}",
                "-" if name == OURS else "not finite" if relative is None else f"{relative:.1e}",
            )
        )
        notes += _warnings(name, engine, result["tolerance"])
    columns = ("engine", "best ms", "median ms", "p90 ms", "GFLOP/s", "of peak", "x ours", "difference")
    title = f"{result['model']['name']}: {result['model']['macs'] / 1e9:.2f} G multiply-adds"
    kind_rows = [(k["kind"], str(k["calls"]), _time(k["seconds"]), _percent(k["share"])) for k in result["kinds"]]
    slowest = sorted(result["kernels"], key=lambda row: -row["seconds"])[:MANY_KERNELS]
    kernel_rows = [
        (row["layer"] or "-", row["kernel"], row["lowering"] or "-", _time(row["seconds"]), _percent(row["share"]))
        for row in slowest
    ]
    return [
        _table(title, columns, rows),
        *(Text(note, style="yellow") for note in notes),
        _table("ours, by kind of kernel", ("kind", "calls", "ms", "share"), kind_rows),
        _table("ours, the slowest kernels", ("layer", "kernel", "lowering", "ms", "share"), kernel_rows),
    ]


def _warnings(name: str, engine: Mapping[str, Any], tolerance: float) -> list[str]:
    notes = []
    if name != OURS and not engine["agrees"]:
        notes.append(f"warning: the outputs of {name} and ours differ by more than {tolerance:g} of the largest")
    if engine["idle"] > IDLE_LIMIT:
        notes.append(f"warning: {name} used {100 * engine['idle']:.0f} % of a core while others were measured")
    return notes


def peers_report(
    models: Sequence[Any],
    *,
    peers: Sequence[str],
    threads: int | None = None,
    repeat: int | None = None,
    lowering: Any = "auto",
    target: Any = "llvm",
) -> dict[str, Any]:
    """Run `run_model` on several models, and compare ours with the fastest peer of each.

    Returns a dict that is ready for JSON: `rows` (a model each: ours and each peer's median in seconds, `speedup` = the
    fastest peer's median over ours), `geomean` and `min` of the speedups, the single `results`, and `markdown`, the
    README's table. Raises InputError where no model or no peer is named, and as `run_model` does.
    """
    if not models or not peers:
        raise InputError("a comparison needs at least one model and one peer, as in: alexnet --peers onnxruntime")
    check_peers(peers)
    options = {"peers": peers, "threads": threads, "repeat": repeat, "lowering": lowering, "target": target}
    return summarize_peers([run_model(model, **options) for model in models], threads or default_threads(), target)


def summarize_peers(results: Sequence[Mapping[str, Any]], threads: int, target: Any) -> dict[str, Any]:
    """The report of `peers_report` from finished results of `run_model`; an engine that disagrees is not a peer."""
    rows: list[dict[str, Any]] = []
    for result in results:
        engines = result["engines"]
        medians = {name: engine["median"] for name, engine in engines.items()}
        right = {name: medians[name] for name in engines if name != OURS and engines[name]["agrees"]}
        best = min(right, key=lambda name: right[name]) if right else None
        rows.append(
            {
                "model": result["model"]["name"],
                "medians": medians,
                "fastest_peer": best,
                "speedup": right[best] / medians[OURS] if best else None,
                "peak_share": engines[OURS]["peak_share"],
            }
        )
    speedups = [row["speedup"] for row in rows if row["speedup"] is not None]
    report = header("peers", threads, target)
    report.update(rows=rows, geomean=geomean(speedups), min=min(speedups, default=None), results=list(results))
    report["markdown"] = markdown(report)
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """The table of a peers report in Markdown, medians in milliseconds, with the machine and the command below it."""
    rows, mean, least = report["rows"], report["geomean"], report["min"]
    names = list(dict.fromkeys(name for row in rows for name in row["medians"]))
    lines = [
        "| network | " + " | ".join(f"{name} ms" for name in names) + " | speedup | of peak |",
        "| --- |" + " ---: |" * (len(names) + 2),
    ]
    for row in rows:
        times = " | ".join(_time(row["medians"][n]) if n in row["medians"] else "-" for n in names)
        speedup = f"{row['speedup']:.2f}" if row["speedup"] is not None else "-"
        lines.append(f"| {row['model']} | {times} | {speedup} | {100 * row['peak_share']:.0f} % |")
    machine = report["machine"]
    if mean is not None:
        lines += ["", f"Fastest peer's median over ours: geometric mean {mean:.2f}, least {least:.2f}."]
    where = f"{machine['cpu']}, {machine['threads']} threads, {report['date'][:10]}"
    lines += ["", f"Medians. {where}; made by `{report['command']}`."]
    return "\n".join(lines)


def _peers(result: Mapping[str, Any]) -> list[RenderableType]:
    return [Text(result["markdown"])]
