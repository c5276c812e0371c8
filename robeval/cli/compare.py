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
    "    robeval compare RUN_A RUN_B --table images --format csv --out images.csv"
)
#: Rows of the table of images that a screen shows before it says how to see the rest.
SHOWN = 20


def compare(
    run_a: Annotated[str, typer.Argument(help="An attack run, A.", metavar="RUN_A")],
    run_b: Annotated[str, typer.Argument(help="Another one over the same images, B.", metavar="RUN_B")],
    form: Annotated[
        str, typer.Option("--format", help="terminal, markdown, latex, csv or json.", rich_help_panel=OUTPUT)
    ] = "terminal",
    which: Annotated[
        str, typer.Option("--table", help="agreement, images, runs or all.", rich_help_panel=OUTPUT)
    ] = "all",
    ci: Annotated[
        str, typer.Option("--ci", help="Intervals in LaTeX: bracket, pm or none.", rich_help_panel=OUTPUT)
    ] = "bracket",
    out: Annotated[str | None, typer.Option("--out", help="Write to this file.", rich_help_panel=OUTPUT)] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two attack runs image by image, with a paired test."""
    set_quiet(quiet or json)
    from robeval.reports.compare import Comparison
    from robeval.reports.writers import write
    from robeval.store.files import cannot_write, write_whole

    comparison = Comparison(_one(run_a), _one(run_b))
    tables = comparison.tables()
    if which not in ("all", *tables):
        raise unknown("table", which, ["all", *tables])
    chosen = tables if which == "all" else {which: tables[which]}
    form = "json" if json else form
    if form == "csv" and len(chosen) != 1:
        raise UsageError(f"csv takes one table, these are {len(chosen)}", code="T03", do="--table agreement")
    if form == "json":
        document = {name: table.to_json() for name, table in chosen.items()}
        if not out:
            print_json(document)
            return
        from json import dumps

        text = dumps(document, indent=2) + "\n"
    else:
        if form == "terminal" and which == "all":
            _shorten(chosen["images"])
        texts = [write(t, form, ci) for name, t in chosen.items() if t.rows or name != "images" or len(chosen) == 1]
        text = "\n".join(texts)
    for store in (comparison.a.store, comparison.b.store):
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
    from robeval.store.find import runs as find_runs

    stores = [s for s in find_runs(path) if s.manifest()["kind"] == "attack"]
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
