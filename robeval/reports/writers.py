"""One table, five forms: terminal, Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import json
import math
import re
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from robeval.core.errors import unknown
from robeval.reports.stats import Rate
from robeval.reports.tables import Cell, Table, frame_of

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
BREAK = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def one_line(value: str) -> str:
    """Text without line breaks, control codes and marks that turn the direction of writing."""
    return CONTROL.sub("", BREAK.sub(" ", value))


def text(cell: Cell, digits: int = 4) -> str:
    """A cell for people."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        if not math.isfinite(cell):
            return "-"
        tiny = 0 < abs(cell) < 0.5 * 10**-digits  # a p-value or a distance that would be printed as nothing
        return f"{cell:.1e}" if tiny else f"{cell:.{digits}f}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return one_line(str(cell))


def terminal(table: Table) -> str:
    """Aligned columns for a screen; a table of few rows and many columns is turned on its side."""
    width = max(Console().width, 100)
    grid = [table.columns, *([text(row.get(c)) for c in table.columns] for row in table.rows)]
    needed = sum(max(len(line[k]) for line in grid) + 2 for k in range(len(table.columns)))
    whole = [not any(isinstance(row.get(c), str) for row in table.rows) for c in table.columns]  # numbers never break
    grid[0] = [one_line(heading) for heading in grid[0]]
    if needed > width and len(table.rows) <= 4:
        grid = [list(line) for line in zip(*grid, strict=True)]
        whole = [False] * len(grid[0])
    elif needed > width:
        rows = [max((len(cell) for cell in column), default=0) for column in zip(*grid[1:], strict=True)]
        grid[0] = [h.replace(" ", "\n") if len(h) > w else h for h, w in zip(grid[0], rows, strict=True)]
    shown = RichTable(title=one_line(table.title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for k, heading in enumerate(grid[0]):
        shown.add_column(heading, justify="left" if k == 0 else "right", overflow="fold", no_wrap=whole[k])
    for line in grid[1:]:
        shown.add_row(*line)
    buffer = StringIO()
    console = Console(file=buffer, width=width, highlight=False, markup=False)
    console.print(shown)
    for note in table.notes:
        console.print(one_line(note), style="dim")
    return buffer.getvalue()


def markdown(table: Table) -> str:
    """A Markdown table with the notes below it."""

    def escape(value: str) -> str:
        safe = re.sub(r"([\\`|])", r"\\\1", one_line(value))
        return safe.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]&#40;")

    lines = ["| " + " | ".join(escape(c) for c in table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(escape(text(row.get(c))) for c in table.columns) + " |" for row in table.rows]
    return "\n".join([f"**{escape(table.title)}**", "", *lines, "", *(f"- {escape(n)}" for n in table.notes)]) + "\n"


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def latex_text(value: str) -> str:
    """Any text as LaTeX that prints it and does nothing else."""
    escaped = "".join(LATEX.get(c, c) for c in one_line(value))
    return escaped.replace(r"\textless{}=", r"$\leq$").replace(r"\textgreater{}=", r"$\geq$")


def latex(table: Table, ci: str = "bracket") -> str:
    """A booktabs table with siunitx columns for plain numbers (needs both packages).

    Args:
        table: What to write.
        ci: Interval of rates: ``bracket``, ``pm`` or ``none``.

    Raises:
        UsageError: unknown ``ci``.
    """
    if ci not in ("bracket", "pm", "none"):
        raise unknown("--ci", ci, ("bracket", "pm", "none"))

    def write(cell: Cell) -> str:
        if isinstance(cell, Rate) and cell.n:
            low, high = (100 * end for end in cell.interval)
            value = f"{100 * cell.value:.1f}"
            if ci == "none":
                return value
            return (
                f"{{{value} [{low:.1f}, {high:.1f}]}}"
                if ci == "bracket"
                else f"{{{value} $\\pm$ {(high - low) / 2:.1f}}}"
            )
        number = isinstance(cell, float) and math.isfinite(cell)
        return text(cell) if number else f"{{{latex_text(text(cell))}}}"

    frame = frame_of(table, write)
    kinds = ["l" if all(c.startswith("{") for c in frame[name]) else "S" for name in frame.columns]
    frame.columns = [latex_text(c) for c in table.columns]  # siunitx=True puts headings into braces
    body: str = frame.style.hide(axis="index").to_latex(hrules=True, siunitx=True, column_format="".join(kinds))
    notes = "\n".join(f"% {one_line(n)}" for n in [table.title, *table.notes])
    return f"{notes}\n{body}"


def csv(table: Table) -> str:
    """One column per number: a rate becomes value, k, n, low and high. Text that a spreadsheet would run is quoted."""

    def guard(cell: Any) -> Any:
        if not isinstance(cell, str):
            return cell
        clean = one_line(cell)
        risky = (cell.startswith(FORMULA) or clean.lstrip().startswith(FORMULA)) and len(clean) > 1
        return f"'{clean}" if risky else clean

    import pandas as pd

    rows = []
    for row in table.rows:
        flat: dict[str, Any] = {}
        for column in table.columns:
            cell, column = row.get(column), guard(column)
            if isinstance(cell, Rate):
                low, high = cell.interval
                flat |= {column: cell.value, f"{column} k": cell.k, f"{column} n": cell.n}
                flat |= {f"{column} low": low, f"{column} high": high}
            else:
                flat[column] = guard(cell)
        rows.append(flat)
    return str(pd.DataFrame(rows).to_csv(index=False))


def write(table: Table, form: str, ci: str = "bracket") -> str:
    """A table in the form of that name.

    Raises:
        UsageError: no such form.
    """
    forms = {"terminal": terminal, "markdown": markdown, "csv": csv}
    if form == "latex":
        return latex(table, ci)
    if form == "json":
        return json.dumps(table.to_json(), indent=2) + "\n"
    if form not in forms:
        raise unknown("format", form, [*forms, "latex", "json"])
    return forms[form](table)
