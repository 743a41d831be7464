"""The drawings of the report as SVG text: latency against time, bars of a layer, and the scatter of its trials.

Colours are classes, not values: the page's style sheet has one set for light and one for dark. Each mark holds its text
in a `title`: shown by hovering without any script, read aloud, and put into the page's hint by tap and arrow keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from ...report import duration
from .data import Layer, Session, Trial

COLOURS = 8
"""Classes c0 to c7 of the style sheet; more lowerings than that share them, and differ by the hint's text."""
LONG = 240


def short(text: str, most: int = LONG) -> str:
    """`text` in one line of at most `most` letters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values from `low` to `high`, about `wanted` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * s for s in (1, 2, 5, 10) if unit * s >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Axes:
    """A plot area of `width` x `height` with its margins; maps values to places, linear in x, linear or log in y."""

    LEFT, RIGHT, BOTTOM = 64, 12, 34

    def __init__(
        self, width: int, height: int, x: tuple[float, float], y: tuple[float, float], log: bool, top: int = 12
    ) -> None:
        self.width, self.height, self.log, self.top = width, height, log, top
        self.x0, self.x1 = x if x[1] > x[0] else (x[0], x[0] + 1)
        low, high = y if y[1] > y[0] else (y[0] * 0.9, (y[0] or 1e-9) * 1.1)
        self.low, self.high = low, high

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x0) / (self.x1 - self.x0)
        if self.log:
            up = math.log(y / self.low) / math.log(self.high / self.low)
        else:
            up = (y - self.low) / (self.high - self.low)
        wide, high = self.width - self.LEFT - self.RIGHT, self.height - self.top - self.BOTTOM
        return self.LEFT + across * wide, self.top + (1 - up) * high

    def frame(self, x_label: str, y_values: Iterable[float], x_values: Iterable[float]) -> str:
        parts = []
        right, bottom = self.width - self.RIGHT, self.height - self.BOTTOM
        for value in y_values:
            _, y = self.at(self.x0, value)
            parts.append(f'<path class="grid" d="M{self.LEFT} {y:.1f}H{right}"/>')
            parts.append(f'<text x="{self.LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{duration(value)}</text>')
        for value in x_values:
            x, _ = self.at(value, self.high)
            parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<text x="{right}" y="{self.height - 3}" text-anchor="end">{escape(x_label)}</text>')
        parts.append(f'<path class="axis" d="M{self.LEFT} {self.top}V{bottom}H{right}"/>')
        return "".join(parts)


def svg(width: int, height: int, name: str, body: str, kind: str = "") -> str:
    return (
        f'<div class="scroll"><svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" tabindex="0" '
        f'aria-label="{escape(name)}">'
        f"{body}</svg></div>"
    )


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade between `low` and `high`; a few linear ones where that is less than two."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [d * 10.0**e for e in range(first, last + 1) for d in (1, 2, 5) if low <= d * 10.0**e <= high]
    return found[:: math.ceil(len(found) / 8)] if len(found) > 2 else ticks(low, high)


def latency(sessions: Sequence[Session], untuned: float | None, bound: float | None) -> str:
    """Seconds of all layers over the minutes of each session, as steps; "" where no session has a time."""
    drawn = [(i, s) for i, s in enumerate(sessions) if s.steps]
    if not drawn:
        return ""
    values = [y for _, s in drawn for _, y in s.steps] + [v for v in (untuned, bound) if v]
    span = max(max(s.minutes for _, s in drawn), 1 / 60)
    axes = Axes(720, 300, (0.0, span), (0.95 * min(values), 1.03 * max(values)), log=False)
    parts = [axes.frame("minutes of tuning", ticks(axes.low, axes.high), ticks(0.0, span, 6))]
    for value, text in ((untuned, "untuned"), (bound, "bound")):
        if value:
            _, y = axes.at(0, value)
            parts.append(f'<path class="limit" d="M{axes.LEFT} {y:.1f}H{axes.width - axes.RIGHT}"/>')
            parts.append(f'<text class="note" x="{axes.LEFT + 6}" y="{y - 4:.1f}">{text} {duration(value)}</text>')
    for index, session in drawn:
        path = _steps(axes, thin_steps(session.steps))
        colour = f"c{index % COLOURS}"
        parts.append(f'<path class="line {colour}" d="{path}"/>')
        for minutes, seconds in _ends(thin_steps(session.steps, 60)):
            x, y = axes.at(minutes, seconds)
            text = f"session {index + 1}, {minutes:.1f} min: {duration(seconds)}"
            parts.append(f'<circle class="p {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{text}</title></circle>')
    first, last = drawn[0][1].steps[0][1], drawn[-1][1].steps[-1][1]
    name = f"Latency of all layers against tuning time: from {duration(first)} to {duration(last)}"
    return svg(axes.width, axes.height, name, "".join(parts))


def thin_steps(steps: Sequence[tuple[float, float]], most: int = 1500) -> list[tuple[float, float]]:
    """At most about `most` of the steps, the first and the last among them."""
    stride = max(1, math.ceil(len(steps) / most))
    return [step for i, step in enumerate(steps) if i % stride == 0 or i == len(steps) - 1]


def _ends(steps: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [step for i, step in enumerate(steps) if i in (0, len(steps) - 1) or step[1] != steps[i - 1][1]]


def _steps(axes: Axes, steps: Sequence[tuple[float, float]]) -> str:
    x, y = axes.at(*steps[0])
    path = [f"M{x:.1f} {y:.1f}"]
    for step in steps[1:]:
        x, y = axes.at(*step)
        path.append(f"H{x:.1f}V{y:.1f}")
    return "".join(path)


def bars(layer: Layer, longest: float) -> str:
    """Before and after of a layer as two bars, the bound as a line through both; `longest` seconds fill the width."""
    if longest <= 0:
        return ""
    width, parts = 200, []
    for y, seconds, kind in ((1, layer.before, "before"), (10, layer.after, "after")):
        if seconds is not None:
            wide = max(1.0, width * seconds / longest)
            parts.append(f'<rect class="{kind}" x="0" y="{y}" width="{wide:.1f}" height="8"/>')
    if layer.bound:
        parts.append(f'<path class="boundline" d="M{width * layer.bound / longest:.1f} 0V19"/>')
    return f'<svg class="bars" viewBox="0 0 {width} 19" aria-hidden="true">{"".join(parts)}</svg>'


def scatter(layer: Layer, shown: Sequence[Trial], colour: Mapping[str, str]) -> str:
    """Time against the number of the trial, failures as crosses along the top; "" where nothing was tried."""
    if not shown:
        return ""
    times = [t.seconds for t in shown if t.seconds] or [1e-3]
    values = [*times, *([layer.bound] if layer.bound else [])]
    axes = Axes(720, 260, (0.0, len(layer.trials) + 1.0), (min(values) / 1.1, max(values) * 1.25), log=True, top=26)
    frame = axes.frame("trial", log_ticks(axes.low, axes.high), ticks(0, len(layer.trials), 8))
    parts = [frame]
    if layer.bound:
        _, y = axes.at(0, layer.bound)
        parts.append(f'<path class="limit" d="M{axes.LEFT} {y:.1f}H{axes.width - axes.RIGHT}"/>')
        parts.append(f'<text class="note" x="{axes.LEFT + 6}" y="{y - 4:.1f}">bound {duration(layer.bound)}</text>')
    for trial in shown:
        parts.append(_mark(axes, trial, colour[trial.lowering]))
    failed = sum(count for outcome, count in layer.outcomes.items() if outcome != "ok")
    name = f"Trials of {layer.title}: {len(layer.trials)}, {failed} failed; best {duration(min(times))}"
    return svg(axes.width, axes.height, name, "".join(parts), "scatter")


def _mark(axes: Axes, trial: Trial, colour: str) -> str:
    if trial.seconds:
        x, y = axes.at(trial.number, trial.seconds)
        text = escape(short(f"{trial.number}: {trial.point}: {duration(trial.seconds)}", 160))
        kind, radius = (f"p {colour} best", "4") if trial.best else (f"p {colour}", "2.5")
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{text}</title></circle>'
    x, _ = axes.at(trial.number, axes.high)
    text = escape(short(f"{trial.number}: {trial.point}: {trial.outcome}: {trial.why}", 160))
    return f'<path class="p x {colour}" d="M{x - 3:.1f} 9l6 6m0-6l-6 6"><title>{text}</title></path>'


def thin(trials: Sequence[Trial], most: int) -> list[Trial]:
    """At most about `most` of the trials: every one that was the best so far, the rest at even distances in the order
    of the trials, failures as often as they are."""
    if len(trials) <= most:
        return list(trials)
    kept = [t for t in trials if t.best]
    if len(kept) > most // 2:
        kept = [kept[i * len(kept) // (most // 2)] for i in range(most // 2 - 1)] + [kept[-1]]
    numbers = {t.number for t in kept}
    rest = [t for t in trials if t.number not in numbers]
    room = max(1, most - len(kept))
    even = [rest[i * len(rest) // room] for i in range(min(room, len(rest)))]
    return sorted([*kept, *even], key=lambda t: t.number)
