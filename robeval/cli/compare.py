"""``robeval compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from robeval.cli.common import OUTPUT, Json, Quiet, note, print_json, set_quiet
from robeval.core.errors import FileRefused, UsageError, unknown

EXAMPLES = (
    "**Examples**\n\n    robeval compare runs/attack-adv-1f2e3d4c runs/attack-soar-5a6b7c8d\n\n"
    "    robeval compare RUN_A RUN_B --table images --format csv --out images.csv\n\n"
    "    robeval compare RUN_A RUN_B RUN_C"
)
#: Rows of the table of images that a screen shows before it says how to see the rest.
SHOWN = 20


def compare(
    runs: Annotated[list[str], typer.Argument(help="Two attack runs or more, over the same images.", metavar="RUNS")],
    form: Annotated[
        str, typer.Option("--format", help="terminal, markdown, latex, csv or json.", rich_help_panel=OUTPUT)
    ] = "terminal",
    which: Annotated[
        str,
        typer.Option(
            "--table", help="agreement, images, runs or all; for more than two runs pairs.", rich_help_panel=OUTPUT
        ),
    ] = "all",
    ci: Annotated[
        str, typer.Option("--ci", help="Intervals in LaTeX: bracket, pm or none.", rich_help_panel=OUTPUT)
    ] = "bracket",
    out: Annotated[str | None, typer.Option("--out", help="Write to this file.", rich_help_panel=OUTPUT)] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two attack runs image by image, or several pair by pair, with paired tests."""
    set_quiet(quiet or json)
    from robeval.reports.compare import Comparison
    from robeval.reports.pairs import LETTERS, Pairs
    from robeval.reports.writers import write
    from robeval.store.files import cannot_write, write_whole

    if not 2 <= len(runs) <= len(LETTERS):
        raise UsageError(f"a comparison takes 2 to {len(LETTERS)} runs, got {len(runs)}", code="T03")
    stores = [_one(run) for run in runs]
    tables = (Comparison(*stores) if len(stores) == 2 else Pairs(stores)).tables()
    if which not in ("all", *tables):
        raise unknown("table", which, ["all", *tables])
    chosen = tables if which == "all" else {which: tables[which]}
    form = "json" if json else form
    if form == "csv" and len(chosen) != 1:
        raise UsageError(
            f"csv takes one table, these are {len(chosen)}", code="T03", do=f"--table {next(iter(chosen))}"
        )
    if form == "json":
        document = {name: table.to_json() for name, table in chosen.items()}
        if not out:
            print_json(document)
            return
        from json import dumps

        text = dumps(document, indent=2) + "\n"
    else:
        if form == "terminal" and which == "all" and "images" in chosen:
            _shorten(chosen["images"])
        texts = [write(t, form, ci) for name, t in chosen.items() if t.rows or name != "images" or len(chosen) == 1]
        text = "\n".join(texts)
    for store in stores:
        for warning in store.warnings:
            note(warning)
    if out:
        try:
            write_whole(Path(out), text.encode())
        except OSError as error:
            raise cannot_write(error, Path(out)) from None
        note(out)
    else:
        sys.stdout.write(text)


def _one(path: str) -> Any:
    """The attack run at a path.

    Raises:
        FileRefused: none there.
        UsageError: several.
    """
    from robeval.reports.diagnoses import is_counterexamples
    from robeval.store.find import runs as find_runs

    stores = [s for s in find_runs(path) if s.manifest()["kind"] == "attack" and not is_counterexamples(s.manifest())]
    if not stores:
        raise FileRefused(f"no attack run in {path}", code="R05", do="give a folder that robeval attack made")
    if len(stores) > 1:
        names = ", ".join(s.folder.name for s in stores[:4])
        raise UsageError(f"{path} holds {len(stores)} attack runs, give one", code="T03", where=names)
    return stores[0]


def _shorten(table: Any) -> None:
    hidden = len(table.rows) - SHOWN
    if hidden > 0:
        table.rows = table.rows[:SHOWN]
        table.notes.append(f"and {hidden} more: --table images")
