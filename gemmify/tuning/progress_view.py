"""The live table of a tuning run, drawn from its state with rich."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..report import duration
from .progress_state import Row, State, span

FIXED_LINES = 8
"""Lines of a frame that are no layer: bar, network, trials, phase, heading, what was tried, and one to spare."""


def frame(state: State, now: float, height: int) -> RenderableType:
    """The whole picture at the clock's time `now`, at most `height` lines high: the layers with most to gain."""
    parts: list[RenderableType] = [_clock(state, now), _one_line(state.network()), _one_line(state.counts())]
    if state.phase:
        parts.append(_one_line(state.phase, "dim"))
    shown = max(0, height - FIXED_LINES)
    rows = sorted(state.rows, key=lambda row: (bool(row.why), -row.to_gain))
    if shown and rows:
        parts.append(_table(rows[:shown]))
        if len(rows) > shown:
            parts.append(_one_line(f"and {len(rows) - shown} layers with less to gain", "dim"))
    if state.trying:
        parts.append(_one_line(state.trying, "dim"))
    return Group(*parts[:height])


def _clock(state: State, now: float) -> RenderableType:
    if state.budget is None:
        return _one_line(f"{span(state.elapsed(now))} passed")
    left = max(0.0, state.budget - state.elapsed(now))
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(state.budget, 1e-9), completed=min(state.elapsed(now), state.budget), width=30)
    grid.add_row(bar, Text(f"{span(left)} left of {span(state.budget)}", no_wrap=True))
    return grid


def _one_line(text: str, style: str = "") -> Text:
    """Text, not markup: a title may hold square brackets."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    table.add_column("layer", no_wrap=True, overflow="ellipsis", min_width=12)
    for heading in ("x", "untuned", "now", "gain", "bound", "trials"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("lowering", no_wrap=True, overflow="ellipsis", min_width=8)
    for row in rows:
        cells = [row.view.title, str(row.view.count), *(_seconds(s) for s in (row.default, row.now))]
        cells += ["" if row.ratio is None else f"{row.ratio:.2f}", _share(row), str(row.trials)]
        tail = row.lowering + (f" ({row.why})" if row.why else "")
        table.add_row(*map(Text, [*cells, tail]), style="dim" if row.why else "")
    return table


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _share(row: Row) -> str:
    """How near the bound the layer is: 100 % cannot be beaten."""
    return f"{100 * row.view.bound_seconds / row.now:.0f} %" if row.view.bound_seconds and row.now else ""
