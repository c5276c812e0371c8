"""``robeval cite``."""

from __future__ import annotations

from typing import Annotated

import typer

from robeval.cli.common import Json, print_json

EXAMPLES = "**Examples**\n\n    robeval cite runs\n\n    robeval cite runs/attack-model-1f2e3d4c --json"


def cite(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or folders of runs.", metavar="RUNS")],
    json: Json = False,
) -> None:
    """Print the sources of every method that the runs used."""
    from robeval.store.find import runs as find_runs

    sources: dict[str, str] = {}
    for text in runs:
        for store in find_runs(text):
            for method in store.manifest()["methods"]:
                sources[method["name"]] = method["source"]
    if json:
        print_json(sources)
        return
    for name, source in sorted(sources.items()):
        typer.echo(f"{name}: {source}")
