"""``robeval curve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robeval.cli.common import OUTPUT, Json, Quiet, note, print_json, set_quiet
from robeval.core.errors import UsageError

EXAMPLES = (
    "**Examples**\n\n    robeval curve runs --norm l2\n\n"
    "    robeval curve runs/attack-a-1f2e3d4c runs/attack-b-5a6b7c8d --out curve.pdf\n\n"
    "Searches of the nearest image (deepfool and the like, without --eps) make the curve tight."
)


def curve(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or folders of runs.", metavar="RUNS")],
    norm: Annotated[str | None, typer.Option("--norm", help="Only runs in this norm.")] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="Plot to this .png or .pdf, its numbers beside it.", rich_help_panel=OUTPUT),
    ] = None,
    csv: Annotated[
        str | None,
        typer.Option("--csv", help="Write model, eps, robust, n, low, high of every step.", rich_help_panel=OUTPUT),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Robust accuracy against every eps, from the smallest adversarial distance found for each image.

    An upper bound. Runs of one model on the same images are merged; several models give several curves.
    """
    set_quiet(quiet or json)
    form = Path(out).suffix.lower().removeprefix(".") if out else ""
    if out and form not in ("png", "pdf"):
        raise UsageError(f"--out {out} must end in .png or .pdf", code="A04")
    from robeval.reports.curve import curve_csv, curve_json, curve_table, curves, draw
    from robeval.reports.writers import terminal
    from robeval.store.files import cannot_write, write_whole
    from robeval.store.find import runs as find_runs

    stores = [s for text in runs for s in find_runs(text)]
    found = curves(stores, norm)
    for store in stores:
        for warning in store.warnings:
            note(warning)
    numbers = csv or (str(Path(out).with_suffix(".csv")) if out else None)
    files: dict[str, bytes] = {numbers: curve_csv(found).encode()} if numbers else {}
    if out:
        files[out] = draw(found, form)
    for name, content in files.items():
        try:
            write_whole(Path(name), content)
        except OSError as error:
            raise cannot_write(error, Path(name)) from None
    if json:
        print_json(curve_json(found) | {"files": list(files)})
        return
    if not files:
        sys.stdout.write(terminal(curve_table(found)))
        return
    for line in [line for c in found for line in c.notes] + list(files):
        note(line)
