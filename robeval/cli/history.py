"""``robeval history``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robeval.cli.common import OUTPUT, Json, Quiet, note, print_json, set_quiet
from robeval.core.errors import FileRefused, UsageError

EXAMPLES = (
    "**Examples**\n\n    robeval history model.pt\n\n    robeval history standard.pt adv.pt betas --out history.png\n\n"
    "A dot marks the chosen epoch, a cross an epoch with warnings."
)


def history(
    trainings: Annotated[
        list[str], typer.Argument(help="Model files, training folders, logs, or folders of these.", metavar="MODEL...")
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Plot to this .png or .pdf, all logs as one .csv beside it."),
    ] = None,
    csv: Annotated[
        str | None, typer.Option("--csv", help="Write all logs as one table.", rich_help_panel=OUTPUT)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The course of trainings: accuracies, penalty, gradients and confidence after every epoch, from their logs."""
    set_quiet(quiet or json)
    form = Path(out).suffix.lower().removeprefix(".") if out else ""
    if out and form not in ("png", "pdf"):
        raise UsageError(f"--out {out} must end in .png or .pdf", code="A04")
    from robeval.reports import history as report
    from robeval.reports.writers import terminal
    from robeval.store.files import cannot_write, write_whole

    found = dict(pair for text in trainings for pair in report.logs(text))
    histories = [report.read(model, log, _chosen(model)) for model, log in found.items()]
    histories = report.distinct(histories, list(found))
    numbers = csv or (str(Path(out).with_suffix(".csv")) if out else None)
    files: dict[str, bytes] = {numbers: report.history_csv(histories).encode()} if numbers else {}
    if out:
        files[out] = report.draw(histories, form)
    for name, content in files.items():
        try:
            write_whole(Path(name), content)
        except OSError as error:
            raise cannot_write(error, Path(name)) from None
    table = report.history_table(histories)
    if json:
        print_json(table.to_json() | {"files": list(files)})
        return
    sys.stdout.write(terminal(table))
    for name in files:
        note(name)


def _chosen(model: Path) -> int:
    """The epoch whose weights the model file holds; 0 without one."""
    if not model.is_file() or model.suffix == ".csv":
        return 0
    from robeval.models.checkpoint import read

    try:
        spec = read(model).spec or {}
    except FileRefused as error:
        note(f"{model}: {error.what}")
        return 0
    return int(spec.get("recipe", {}).get("chosen_epoch", 0))
