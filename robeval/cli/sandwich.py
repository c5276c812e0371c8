"""``robeval sandwich``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robeval.cli.common import OUTPUT, Json, Quiet, note, set_quiet

EXAMPLES = (
    "**Examples**\n\n    robeval sandwich runs\n\n"
    "    robeval sandwich runs --norm linf --eps 1/255,2/255 --format latex --out sandwich.tex --images images.csv\n\n"
    "Exit code 8: an attack landed inside a proof."
)


def sandwich(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or folders of runs.", metavar="RUNS")],
    norm: Annotated[str | None, typer.Option("--norm", help="Only proofs in this norm.")] = None,
    eps: Annotated[
        str | None, typer.Option("--eps", help="Radii of the rows: 1/255,2/255. Those of the runs by default.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="terminal, markdown, latex, csv or json.", rich_help_panel=OUTPUT)
    ] = "terminal",
    ci: Annotated[
        str, typer.Option("--ci", help="Intervals in LaTeX: bracket, pm or none.", rich_help_panel=OUTPUT)
    ] = "bracket",
    out: Annotated[str | None, typer.Option("--out", help="Write to this file.", rich_help_panel=OUTPUT)] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", help="Write both ends of every image to this CSV file.", rich_help_panel=OUTPUT),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put what is proven below what was attacked: robust accuracy lies between the two.

    An image is certified by the best of all proofs and broken by the best of all attacks on the same weights and data.
    """
    set_quiet(quiet or json)
    form = "json" if json else form
    from json import dumps

    from robeval.core.numbers import radii
    from robeval.reports.sandwich import (
        estimates_table,
        images_csv,
        insist,
        sandwich_table,
        sandwiches,
        smoothed_table,
    )
    from robeval.reports.writers import write
    from robeval.store.files import cannot_write, write_whole
    from robeval.store.find import runs as find_runs

    stores = [s for text in runs for s in find_runs(text)]
    found = sandwiches(stores, norm)
    asked = radii(eps, found[0].norm) if eps else []
    for store in stores:
        for warning in store.warnings:
            note(warning)
    if images:
        try:
            write_whole(Path(images), images_csv(found).encode())
        except OSError as error:
            raise cannot_write(error, Path(images)) from None
        note(images)
    insist(found)
    tables = {
        "sandwich": sandwich_table(found, asked),
        "estimates": estimates_table(found),
        "smoothed": smoothed_table(found, asked),
    }
    tables = {name: table for name, table in tables.items() if table.rows}
    if form == "csv":  # one table a file; the other two have their own runs
        tables = {"sandwich": tables["sandwich"]}
    if form == "json":
        text = dumps({name: table.to_json() for name, table in tables.items()}, indent=2) + "\n"
    else:
        text = "\n".join(write(table, form, ci) for table in tables.values())
    if out:
        try:
            write_whole(Path(out), text.encode())
        except OSError as error:
            raise cannot_write(error, Path(out)) from None
        note(out)
    else:
        sys.stdout.write(text)
