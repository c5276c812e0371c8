"""``robeval transfer``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robeval.cli.common import OUTPUT, Device, Json, Quiet, note, print_json, progress, set_quiet
from robeval.cli.loading import BatchSize, Data, Runs, Seed, Split, Subset, load_both
from robeval.core.errors import UsageError, unknown

if TYPE_CHECKING:
    from robeval.reports.tables import Table

EXAMPLES = (
    "**Examples**\n\n    robeval transfer a.pt b.pt c.pt --attack pgd20 --eps 8/255\n\n"
    "    robeval transfer a.pt b.pt --attack fgsm --attack apgd-ce --eps 1/16,2/16 --table transfer\n\n"
    "The runs are attack runs of the targets: `robeval table`, `verify` and `curve` read them too."
)
FORMS = ("terminal", "markdown", "latex", "csv", "json")
THREAT = "Threat model"


def transfer(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more .pt or .safetensors files; each is source and target.",
            metavar="MODEL...",
            show_default=False,
        ),
    ],
    attacks: Annotated[
        list[str] | None,
        typer.Option("--attack", "-a", help="A gradient attack, repeatable; pgd20 by default.", rich_help_panel=THREAT),
    ] = None,
    norm: Annotated[str, typer.Option("--norm", help="linf, l2 or l1.", rich_help_panel=THREAT)] = "linf",
    eps: Annotated[
        str | None,
        typer.Option("--eps", help="Radius in pixel units, or several: 1/255,8/255.", rich_help_panel=THREAT),
    ] = None,
    data: Data = "digits",
    split: Split = "test",
    images: Subset = None,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    device: Device = "cpu",
    out: Runs = "runs",
    form: Annotated[
        str, typer.Option("--format", help="terminal, markdown, latex, csv or json.", rich_help_panel=OUTPUT)
    ] = "terminal",
    table: Annotated[
        str | None,
        typer.Option("--table", help="Also write PREFIX.csv and PREFIX.tex.", metavar="PREFIX", rich_help_panel=OUTPUT),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Craft images on each model, judge them on every model, and print the transfer matrix.

    Each image is attacked at full length on its source, whatever the target thinks of it. The same command resumes.
    """
    set_quiet(quiet or json)
    if form not in FORMS:
        raise unknown("format", form, FORMS)
    if len(models) < 2:
        raise UsageError(
            "a transfer matrix needs two models or more", code="A04", do="robeval transfer a.pt b.pt --eps 8/255"
        )
    from robeval.core.ball import NORMS
    from robeval.core.choosing import choose
    from robeval.core.numbers import radii
    from robeval.evaluate.settings import Settings
    from robeval.evaluate.transferring import insist_on_transferable, transfer_runs

    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    specs = choose("attacks", attacks or ["pgd20"], norm)
    settings = Settings(specs, norm, radii(eps, norm) if eps else [], seed=seed, batch_size=batch_size)
    insist_on_transferable(settings.specs)
    loaded = [load_both(model, data, split, images, device=device) for model in models]
    classifiers, chosen = [c for c, _ in loaded], loaded[0][1]
    from robeval.evaluate.verify import verify
    from robeval.reports.transfer import transfer_table
    from robeval.reports.writers import write

    with progress("transfer") as on_progress:
        stores = transfer_runs(
            classifiers, classifiers, chosen, settings, root=out, argv=sys.argv[1:], on_progress=on_progress
        )
    confirmed = checked = 0
    for classifier, store in zip(classifiers, stores, strict=True):
        with progress(f"verify {classifier.name}") as on_progress:
            result = verify(store, classifier, chosen, on_progress)
        result.insist()
        confirmed, checked = confirmed + result.confirmed, checked + result.checked
        for warning in store.warnings:
            note(warning)
    matrix = transfer_table(stores)
    files = write_both(matrix, table) if table else []
    if json:
        folders = [str(s.folder) for s in stores]
        print_json(matrix.to_json() | {"verified": confirmed, "folders": folders, "files": [str(f) for f in files]})
        return
    sys.stdout.write(write(matrix, form))
    note(f"stored adversarial images re-verified {confirmed}/{checked}")
    for file in files:
        note(str(file))
    note(f"{out}/   next: robeval table {' '.join(str(s.folder) for s in stores)}")


def write_both(table: Table, prefix: str) -> list[Path]:
    """The table as ``PREFIX.csv`` and ``PREFIX.tex``.

    Raises:
        MachineError: the files cannot be written (E03).
    """
    from robeval.reports.writers import write
    from robeval.store.files import cannot_write, make_folder, write_whole

    stem = prefix.removesuffix(".csv").removesuffix(".tex")
    make_folder(Path(stem).parent)
    written = []
    for form, ending in (("csv", ".csv"), ("latex", ".tex")):
        path = Path(stem + ending)
        try:
            write_whole(path, write(table, form).encode())
        except OSError as error:
            raise cannot_write(error, path) from None
        written.append(path)
    return written
