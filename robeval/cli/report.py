"""``robeval report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robeval.cli.common import OUTPUT, Json, Quiet, note, print_json, set_quiet
from robeval.core.errors import RobevalError

if TYPE_CHECKING:
    from robeval.store.runstore import RunStore

EXAMPLES = (
    "**Examples**\n\n    robeval report runs --out report.html\n\n"
    "    robeval report runs/attack-model-1f2e3d4c --out model.html"
)


def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or folders of runs.", metavar="RUNS")],
    out: Annotated[str, typer.Option("--out", help="Write the page to this file.", rich_help_panel=OUTPUT)] = (
        "report.html"
    ),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """One HTML page about finished runs: verdict, numbers, pictures, images, diagnostics, provenance.

    The page holds everything itself: it fetches nothing, runs no script, and can be mailed or printed.
    """
    set_quiet(quiet or json)
    from robeval.reports.page import page
    from robeval.store.files import cannot_write, write_whole
    from robeval.store.find import runs as find_runs

    stores = [s for text in runs for s in find_runs(text)]
    content = page(stores, originals_of(stores)).encode()
    for store in stores:
        for warning in store.warnings:
            note(warning)
    try:
        write_whole(Path(out), content)
    except OSError as error:
        raise cannot_write(error, Path(out)) from None
    if json:
        print_json({"file": out, "bytes": len(content), "runs": [str(s.folder) for s in stores]})
    note(f"{out}  {len(content) / 1000:,.0f} kB, {len(stores)} runs")


def originals_of(stores: list[RunStore]) -> dict[str, dict[int, Any]]:
    """Clean images by id for each set of images, where the data set is at hand and is still the same."""
    found: dict[str, dict[int, Any]] = {}
    for store in stores:
        manifest = store.manifest()
        fingerprint, source = manifest["data"]["fingerprint"], manifest["model"].get("source")
        if manifest["kind"] != "attack" or not source or fingerprint in found:
            continue
        from robeval.data.load import load
        from robeval.data.subset import subset

        found[fingerprint] = {}
        try:
            images = subset(load(source["data"], source["split"]), source["subset"])
        except RobevalError as error:
            note(f"the gallery has no clean images: {error.what}")
            continue
        if images.fingerprint == fingerprint:
            found[fingerprint] = {index: images.x[k : k + 1][0].numpy() for k, index in enumerate(images.ids.tolist())}
        else:
            note(f"the gallery has no clean images: {source['data']} is not the set of this run any more")
    return found
