"""What the command line shows: tables for people, JSON for programs, one line a stage while it compiles."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .export import write_text

if TYPE_CHECKING:
    from rich.console import Console

Column = tuple[str, str, Callable[[Any], str]]
"""Heading, key of the row, and how a value is written."""


def text(value: Any) -> str:
    """A value for a table cell; nothing for None."""
    return "" if value is None else str(value)


def count(value: Any) -> str:
    """A large number with a unit of thousands: 1200000 -> "1.20 M"."""
    number = float(value or 0)
    for unit in ("", " k", " M", " G", " T"):
        if abs(number) < 1000 or unit == " T":
            return f"{number:.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    raise AssertionError("unreachable")


def size(value: Any) -> str:
    """Bytes with a binary unit: 2097152 -> "2.0 MiB"."""
    number = float(value or 0)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")


def duration(seconds: Any) -> str:
    """Seconds in the unit that reads best."""
    value = float(seconds)
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def share(value: Any) -> str:
    return f"{100 * float(value or 0):.1f} %"


def ratio(value: Any) -> str:
    """A ratio in a few digits: "1.03", "12.3", "430"."""
    number = float(value)
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"


def error(value: Any) -> str:
    """A relative error in two digits: "1.2e-06"."""
    return f"{float(value):.1e}"


def gemm(value: Any) -> str:
    """`[m, n, k]` as "m x n x k"; nothing where the layer is no GEMM."""
    return " x ".join(str(v) for v in value) if value else ""


def console() -> Console:
    """A rich console on the standard output; on a pipe so wide that nothing is cut."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with 1; a reader that has seen enough is no failure

    return Pipe() if sys.stdout.isatty() else Pipe(width=1000)


def table(title: str, columns: Sequence[Column], rows: Iterable[dict[str, Any]]) -> None:
    """Print `rows` as a table; a row without a column's key leaves that cell empty."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    numeric = {count, size, duration, share, error}
    for heading, _, written in columns:
        # A key is there to be found and copied whole.
        side: Literal["left", "right"] = "right" if written in numeric else "left"
        made.add_column(heading, justify=side, overflow="fold", no_wrap=heading == "lowering")
    for row in rows:
        # Text, not markup: a layer name may hold square brackets.
        made.add_row(*(Text(written(row[key]) if key in row else "") for _, key, written in columns))
    console().print(made)


WINDOW = (("s", "stride", 1), ("p", "pad_before", 0), ("d", "dilation", 1), ("+", "output_padding", 0))
"""How a layer's window is written: letter, field, the value that is left out."""


def problem_text(problem: Any) -> str:
    """A problem (as its dataclass's dict) in one short line: "1x64x56x56 -> 64, 3x3 p1", the defaults left out."""
    if not isinstance(problem, dict):
        return text(problem)
    if "kernel" not in problem:
        return f"{problem['n']}x{problem['c']} -> {problem['m']}"
    sizes = "x".join(str(v) for v in (problem["n"], problem["c"], *problem["size"]))
    parts = [f"{sizes} -> {problem['m']}, " + "x".join(map(str, problem["kernel"]))]
    for letter, name, plain in WINDOW:
        values = problem.get(name, ())
        if any(v != plain for v in values):
            parts.append(letter + (str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))))
    if problem["groups"] > 1:
        parts.append(f"g{problem['groups']}")
    return " ".join(parts)


LAYER_COLUMNS: tuple[Column, ...] = (
    ("layer", "name", text),
    ("op", "op", text),
    ("problem", "problem", problem_text),
    ("lowering", "lowering", text),
    ("GEMM m x n x k", "gemm", gemm),
    ("count", "count", text),
    ("MACs", "macs", count),
    ("workspace", "workspace_bytes", size),
    ("weights", "weight_bytes", size),
    ("reason", "reason", text),
)


def layers_table(layers: Sequence[dict[str, Any]]) -> None:
    """The table of layers -> lowering that `compile` ends with."""
    table(f"{len(layers)} layers", LAYER_COLUMNS, layers)


def coverage_line(tuning: dict[str, Any]) -> None:
    """How many layers a tuning log settled (`tuning.choice.coverage`), in one line."""
    if not tuning:
        return
    layers, by_log = tuning["layers"], tuning["tuned"]
    said = [f"{by_log} of {layers} layers tuned"]
    if by_log:
        kept = f"{tuning['kept']} keep the default; " if tuning["kept"] else ""
        said[0] += f" ({kept}log {', '.join(tuning['logs'])})"
    said += [f"{tuning[key]} by the {key}" for key in ("model",) if tuning[key]]
    said += [f"{tuning['planned']} as planned"] if tuning["planned"] else []
    if unused := sum(tuning["unused"].values()):
        said.append(f"{unused} records made for something else")
    hint = "" if by_log or not tuning["model"] or tuning["logs"] is None else "; `gemmify tune` measures what is best"
    print(", ".join(said) + hint)


def memory_line(memory: dict[str, int]) -> None:
    """The memory of a network in one line."""
    where = {"workspace": " (in the arena)", "kernels": " (scratch inside kernels)"}
    if memory:
        kinds = [f"{name} {size(value)}{where.get(name, '')}" for name, value in memory.items()]
        peak = sum(value for name, value in memory.items() if name != "workspace")
        print(f"memory: {', '.join(kinds)}; at most {size(peak)} in a run")


def emit(result: dict[str, Any], where: str | None, show: Callable[[dict[str, Any]], None]) -> None:
    """Give `result` to the user: `show` prints it; with `where` a file it is written there as JSON too.

    `where` "-" prints the JSON on the standard output and nothing else.
    """
    if where is None:
        return show(result)
    written = json.dumps(result, indent=1, default=_plain) + "\n"
    if where == "-":
        sys.stdout.write(written)
        return None
    show(result)
    write_text(where, written)
    return None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    return str(value)


class Progress:
    """Tells on stderr which stage of a compilation ended, and after how long: `progress(stage, seconds)`.

    On a terminal a spinner shows that the work goes on; on a pipe each stage is one plain line. Use as a context.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._status: Any = None
        self._console: Any = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            self._console = Console(stderr=True)
            self._status = self._console.status("compiling")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, stage: str, seconds: float) -> None:
        if self._quiet:
            return
        line = f"{stage:<12} {duration(seconds)}"
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)
