"""``robeval plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robeval.cli.common import OUTPUT, Json, Quiet, note, print_json, set_quiet
from robeval.core.errors import FileRefused

KINDS = (
    "accuracy, waterfall, bracket, certified, distances, passes, paths, softmax, surface, weights, covariance, "
    "density, gallery"
)
EXAMPLES = (
    "**Examples**\n\n    robeval plot runs --kind bracket\n\n"
    "    robeval plot runs --kind surface --kind softmax --out figures\n\n"
    "paths, softmax, surface, weights, covariance and density need robeval diagnose --level full."
)


def plot(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or folders of runs.", metavar="RUNS")],
    kind: Annotated[list[str], typer.Option("--kind", "-k", help=f"Repeatable: {KINDS}.")],
    out: Annotated[str, typer.Option("--out", help="Folder of the files.", rich_help_panel=OUTPUT)] = "plots",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pictures of finished runs: PNG, PDF, and the CSV with the numbers behind each."""
    set_quiet(quiet or json)
    from robeval.cli.report import originals_of
    from robeval.reports.groups import groups
    from robeval.reports.plots.kinds import pictures
    from robeval.store.files import cannot_write, make_folder, write_whole
    from robeval.store.find import runs as find_runs

    stores = [s for text in runs for s in find_runs(text)]
    found, originals = groups(stores), originals_of(stores) if "gallery" in kind else {}
    files = []
    for name in dict.fromkeys(kind):
        drawn = pictures(name, found, originals)
        if not drawn:
            raise FileRefused(
                f"these runs hold nothing for the picture {name}",
                code="R08",
                do="robeval diagnose MODEL --level full, or another kind of picture",
            )
        for picture in drawn:
            make_folder(Path(out))
            for form, content in (
                ("png", picture.draw("png")), ("pdf", picture.draw("pdf")), ("csv", picture.csv().encode())
            ):  # fmt: skip
                file = Path(out) / f"{picture.name}.{form}"
                try:
                    write_whole(file, content)
                except OSError as error:
                    raise cannot_write(error, file) from None
                files.append(str(file))
    if json:
        print_json({"files": files})
        return
    for line in files:
        note(line)
