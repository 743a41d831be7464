"""Time against workspace, one point a lowering: the picture of a result of `run_lowerings`, as SVG or PNG."""

from __future__ import annotations

import importlib.util
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemmify.bench.labels import place_labels
from gemmify.errors import InputError
from gemmify.export import check_destination, write_file
from gemmify.report import problem_text, size

FORMATS = (".svg", ".png")
PANEL_INCHES = (5.6, 3.9)
LAYERS_A_ROW = 2  # a layer takes one panel a number of threads
FRONT, BEHIND, LIMIT = "#0b5394", "#8a8a8a", "#b45f06"
FONT = 7.5
LETTERS_AN_INCH = 12
"""Of the title, at most: a line is cut off where the figure ends."""
STYLE = {"font.size": FONT, "axes.titlesize": FONT + 1, "svg.hashsalt": "gemmify"}  # the same result, the same file


def check_picture(path: str | os.PathLike[str]) -> Path:
    """`path`, after a check that a picture can be made there: call it before the work, not after.

    Raises InputError for a name that ends in neither .svg nor .png, where matplotlib is not installed, and where no
    file can be written there.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"a picture is written as {' or '.join(FORMATS)}; {os.fspath(path)!r} is neither")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("a picture needs matplotlib, which is not installed: pip install 'gemmify[report]'")
    return check_destination(path)


def write_picture(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw `result` and write it, complete or not at all; errors as `check_picture`.

    One panel a layer and number of threads: milliseconds (best) over bytes of workspace, both logarithmic, with a place
    of its own for no workspace at all. The lowerings that no other beats in both are joined by a line; the dashed line
    is the time of the layer's multiply-adds at the peak that was measured beside it.
    """
    place = check_picture(path)
    from matplotlib import rc_context

    kind = place.suffix.lower()[1:]
    metadata = {"Date": None} if kind == "svg" else {}
    figure = draw(result)
    with rc_context(STYLE):
        return write_file(place, lambda file: figure.savefig(file, format=kind, metadata=metadata))


def draw(result: Mapping[str, Any]) -> Any:
    """The matplotlib Figure of `result`; InputError where no lowering gave a right result."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        return _draw(result)


def _draw(result: Mapping[str, Any]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = result["threads"]
    layers = [layer for layer in result["layers"] if _points(result, layer, counts)]
    if not layers:
        raise InputError("a picture needs at least one lowering that was timed, and there is none")
    across = min(LAYERS_A_ROW, len(layers))
    down = math.ceil(len(layers) / across)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * across * len(counts), height * down + 0.6), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(down, across * len(counts), squeeze=False)
    panels = []
    for index, layer in enumerate(layers):
        row, column = divmod(index, across)
        axes = grid[row][column * len(counts) : (column + 1) * len(counts)]
        span = _span([p for threads in counts for p in _points(result, layer, [threads])])
        panels += [(ax, _panel(ax, result, layer, t, span)) for ax, t in zip(axes, counts, strict=True)]
    for ax in grid.flat[len(layers) * len(counts) :]:
        ax.axis("off")
    title = (
        f"Time against workspace, one point a lowering; {result['machine']['cpu']}, {result['date'][:10]}",
        "joined: not beaten in both; dashed: the layer's multiply-adds at the measured peak",
    )
    letters = int(LETTERS_AN_INCH * width * across * len(counts))
    figure.suptitle("\n".join(textwrap.fill(line, letters) for line in title), fontsize=FONT + 2)
    canvas.draw()  # fixes the layout, on which the labels depend
    figure.set_layout_engine("none")
    for ax, texts in panels:
        place_labels(ax, texts, canvas.get_renderer())
    return figure


def _points(result: Mapping[str, Any], layer: Mapping[str, Any], counts: Sequence[int]) -> list[Mapping[str, Any]]:
    rows = (row for row in result["rows"] if row["name"] == layer["name"] and row["threads"] in counts)
    return [row for row in rows if row.get("right") and "best" in row]


def _span(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float, float]:
    """(place of no workspace, end of the x axis, start and end of the y axis) that the panels of a layer share."""
    some = [row["workspace_bytes"] for row in rows if row["workspace_bytes"]]
    low, high = (math.log2(min(some)), math.log2(max(some))) if some else (10.0, 20.0)
    times = [row["best"] * 1e3 for row in rows]
    times += [_limit(row) * 1e3 for row in rows]
    gap = max(1.5, (high - low) / 5)  # room for the labels
    return low - gap, high + gap, min(times) / 1.6, max(times) * 1.6


def _limit(row: Mapping[str, Any]) -> float:
    """Seconds of the layer's multiply-adds at the peak that was measured beside it."""
    return float(row["best"] * row["peak_share"])


def front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that no other beats in workspace and time both, by workspace."""
    found: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["workspace_bytes"], row["best"])):
        if not found or row["best"] < found[-1]["best"]:
            found.append(row)
    return found


def _panel(
    ax: Any, result: Mapping[str, Any], layer: Mapping[str, Any], threads: int, span: tuple[float, float, float, float]
) -> list[tuple[str, float, float, str]]:
    """Draw the points of one panel; the labels that are to be placed: (text, x, y, colour)."""
    from matplotlib.ticker import LogLocator

    zero, right, low, high = span
    rows = _points(result, layer, [threads])
    best = front(rows)
    edge = zero + (right - zero) / 15
    ax.set_yscale("log")
    ax.set_xlim(zero - (right - zero) / 12, right)
    ax.set_ylim(low, high)
    place = {id(row): (math.log2(row["workspace_bytes"]) if row["workspace_bytes"] else zero) for row in rows}
    if rows:
        ax.axhline(_limit(rows[0]) * 1e3, color=LIMIT, linestyle="--", linewidth=0.8)
    ax.axvline(edge, color="#cccccc", linewidth=0.8)
    ax.plot([place[id(r)] for r in best], [r["best"] * 1e3 for r in best], color=FRONT, linewidth=0.8, alpha=0.6)
    labels = []
    for row in rows:
        colour = FRONT if any(row is other for other in best) else BEHIND
        x, y = place[id(row)], row["best"] * 1e3
        ax.plot([x], [y], "o", color=colour, markersize=4)
        labels.append((row["lowering"], x, y, colour))
    ticks = [t for t in range(0, 61, 2) if edge < t < right]
    step = max(1, math.ceil(len(ticks) / 7))
    ax.set_xticks([zero, *ticks[::step]], ["none", *(size(2.0**t).replace(".0", "") for t in ticks[::step])])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    wide = high / low > 10  # more than a decade: not every digit has room for its label
    ax.yaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if not wide or f"{value:e}"[0] in "25" else "")
    ax.grid(True, which="major", linewidth=0.3)
    ax.set_xlabel("workspace")
    ax.set_ylabel("ms, best")
    ax.set_title(f"{layer['name']} ({problem_text(layer['problem'])}), {threads} thread{'s' * (threads > 1)}")
    return labels
