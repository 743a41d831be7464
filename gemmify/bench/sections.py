"""Results as text and tables, for the terminal (rich) and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Section:
    """A table of a result: a title, headings, and rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def numeric(self, index: int) -> bool:
        """Whether a column holds numbers (and gaps), and is set flush right."""
        cells = [row[index] for row in self.rows if row[index] != "-"]
        return index > 0 and bool(cells) and all(cell[:1].isdigit() and "x" not in cell for cell in cells)


Part = str | Section


def rich_table(section: Section) -> Table:
    table = Table(title=section.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(section.columns):
        side: Literal["left", "right"] = "right" if section.numeric(index) else "left"
        table.add_column(heading, justify=side, overflow="fold", no_wrap=heading == "lowering")
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a layer's name may hold square brackets
    return table


def markdown_table(section: Section) -> str:
    marks = ["---:" if section.numeric(index) else "---" for index in range(len(section.columns))]
    rows = [list(section.columns), marks, *([cell.replace("|", "\\|") for cell in row] for row in section.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"**{section.title}**", "", *lines] if section.title else lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds >= 1e-4 else f"{seconds * 1e3:.4f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def gemm_text(row: Mapping[str, Any]) -> str:
    """The GEMM of a row as "m x n x k", with how often it is done."""
    gemm = "x".join(map(str, row["gemm"])) if row.get("gemm") else "-"
    return f"{row['count']} of {gemm}" if row.get("count", 1) > 1 else gemm
