"""`gemmify list`: the lowerings and the networks of the zoo."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

from .. import report

FORMULAS = ("key", "gemm", "workspace")
BEGIN, END = "<!-- catalogue -->", "<!-- end of the catalogue -->"
COLUMNS: tuple[report.Column, ...] = (
    ("lowering", "key", report.text),
    ("GEMM", "gemm", report.text),
    ("workspace, bytes", "workspace", report.text),
    ("layout", "layout", report.text),
    ("needs", "needs", report.text),
    ("source", "source", report.text),
)


def execute() -> dict[str, Any]:
    """{"lowerings": [{key, summary, gemm, workspace, layout, needs, source}], "zoo": [names]}."""
    from ..threads import import_tvm

    import_tvm(compiler=True)
    from .. import zoo

    return {"lowerings": lowerings(), "zoo": list(zoo.ZOO)}


def lowerings() -> list[dict[str, str]]:
    """The catalogue, a row a lowering, as plain text."""
    from lowering import catalogue
    from lowering.conditions import conditions

    return [
        {
            "key": key,
            "summary": low.summary,
            "gemm": low.gemm_formula,
            "workspace": low.workspace_formula,
            "layout": low.layout,
            "needs": "; ".join(conditions(low)) or "nothing: every layer",
            "source": low.source,
        }
        for key, low in catalogue().items()
    ]


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of `lowerings` in Markdown, as it stands in lowering/README.md."""
    lines = ["| " + " | ".join(heading for heading, _, _ in COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        cells = [row[name].replace("|", "\\|") for _, name, _ in COLUMNS]
        cells = [f"`{cell}`" if name in FORMULAS else cell for cell, (_, name, _) in zip(cells, COLUMNS, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_catalogue(readme: str) -> str:
    """`readme` with the table of lowerings between its two marks as it is now."""
    before, mark, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert mark and end, f"the marks {BEGIN} and {END} are missing"
    from ..threads import import_tvm

    import_tvm(compiler=True)
    return f"{before}{BEGIN}\n{markdown(lowerings())}\n{END}{after}"


def blocks(rows: list[dict[str, str]], width: int) -> list[str]:
    """The catalogue for a terminal of `width` columns: a line a lowering, what else there is to say indented below."""
    key_width = max(len(row["key"]) for row in rows) + 2
    indent = " " * 4
    lines = []
    for row in rows:
        first = row["key"].ljust(key_width)
        lines += textwrap.wrap(row["summary"], width, initial_indent=first, subsequent_indent=" " * key_width)
        below = (
            f"GEMM {row['gemm']}, {row['layout']}; workspace in bytes: {row['workspace']}",
            f"needs {row['needs'].removesuffix(': every layer')}",
            row["source"],
        )
        for said in below:
            lines += textwrap.wrap(
                said, width, initial_indent=indent, subsequent_indent=2 * indent, break_on_hyphens=False
            )
    return lines


def show(result: dict[str, Any]) -> None:
    if sys.stdout.isatty():  # no terminal is wide enough for the table
        for line in blocks(result["lowerings"], max(40, report.console().width)):
            print(line)
    else:
        report.table("", (*COLUMNS[:1], ("what it is", "summary", report.text), *COLUMNS[1:]), result["lowerings"])
    print("\nzoo: " + ", ".join(result["zoo"]))


def show_markdown(result: dict[str, Any]) -> None:
    print(markdown(result["lowerings"]))
