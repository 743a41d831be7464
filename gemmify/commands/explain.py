"""`gemmify explain MODEL`: for each layer every lowering of the catalogue, chosen, or why not; compiles nothing."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

from .. import report

TABLE_WIDTH = 112
"""A narrower terminal would break the cells of the table."""
WHOLE_NAMES = 6
"""Equal layers are named one by one up to so many."""


def execute(model: str, layer: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """`explain.explain_model` with the keyword `options`; see there for what it returns."""
    from ..threads import check_threads, import_tvm

    if options.get("threads") is not None:
        check_threads(options["threads"])
    import_tvm(compiler=True)
    from ..explain import explain_model

    return explain_model(model, layer=layer, **options)


def show(result: dict[str, Any]) -> None:
    groups = result["layers"]
    count = sum(len(group["names"]) for group in groups)
    timed = any(candidate.get("measured") for group in groups for candidate in group["candidates"])
    unit = result.get("unit", "cycles")
    named = tuple((unit, *column[1:]) if column[1] == "cycles" else column for column in COLUMNS)
    columns = named if timed else tuple(column for column in named if column[1] != "measured")
    for index, group in enumerate(groups, 1):
        usable = [candidate for candidate in group["candidates"] if "gemms" in candidate]
        print(_title(index, len(groups), group))  # a table's own title would wrap at the table's width
        if sys.stdout.isatty() and (width := report.console().width) < TABLE_WIDTH:
            print("\n".join(narrow(usable, width, columns)))
        else:
            report.table("", columns, usable)
        for why, keys in _refused(group["candidates"]).items():
            print(f"  {', '.join(keys)}: {why}")
        print()
    same = "" if count == len(groups) else f" of {len(groups)} kinds (equal layers are shown once)"
    bound = "unbounded" if result["max_workspace"] is None else f"at most {report.size(result['max_workspace'])}"
    loosest = max((group["max_error"] for group in groups), default=0.0)
    layers = "1 layer" if count == 1 else f"{count} layers"
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    print(f"{result['model']}: {layers}{same}; workspace of {'a GPU' if unit == 'ns' else threads}, {bound}")
    print(f"error expected relative to a layer's largest output, at most {loosest:.1e}")
    said = (
        "no time was measured"
        if not timed
        else "measured is the fastest trial of each in the logs; the choice rests on finals, in turns"
    )
    cores = "the whole GPU" if unit == "ns" else "all cores"
    print(f"{unit} are modelled, {cores} at work, and only compare candidates: {said}")


def narrow(candidates: list[dict[str, Any]], width: int, columns: tuple[report.Column, ...] | None = None) -> list[str]:
    """The table for a terminal of `width` columns: of each candidate the numbers, then GEMM and verdict indented."""
    numbers = [column for column in columns or COLUMNS if column[1] not in ("gemms", "verdict")]
    cells = [[heading for heading, _, _ in numbers]]
    cells += [[written(candidate.get(key)) for _, key, written in numbers] for candidate in candidates]
    first, *rest = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = []
    for row, candidate in zip(cells, [None, *candidates], strict=True):
        lines.append("  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], rest, strict=True))]))
        said = f"GEMM {_gemms(candidate['gemms']) or 'none'}; {candidate['verdict']}" if candidate else "GEMM; verdict"
        lines += textwrap.wrap(said, width, initial_indent="    ", subsequent_indent=" " * 8, break_on_hyphens=False)
    return lines


def _title(index: int, groups: int, group: dict[str, Any]) -> str:
    names = group["names"]
    rest = len(names) - WHOLE_NAMES
    shown = ", ".join(names[:WHOLE_NAMES]) + (f" and {rest} more" if rest > 0 else "")
    many = f" ({len(names)} equal layers)" if len(names) > 1 else ""
    number = f"{index}/{groups}  " if groups > 1 else ""
    chosen = "" if group["lowering"] is None else f"{group['lowering']}: "
    what = f"{group['op']} {report.problem_text(group['problem'])}, {report.count(group['macs'])} MACs"
    return f"{number}{shown}{many}: {what}\n{chosen}{group['why']}"


def _gemms(gemms: Any) -> str:
    if not gemms:
        return ""
    several = [(f"{g['count']} of " if g["count"] > 1 else "") + f"{g['m']}x{g['n']}x{g['k']}" for g in gemms]
    return several[0] + (f" and {len(several) - 1} more" if len(several) > 1 else "")


def _refused(candidates: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The lowerings that do not apply, by reason."""
    refused: dict[str, list[str]] = {}
    for candidate in candidates:
        if "gemms" not in candidate:
            refused.setdefault(candidate["verdict"], []).append(candidate["key"])
    return refused


COLUMNS: tuple[report.Column, ...] = (
    ("lowering", "key", report.text),
    ("GEMM m x n x k", "gemms", _gemms),
    ("MACs", "macs", report.count),
    ("workspace", "workspace_bytes", report.size),
    ("weights", "weight_bytes", report.size),
    ("cycles", "cycles", report.count),
    ("error", "error", report.error),
    ("measured", "measured", lambda seconds: report.duration(seconds) if seconds else ""),
    ("verdict", "verdict", report.text),
)
