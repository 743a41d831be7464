"""The picture of `gemmify bench --suite lowerings`: every point has its place and its label."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from gemmify import cli
from gemmify.bench import labels, picture
from gemmify.errors import InputError
from lowering import LOWERINGS


def _result(keys: list[str], names: tuple[str, ...] = ("net:a",), counts: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """A result with points that lie close together, some of them in one place, some without workspace."""
    drawn = random.Random(3)
    problem = {"n": 1, "c": 8, "m": 8, "size": (9, 9), "kernel": (3, 3), "groups": 1}
    problem.update({name: (1, 1) for name in ("stride", "pad_before", "pad_after", "dilation")})
    rows = []
    for name in names:
        for threads in counts:
            for key in keys:
                best = drawn.choice([1e-3, 1.02e-3, 1.4e-3, 9e-3]) / threads
                workspace = drawn.choice([0, 0, 40_000, 3_000_000, 3_100_000])
                row: dict[str, Any] = {"name": name, "lowering": key, "threads": threads, "best": best, "right": True}
                rows.append({**row, "workspace_bytes": workspace, "peak_share": 0.8e-3 / threads / best})
    layers = [{"name": name, "problem": problem, "macs": 10**8} for name in names]
    machine = {"cpu": "Some CPU"}
    return {"threads": list(counts), "rows": rows, "layers": layers, "machine": machine, "date": "2026-01-02T03"}


def test_every_lowering_is_named_in_every_panel(tmp_path: Path) -> None:
    keys = list(LOWERINGS)
    path = picture.write_picture(_result(keys, ("net:a", "net:b", "net:c")), tmp_path / "p.svg")
    svg = path.read_text()
    named = re.findall(r"<!-- (.*?) -->", svg)
    for key in keys:
        assert named.count(key) == 6, f"{key}: three layers on one and two threads"
    assert named.count("none") == 6, "no workspace has a place of its own"
    assert sum("net:b" in text and "2 threads" in text for text in named) == 1
    again = picture.write_picture(_result(keys, ("net:a", "net:b", "net:c")), tmp_path / "q.svg")
    assert again.read_text() == svg


def test_labels_cover_neither_one_another_nor_a_point() -> None:
    result = _result(list(LOWERINGS))
    figure = picture.draw(result)
    figure.canvas.draw()  # an annotation finds its place when it is drawn
    renderer = figure.canvas.get_renderer()
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert len(panels) == 2
    for ax in panels:
        texts = [t for t in ax.texts if t.get_text() in LOWERINGS]
        assert len(texts) == len(LOWERINGS)
        boxes = [Text.get_window_extent(t, renderer) for t in texts]  # that of an annotation holds its line, too
        points = [ax.transData.transform(line.get_xydata()[0]) for line in ax.lines if line.get_marker() == "o"]
        frame = ax.get_window_extent(renderer)
        for i, box in enumerate(boxes):
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert not any(box.contains(*point) for point in points)


@pytest.mark.parametrize("seed", range(4))
def test_arrange_finds_room_where_there_is_some(seed: int) -> None:
    drawn = random.Random(seed)
    points = [(drawn.uniform(100, 130), drawn.uniform(100, 130)) for _ in range(20)]
    sizes = [(drawn.uniform(20, 60), 9.0) for _ in points]
    wall = (0.0, 140.0, 400.0, 150.0)
    centres = labels.arrange(points, sizes, (0.0, 0.0, 400.0, 300.0), [wall])
    boxes = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in zip(centres, sizes, strict=True)]
    for i, (left, bottom, right, top) in enumerate(boxes):
        assert left >= 0 and bottom >= 0 and right <= 400 and top <= 300
        for l, b, r, t in [*boxes[:i], wall, *((x, y, x, y) for x, y in points)]:
            assert not (left < r and l < right and bottom < t and b < top)


def test_front_holds_what_no_other_beats_in_both() -> None:
    rows = [
        {"lowering": name, "workspace_bytes": workspace, "best": best}
        for name, workspace, best in (("a", 0, 5.0), ("b", 0, 4.0), ("c", 10, 4.0), ("d", 20, 3.0), ("e", 30, 3.5))
    ]
    assert [row["lowering"] for row in picture.front(rows)] == ["b", "d"]


def test_a_layer_without_workspace_at_all_and_a_png(tmp_path: Path) -> None:
    result = _result(["direct"], counts=(1,))
    for row in result["rows"]:
        row["workspace_bytes"] = 0
    path = picture.write_picture(result, tmp_path / "p.PNG")
    assert path.read_bytes().startswith(b"\x89PNG")
    result["rows"] = [{**row, "right": False} for row in result["rows"]]
    with pytest.raises(InputError, match="at least one lowering that was timed"):
        picture.draw(result)


def test_what_cannot_be_drawn_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"written as \.svg or \.png; 'p\.gif' is neither"):
        picture.check_picture("p.gif")
    with pytest.raises(InputError, match="there is no folder"):
        picture.check_picture(tmp_path / "none" / "p.svg")
    assert cli.main(["bench", "--suite", "gemm", "--picture", "p.svg"]) == 2
    assert "--picture belongs to --suite lowerings" in capfd.readouterr().err
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--suite", "lowerings", "--picture", "p.svg"]) == 2
    assert "pip install 'gemmify[report]'" in capfd.readouterr().err


def test_one_panel_holds_its_title_and_names_its_times() -> None:
    result = _result(["direct", "im2row", "mec"], counts=(1,))
    result["machine"] = {"cpu": "A processor with a very long name (R) CPU @ 2.20GHz"}
    figure = picture.draw(result)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    (ax,) = (ax for ax in figure.axes if ax.get_title())
    for text in (figure._suptitle, ax.title):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, text.get_text()
    low, high = ax.get_ylim()
    ticks = [
        (t, l.get_text())
        for which in (False, True)
        for t, l in zip(ax.yaxis.get_ticklocs(minor=which), ax.yaxis.get_ticklabels(minor=which), strict=True)
    ]
    assert len([name for at, name in ticks if low <= at <= high and name]) > 2
