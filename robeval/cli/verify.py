"""``robeval verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robeval.cli.common import Device, Json, Quiet, note, print_json, progress, set_quiet
from robeval.cli.loading import DATA, MODEL, load_both
from robeval.core.errors import FileRefused

EXAMPLES = "**Examples**\n\n    robeval verify runs\n\n    robeval verify runs/attack-model-1f2e3d4c --model model.pt"


def verify(
    run: Annotated[str, typer.Argument(help="A run folder, or a folder of runs.", metavar="RUN")],
    model: Annotated[
        str | None, typer.Option("--model", help="The model file; the run's own by default.", rich_help_panel=MODEL)
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="The data set; the run's own by default.", rich_help_panel=DATA)
    ] = None,
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check every stored adversarial image of a run again, outside the engine."""
    set_quiet(quiet or json)
    from robeval.evaluate.verify import verify as check
    from robeval.store.find import runs as find_runs

    results = []
    for store in find_runs(run):
        manifest = store.manifest()
        if manifest["kind"] != "attack":
            continue
        source = manifest["model"]["source"]
        file = model or source["model"]
        if not Path(file).is_file():
            raise FileRefused(f"no model file at {file}", code="M01", do="say where it is with --model")
        classifier, images = load_both(
            file,
            data or source["data"],
            source["split"],
            source["subset"],
            arch=source["arch"],
            arch_arg=source["arch_arg"],
            normalise=source["normalise"],
            device=device,
            randomised=source.get("randomised", False),
        )
        with progress("verify") as on_progress:
            result = check(store, classifier, images, on_progress)
        results.append((store, result))
        note(f"{store.folder}  {result}")
    if not results:
        raise FileRefused(f"no attack run in {run}", code="R05", do="give a folder that robeval attack made")
    if json:
        print_json(
            [
                {"folder": str(s.folder), "checked": r.checked, "confirmed": r.confirmed, "failures": r.failures}
                for s, r in results
            ]
        )
    for _, result in results:
        result.insist()
