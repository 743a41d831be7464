"""Results for people: tables for the terminal and for Markdown, and the README's comparison with other engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from gemmify.bench.gpu_report import gpu_parts
from gemmify.bench.header import SCHEMA, header
from gemmify.bench.lowerings_report import lowerings_parts
from gemmify.bench.metaschedule import check_minutes
from gemmify.bench.network import run_model
from gemmify.bench.peers import OURS, check_peers
from gemmify.bench.rounds import IDLE_LIMIT
from gemmify.bench.sections import Part, Section, gemm_text, markdown_table, milliseconds, percent, rich_table
from gemmify.errors import InputError
from gemmify.frontend import import_model
from gemmify.measure import geomean
from gemmify.report import problem_text, size
from gemmify.threads import default_threads
from gemmify.zoo import ZOO

BUSY_SHARE = 0.8  # a peak this far below the run's best says that something else had the cores


def render(result: Mapping[str, Any]) -> RenderableType:
    """A rich renderable of what `run_suite`, `run_lowerings`, `run_gpu`, `run_model` or `peers_report`
    returned.

    Raises InputError for another.
    """
    return Group(*(Text(part) if isinstance(part, str) else rich_table(part) for part in _parts(result)))


def render_markdown(result: Mapping[str, Any]) -> str:
    """The same as Markdown, with the command that made it. Raises InputError where `render` does."""
    if result.get("kind") == "peers":
        return str(result["markdown"])
    parts = [part if isinstance(part, str) else markdown_table(part) for part in _parts(result)]
    return "\n\n".join([*parts, f"Made by `{result['command']}`."])


def _parts(result: Mapping[str, Any]) -> list[Part]:
    if result.get("schema") != SCHEMA:
        raise InputError(f"this is not a benchmark result: schema {SCHEMA} is required, found {result.get('schema')!r}")
    if result["kind"] == "gpu":  # its machine is another one
        return gpu_parts(result)
    body = {"suite": _suite, "model": _model, "peers": _peers, "lowerings": lowerings_parts}.get(str(result["kind"]))
    if body is None:
        raise InputError(f"a benchmark result of kind {result['kind']!r} is not known")
    return [*_machine_lines(result), *body(result)]


def _machine_lines(result: Mapping[str, Any]) -> list[str]:
    machine = result["machine"]
    where = result.get("device") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    lines = [f"{where}, {result['date']}"]
    if "peak" in result:
        limits = "of the data sheet" if "device" in result else "measured in this run"
        lines.append(
            f"limits {limits}: {result['peak']['gflops']:.0f} GFLOP/s of multiply-adds, "
            f"memory read {result['bandwidth']['read']:.1f} GB/s, triad {result['bandwidth']['triad']:.1f} GB/s"
        )
    return lines


def _suite(result: Mapping[str, Any]) -> list[Part]:
    compute, memory, out = [], [], []
    # Two keys may come to the same lowering ("auto", "plain"): it is shown once.
    for row in {(row["name"], row["lowering"]): row for row in result["rows"]}.values():
        if "best" not in row:
            out.append((row["name"], row["lowering"], row["reason"]))
            continue
        first = (row["name"], row["lowering"])
        times = (milliseconds(row["best"]), milliseconds(row["median"]), f"{row['gflops']:.1f}")
        if "bound" in row:
            rates = (size(row["bytes"]), f"{row['gbytes']:.1f}", percent(row["bandwidth_share"]))
            memory.append((*first, row["bound"], *times, *rates))
        else:
            shares = (percent(row["peak_share"]), percent(row["peak_share_median"]))
            compute.append((*first, gemm_text(row), *times, *shares))
    columns = ("layer", "lowering", "GEMM m x n x k", "best ms", "median ms", "GFLOP/s", "of peak", "median of peak")
    bound = ("layer", "lowering", "bound by", "best ms", "median ms", "GFLOP/s", "bytes", "GB/s", "of memory read")
    chosen = "" if result["shapes"] == result["of"] else f" ({result['shapes']} of its {result['of']} shapes)"
    parts: list[Part] = []
    if compute:
        parts.append(Section(f"{result['suite']}{chosen}, with bias and ReLU", columns, compute))
    if memory:
        title = "bound by memory, not in the mean above; over 100 % where the operands stay in a cache"
        parts.append(Section(title, bound, memory))
    if out:
        parts.append(Section("not applicable", ("layer", "lowering", "reason"), out))
    return parts + _mean_lines(result)


def _mean_lines(result: Mapping[str, Any]) -> list[Part]:
    lines: list[Part] = []
    peaks = [row["peak"] for row in result["rows"] if "peak" in row]
    low = sum(peak < BUSY_SHARE * result["peak"]["gflops"] for peak in peaks)
    if low:
        lines.append(
            f"warning: beside {low} of {len(peaks)} rows the peak was below {100 * BUSY_SHARE:.0f} % of the best: "
            "the machine was busy, measure again on a quiet one"
        )
    for key, mean in result["geomean"].items():
        if mean is not None:
            median = result["geomean_median"][key]
            lines.append(f"geometric mean of the peak, {key}: {percent(mean)} (medians: {percent(median)})")
        if (memory := result["geomean_bandwidth"][key]) is not None:
            lines.append(f"geometric mean of memory read, {key}, rows bound by memory: {percent(memory)}")
    return lines


def _model(result: Mapping[str, Any]) -> list[Part]:
    rows, notes = [], []
    for name, engine in result["engines"].items():
        relative = engine["difference"]["relative"] if name != OURS else 0.0
        rows.append(
            (
                f"{name} {engine['version']}",
                *(milliseconds(engine[key]) for key in ("best", "median", "p90")),
                f"{engine['gflops']:.1f}",
                percent(engine["peak_share"]),
                f"{engine['ratio']:.2f}",
                f"{engine['ratio_best']:.2f}",
                "-" if name == OURS else "not finite" if relative is None else f"{relative:.1e}",
            )
        )
        notes += _warnings(name, engine, result["tolerance"])
    columns = ("engine", "best ms", "median ms", "p90 ms", "GFLOP/s", "of peak", "x ours", "best x ours", "difference")
    title = f"{result['model']['name']}: {result['model']['macs'] / 1e9:.2f} G multiply-adds"
    kind_rows = [(k["kind"], str(k["calls"]), milliseconds(k["seconds"]), percent(k["share"])) for k in result["kinds"]]
    if "metaschedule" in result:
        notes.append(_tuned(result["metaschedule"]))
    return [
        Section(title, columns, rows),
        *notes,
        Section("ours, by layer", LAYER_COLUMNS, [_layer_row(row) for row in result["layers"]]),
        Section("ours, by kind of kernel", ("kind", "calls", "ms", "share"), kind_rows),
        f"convolutions and fully connected layers take {percent(result['conv_fc_share'])} of our time",
    ]


def _tuned(found: Mapping[str, Any]) -> str:
    """What the peer MetaSchedule did in its time."""
    return (
        f"metaschedule tuned for {found['seconds'] / 60:.1f} minutes: {found['trials']} trials "
        f"({found['per_iteration']} an iteration), {found['failed']} failed; "
        f"{found['tuned']} of {found['tasks']} tasks have a record that ran"
    )


LAYER_COLUMNS = ("layer", "problem", "lowering", "ms", "share", "GFLOP/s", "of peak")


def _layer_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    rates = (milliseconds(row["seconds"]), percent(row["share"]), f"{row['gflops']:.1f}", percent(row["peak_share"]))
    return (row["name"], problem_text(row["problem"]) or "-", row["lowering"] or "-", *rates)


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
    peers: Sequence[str] = (),
    threads: int | None = None,
    repeat: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    lowering: Any = "auto",
    max_error: float | None = None,
    target: Any = "llvm",
    tuning_minutes: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run `run_model` on several models, and compare ours with the fastest peer of each.

    Returns a dict that is ready for JSON: `rows` (a model each: ours and each peer's median and best in seconds,
    `speedup` = the fastest peer's median over ours, `speedup_best` = the least best time of a peer over ours,
    `peak_share`, `conv_fc_share`), `geomean` and `min` of the speedups, the single `results`, and `markdown`, the
    README's table. Raises InputError where no model is named, and as `run_model` does.
    """
    if not models:
        raise InputError("a comparison needs at least one model, as in: alexnet --peers onnxruntime")
    check_peers(peers)
    for model in models:  # a misspelt name is found now, not after the models before it
        if isinstance(model, str) and model not in ZOO and not Path(model).is_file():
            import_model(model, shapes)
    options = {"peers": peers, "threads": threads, "repeat": repeat, "lowering": lowering, "target": target}
    options |= {"max_error": max_error, "tuning_minutes": tuning_minutes, "dtype": dtype}
    check_minutes(tuning_minutes, peers)

    def run(model: Any) -> dict[str, Any]:
        return run_model(model, shapes=shapes, progress=lambda line: progress(f"{model}: {line}"), **options)

    return summarize_peers([run(model) for model in models], threads or default_threads(), target)


def summarize_peers(results: Sequence[Mapping[str, Any]], threads: int, target: Any) -> dict[str, Any]:
    """The report of `peers_report` from finished results of `run_model`; an engine that disagrees is not a peer."""
    rows = [_summary(result) for result in results]
    speedups = [row["speedup"] for row in rows if row["speedup"] is not None]
    report = header("peers", threads, target)
    report.update(rows=rows, geomean=geomean(speedups), min=min(speedups, default=None), results=list(results))
    best = [row["speedup_best"] for row in rows if row["speedup_best"] is not None]
    report.update(geomean_best=geomean(best), min_best=min(best, default=None))
    report["markdown"] = markdown(report)
    return report


def _summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """One model's row of a comparison."""
    engines = result["engines"]
    right = [name for name in engines if name != OURS and engines[name]["agrees"]]
    fastest = min(right, key=lambda name: float(engines[name]["median"])) if right else None
    least = min((engines[name]["best"] for name in right), default=None)
    return {
        "model": result["model"]["name"],
        "medians": {name: engine["median"] for name, engine in engines.items()},
        "bests": {name: engine["best"] for name, engine in engines.items()},
        "disagree": [name for name in engines if name != OURS and name not in right],
        "fastest_peer": fastest,
        "speedup": engines[fastest]["median"] / engines[OURS]["median"] if fastest else None,
        "speedup_best": least / engines[OURS]["best"] if least else None,
        "peak_share": engines[OURS]["peak_share"],
        "peak": result["peak"]["gflops"],
        "bandwidth": result["bandwidth"]["read"],
        "conv_fc_share": result["conv_fc_share"],
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The table of a peers report in Markdown, with the machine and the command below it."""
    return "\n\n".join(part if isinstance(part, str) else markdown_table(part) for part in _peers(report))


def _peers(report: Mapping[str, Any]) -> list[Part]:
    rows = report["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["medians"]))
    compared = len(names) > 1
    columns = ["network", *(f"{name} ms" for name in names), *(["speedup"] if compared else []), "of peak", "conv + fc"]
    lines = []
    for row in rows:
        times = [
            f"{milliseconds(row['medians'][n])} / {milliseconds(row['bests'][n])}" if n in row["medians"] else "-"
            for n in names
        ]
        ratio = "-" if row["speedup"] is None else f"{row['speedup']:.2f} / {row['speedup_best']:.2f}"
        shares = [f"{100 * row['peak_share']:.0f} %", f"{100 * row['conv_fc_share']:.0f} %"]
        lines.append([row["model"], *times, *([ratio] if compared else []), *shares])
    parts: list[Part] = [Section("", columns, lines)]
    for row in rows:
        if row["disagree"]:
            what = ", ".join(row["disagree"])
            parts.append(f"warning: {row['model']}: {what} computed something else, and is no peer there.")
    if report["geomean"] is not None:
        parts.append(
            "Fastest peer over ours: "
            f"geometric mean {report['geomean']:.2f}, least {report['min']:.2f} of the medians; "
            f"geometric mean {report['geomean_best']:.2f}, least {report['min_best']:.2f} of the best times."
        )
    return [*parts, _provenance(report)]


def _provenance(report: Mapping[str, Any]) -> str:
    rows, machine = report["rows"], report["machine"]
    peaks, reads = [row["peak"] for row in rows], [row["bandwidth"] for row in rows]
    return (
        f"Median / best. {machine['cpu']}, {machine['threads']} threads, measured beside them: "
        f"{min(peaks):.0f} to {max(peaks):.0f} GFLOP/s of multiply-adds, "
        f"memory read {min(reads):.1f} to {max(reads):.1f} GB/s; {report['date'][:10]}; made by `{report['command']}`."
    )
