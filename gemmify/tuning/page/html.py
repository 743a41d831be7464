"""The report as HTML text. Everything that comes from a log is escaped where it is put in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ...report import duration, ratio
from ..folder import code_of
from .charts import COLOURS, bars, latency, scatter, short, thin
from .data import Layer, MachinePart, Page, Session
from .style import CSS, JS

POINTS = 6000
"""Of all scatters together: what keeps a page of 20,000 trials below 2 MB. Each layer has its share."""
LEAST_POINTS = 40
REASONS = 8
"""Kinds of failure that a layer's part names; the rest are counted."""
FASTEST = 5

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


def page(data: Page) -> str:
    """The whole document. It loads nothing from anywhere, and says so to the browser."""
    parts = [_head(data)]
    for index, part in enumerate(data.machines):
        parts.append(_machine(part, index, data))
    parts.append(_provenance(data))
    title = "Tuning report" + (f": {data.counted}" if data.counted else "")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>\n"
        f'<a class="skip" href="#main">Skip to the results</a><main id="main">\n<h1>{escape(title)}</h1>\n'
        + "\n".join(parts)
        + f'\n</main><div id="hint" role="status" aria-live="polite"></div><script>{JS}</script></body></html>\n'
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table of cells that are markup already; a column whose heading ends in "#" holds numbers."""
    kinds = ["n" if c.endswith("#") else "w" for c in columns]
    head = "".join(
        f'<th class="{k}" scope="col">{escape(c.rstrip("#"))}</th>' for c, k in zip(columns, kinds, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f'<td class="{k}">{cell}</td>' for cell, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f'<caption class="skip">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _head(data: Page) -> str:
    lines = []
    if data.counted:
        lines.append(f"Layers of {data.counted}, each as often as the network has it.")
    elif data.machines:
        lines.append("Every layer of the log counts once; --model counts each as often as a network has it.")
    if data.untouched:
        few = ", ".join(data.untouched[:5]) + (" and more" if len(data.untouched) > 5 else "")
        lines.append(f"No record is about {len(data.untouched)} of its layers: {few}.")
    return "".join(f'<p class="dim">{escape(line)}</p>' for line in [*lines, *data.notes])


def _machine(part: MachinePart, index: int, data: Page) -> str:
    m = part.machine
    before, after, bound = (part.total(name) for name in ("before", "after", "bound"))
    missing = sum(not layer.complete for layer in part.layers)
    which = "all layers" if not missing else f"{len(part.layers) - missing} of {len(part.layers)} layers"
    tiles = [(_time(before), f"untuned, {which}"), (_time(after), "tuned")]
    if before and after:
        tiles.append((f"{ratio(before / after)} x", "as fast"))
    if bound and after:
        tiles.append((f"{100 * bound / after:.0f} %", f"of the bound, {duration(bound)}"))
    tiles += [(str(part.records), "records"), (str(len(part.layers)), "different layers")]
    boxes = "".join(f"<li><b>{escape(value)}</b>{escape(text)}</li>" for value, text in tiles)
    note = f'<p class="bad">Layers without a time before or after, in no sum: {missing}.</p>' if missing else ""
    title = f"{m.cpu}, {m.threads} of {m.cores} cores"
    return (
        f'<section aria-labelledby="m{index}"><h2 id="m{index}">{escape(title)}</h2>'
        f'<p class="dim">{escape(f"{code_of(m)}, features {m.features}; {part.first} to {part.last}")}</p>'
        f'<ul class="tiles">{boxes}</ul>{note}{_latency(part, *(None if missing else s for s in (before, bound)))}'
        f"{_layers(part, index)}{_details(part, index)}{_sources(part)}</section>"
    )


def _latency(part: MachinePart, before: float | None, bound: float | None) -> str:
    drawing = latency(part.sessions, before, bound)
    if not drawing:
        return '<p class="dim">No record of this machine tells when it was taken: no curve of the sessions.</p>'
    caption = (
        "Latency of all layers with the best single trials known at the moment, against the time of its session. A "
        "layer counts with its first measured time until then. The table below goes by the finals: its sum may differ."
    )
    keys = "".join(_key(i, f"session {i + 1}, {clock(s.began)}") for i, s in enumerate(part.sessions) if s.steps)
    return (
        f"<h3>Latency against tuning time</h3><figure>{drawing}"
        f"<figcaption>{keys}<br>{escape(caption)}</figcaption></figure>"
        + table(
            ("session", "began", "minutes#", "trials#", "at its start#", "at its end#"),
            (_session_row(i, s) for i, s in enumerate(part.sessions)),
            "The sessions",
        )
    )


def _session_row(index: int, session: Session) -> tuple[str, ...]:
    ends = (session.steps[0][1], session.steps[-1][1]) if session.steps else (None, None)
    name = escape(short(f"{index + 1} {session.name}", 60))
    began = escape(clock(session.began))
    return (name, began, f"{session.minutes:.1f}", str(session.trials), *(_time(s) for s in ends))


def _layers(part: MachinePart, index: int) -> str:
    longest = max((s for layer in part.layers for s in (layer.before, layer.after) if s), default=0.0)
    rows = []
    for number, layer in enumerate(part.layers):
        verdict = layer.verdict
        chosen = verdict.point.title if verdict.point else "-"
        share = f"{100 * layer.bound / layer.after:.0f} %" if layer.bound and layer.after else "-"
        rows.append(
            (
                f'<a href="#l{index}-{number}">{escape(layer.title)}</a>',
                str(layer.count),
                _time(layer.before),
                _time(layer.after),
                bars(layer, longest),
                _gain(layer),
                _time(layer.bound),
                share,
                f"<code>{escape(chosen)}</code>" + (' <span class="dim">(the default)</span>' if verdict.kept else ""),
            )
        )
    columns = ("layer", "x#", "untuned#", "tuned#", "", "gain#", "bound#", "of bound#", "chosen")
    return (
        "<h3>Layers</h3><p class='dim'>Seconds of one call, median, caches flushed before it. Bars: untuned above, "
        "tuned below, the bound as a line. Gain with the larger of the two spreads between the quartiles.</p>"
        + table(columns, rows, "Layers before and after tuning, largest share of the network first")
    )


def _gain(layer: Layer) -> str:
    if not (layer.before and layer.after):
        return "-"
    kind = "good" if layer.after < layer.before else ""
    spread = layer.verdict.spread
    text = f"{ratio(layer.before / layer.after)} x" + (f" ±{100 * spread:.0f} %" if spread is not None else "")
    return f'<span class="{kind}">{text}</span>'


def _details(part: MachinePart, index: int) -> str:
    total = sum(len(layer.trials) for layer in part.layers)
    rate = min(1.0, POINTS / max(1, total))
    room = max(2, POINTS // max(1, len(part.layers)))
    parts = []
    for number, layer in enumerate(part.layers):
        most = max(min(LEAST_POINTS, room), round(rate * len(layer.trials)))
        parts.append(_layer(layer, f"l{index}-{number}", most))
    return "<h3>What was tried</h3>" + "".join(parts)


def _layer(layer: Layer, name: str, most: int) -> str:
    shown = thin(layer.trials, most)
    keys = [key for key, _, _ in layer.quick]
    colour = {key: f"c{i % COLOURS}" for i, key in enumerate(keys)}
    drawing = scatter(layer, shown, colour)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in layer.outcomes.items())
    legend = "".join(_key(i, key) for i, key in enumerate(keys))
    thinned = (
        "" if len(shown) == len(layer.trials) else f" {len(shown)} of {len(layer.trials)} trials are drawn: every "
    )
    thinned += "" if not thinned else "new best, the rest at even distances."
    caption = "Hover, tap, or use the arrow keys for a trial; outlined: a new best; crosses: failed." + thinned
    figure = f"<figure>{drawing}<figcaption>{legend}<br>{escape(caption)}</figcaption></figure>" if drawing else ""
    rows = ((escape(key), _time(seconds), str(count)) for key, seconds, count in layer.quick)
    return (
        f'<details id="{name}"><summary>{escape(layer.title)} <span class="dim">{escape(outcomes)}</span></summary>'
        f"<p>{escape(layer.verdict.why)}</p>{figure}"
        + (table(("lowering", "best trial#", "trials#"), rows, f"Lowerings of {layer.title}") if keys else "")
        + _fastest(layer)
        + _failures(layer)
        + "</details>"
    )


def _fastest(layer: Layer) -> str:
    timed = sorted((t for t in layer.trials if t.seconds is not None), key=lambda t: (t.seconds, t.number))[:FASTEST]
    if not timed:
        return ""
    rows = ((str(t.number), f"<code>{escape(short(t.point))}</code>", _time(t.seconds)) for t in timed)
    return table(("trial#", "point", "time#"), rows, f"The fastest trials of {layer.title}")


def _failures(layer: Layer) -> str:
    if not layer.failures:
        return ""
    rows = [(escape(o), escape(short(why)) or "-", str(count)) for o, why, count in layer.failures[:REASONS]]
    rest = sum(count for _, _, count in layer.failures[REASONS:])
    if rest:
        rows.append(("others", f"{len(layer.failures) - REASONS} more reasons", str(rest)))
    return table(("failed by", "reason", "times#"), rows, f"Failures of {layer.title}")


def _sources(part: MachinePart) -> str:
    rows = ((escape(text), str(count)) for text, count in part.versions.items())
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in part.outcomes.items())
    return f"<h3>Records</h3><p>{part.records} records: {escape(outcomes)}.</p>" + table(
        ("made by", "records#"), rows, "Versions"
    )


def _provenance(data: Page) -> str:
    sources = "".join(f"<li><code>{escape(short(source))}</code></li>" for source in data.sources)
    commands = escape("\n".join(data.commands))
    return (f"<h2>Made from</h2><ul>{sources}</ul>" if sources else "") + (
        f"<h2>To make it again</h2><pre>{commands}</pre>" if commands else ""
    )


def _key(index: int, text: str) -> str:
    return f'<span class="key c{index % COLOURS}"><span>{escape(short(text, 80))}</span></span> '


def clock(when: str) -> str:
    """`2026-11-21T10:00:00.123Z` as `2026-11-21 10:00:00`; another text as it is."""
    return f"{when[:10]} {when[11:19]}" if when[10:11] == "T" else when


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)
