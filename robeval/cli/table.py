"""``robeval table``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robeval.cli.common import OUTPUT, Quiet, note, set_quiet
from robeval.core.errors import UsageError, unknown

EXAMPLES = (
    "**Examples**\n\n    robeval table runs\n\n    robeval table runs --norm linf --format latex --out table.tex\n\n"
    "    robeval table runs/attack-model-1f2e3d4c --layout attacks\n\n    robeval table runs --layout bounds --norm l2"
)


def table(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or folders of runs.", metavar="RUNS")],
    form: Annotated[
        str, typer.Option("--format", help="terminal, markdown, latex, csv or json.", rich_help_panel=OUTPUT)
    ] = "terminal",
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="models (rows are models), attacks (one run in detail), bounds (each with its kind) or regularity.",
            rich_help_panel=OUTPUT,
        ),
    ] = "models",
    norm: Annotated[str | None, typer.Option("--norm", help="Only runs in this norm.")] = None,
    ci: Annotated[
        str, typer.Option("--ci", help="Intervals in LaTeX: bracket, pm or none.", rich_help_panel=OUTPUT)
    ] = "bracket",
    allow_undiagnosed: Annotated[
        bool,
        typer.Option("--allow-undiagnosed", help="Show attack runs without a diagnosis, marked with a dagger."),
    ] = False,
    out: Annotated[str | None, typer.Option("--out", help="Write to this file.", rich_help_panel=OUTPUT)] = None,
    quiet: Quiet = False,
) -> None:
    """Make a table from finished runs, from their records alone."""
    set_quiet(quiet)
    from robeval.reports.bounds import bounds_table
    from robeval.reports.diagnoses import diagnosed, insist_on_diagnosis, is_counterexamples
    from robeval.reports.regularity import regularity_table
    from robeval.reports.tables import attacks_table, models_table
    from robeval.reports.writers import write
    from robeval.store.files import cannot_write, write_whole
    from robeval.store.find import runs as find_runs

    stores = [s for text in runs for s in find_runs(text)]
    if not allow_undiagnosed and layout not in ("bounds", "regularity"):  # they say no robust accuracy
        insist_on_diagnosis(d for d in diagnosed(stores) if norm in (None, d.facts.norm))
    if layout == "models":
        texts = [write(models_table(stores, norm), form, ci)]
    elif layout == "attacks":
        chosen = [
            s for s in stores
            if s.manifest()["kind"] == "attack" and norm in (None, s.manifest()["threat"]["norm"])
            and not is_counterexamples(s.manifest())
        ]  # fmt: skip
        if form in ("json", "csv") and len(chosen) != 1:
            raise UsageError(f"--layout attacks as {form} takes one run, these are {len(chosen)}", code="T03")
        texts = [write(attacks_table(s, stores), form, ci) for s in chosen]
    elif layout == "bounds":
        texts = [write(bounds_table(stores, norm), form, ci)]
    elif layout == "regularity":
        texts = [write(regularity_table(stores), form, ci)]
    else:
        raise unknown("layout", layout, ("models", "attacks", "bounds", "regularity"))
    for store in stores:
        for warning in store.warnings:
            note(warning)
    if out:
        try:
            write_whole(Path(out), "\n".join(texts).encode())
        except OSError as error:
            raise cannot_write(error, Path(out)) from None
        note(out)
    else:
        sys.stdout.write("\n".join(texts))
