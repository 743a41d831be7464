"""Labels beside the points of a plot, where they cover neither one another nor a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""

DIRECTIONS = 16
STEP_PIXELS = 7.0
MARGIN_PIXELS = 1.5


def place_labels(ax: Any, labels: Sequence[tuple[str, float, float, str]], renderer: Any) -> None:
    """Write each label (text, x, y, colour; x and y in data coordinates) on `ax`, as near to its point as there is
    room beside the points and lines, with a thin line to the point where it had to move away. The layout of the figure
    must be final."""
    sizes = [_extent(ax, text, renderer) for text, *_ in labels]
    points = [tuple(ax.transData.transform((x, y))) for _, x, y, _ in labels]
    frame = ax.get_window_extent(renderer)
    lines = [box for line in ax.lines for box in _line_boxes(ax, line)]
    centres = arrange(points, sizes, (frame.x0, frame.y0, frame.x1, frame.y1), lines)
    back = ax.transData.inverted()
    for (text, x, y, colour), centre, (px, py), box in zip(labels, centres, points, sizes, strict=True):
        far = math.hypot(centre[0] - px, centre[1] - py) > max(box) / 2 + 2 * STEP_PIXELS
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2} if far else None
        ax.annotate(
            text, (x, y), xytext=back.transform(centre), color=colour, ha="center", va="center", arrowprops=line
        )


def _line_boxes(ax: Any, line: Any) -> list[Box]:
    """Small boxes along a line that is drawn, which a label must not cover."""
    corners = [tuple(corner) for corner in line.get_transform().transform(line.get_xydata())]
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / STEP_PIXELS))
        for x, y in ((x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)):
            boxes.append((x - 1, y - 1, x + 1, y + 1))
    return boxes


def _extent(ax: Any, text: str, renderer: Any) -> tuple[float, float]:
    probe = ax.text(0.5, 0.5, text, transform=ax.transAxes)
    box = probe.get_window_extent(renderer)
    probe.remove()
    return box.width, box.height


def arrange(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    obstacles: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """Centres of boxes of `sizes`, one a point, in the frame, clear of all points, of `obstacles` and of one another
    where there is room: each the nearest free of a spiral of places, the points with the closest neighbours first."""

    def crowd(i: int) -> float:
        return min((math.dist(points[i], other) for j, other in enumerate(points) if j != i), default=0.0)

    taken: list[Box] = [*((x - 3, y - 3, x + 3, y + 3) for x, y in points), *obstacles]
    found: dict[int, tuple[float, float]] = {}
    for i in sorted(range(len(points)), key=lambda i: (crowd(i), points[i])):
        places = _spiral(points[i], sizes[i], frame)
        centre = next((c for c in places if _clear(_box(c, sizes[i]), taken, frame)), places[0])
        found[i] = centre
        taken.append(_box(centre, sizes[i]))
    return [found[i] for i in range(len(points))]


def _spiral(point: tuple[float, float], box: tuple[float, float], frame: Box) -> list[tuple[float, float]]:
    """Places round a point, the near ones first: right, then all directions at growing distances."""
    reach = math.hypot(frame[2] - frame[0], frame[3] - frame[1])
    places = []
    for ring in range(1, int(reach / STEP_PIXELS)):
        for turn in range(DIRECTIONS):
            angle = 2 * math.pi * turn / DIRECTIONS
            away = ring * STEP_PIXELS
            x = point[0] + math.cos(angle) * (box[0] / 2 + away)
            y = point[1] + math.sin(angle) * (box[1] / 2 + away)
            places.append((x, y))
    return places


def _box(centre: tuple[float, float], box: tuple[float, float]) -> Box:
    (x, y), (width, height) = centre, box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _clear(box: Box, taken: Sequence[Box], frame: Box) -> bool:
    left, bottom, right, top = box
    if left < frame[0] or bottom < frame[1] or right > frame[2] or top > frame[3]:
        return False
    m = MARGIN_PIXELS
    return not any(left - m < r and l - m < right and bottom - m < t and b - m < top for l, b, r, t in taken)
