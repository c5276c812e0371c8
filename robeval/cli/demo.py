"""``robeval demo``."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from robeval.cli.common import Json, OnProgress, Quiet, note, print_json, progress, set_quiet

EXAMPLES = "**Examples**\n\n    robeval demo\n\n    robeval demo --out /tmp/demo --json"

EPS = 2 / 16
#: Method, epochs, largest learning rate.
TRAININGS = {"standard": ("standard", 6, 3e-3), "adv": (f"adv:eps={EPS},steps=3", 8, 5e-3)}


def demo(
    out: Annotated[str, typer.Option("--out", help="Folder for models and runs.", rich_help_panel="Output")] = "demo",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train, attack, diagnose, certify and verify two models on real digits, and print one table.

    Digits are small (8x8, 1,797 images): a toy to see every step, not a benchmark. A second call finds all done.
    """
    set_quiet(quiet or json)
    from robeval.reports.writers import terminal

    started, folder = time.monotonic(), Path(out)
    stores = []
    for name in TRAININGS:
        with progress(f"train {name}") as on_progress:
            file = _train(folder, name, on_progress)
        note(f"trained   {file}")
        with progress(f"attack {name}") as on_progress:
            stores += _attack(file, folder, on_progress)
        stores += _diagnose(file, folder, stores[-2])
        with progress(f"certify {name}") as on_progress:
            stores += _certify(file, folder, on_progress)
    checked, confirmed = _verify(stores, folder)
    table = demo_table(stores)
    if json:
        print_json(table.to_json() | {"verified": confirmed, "checked": checked, "folder": str(folder)})
        return
    sys.stdout.write(terminal(table))
    note(f"stored adversarial images re-verified {confirmed}/{checked}   {time.monotonic() - started:.0f} s")
    note(f"models and runs: {folder}/   next: robeval attack {folder}/adv.pt --suite white-box --eps 2/16")


def _train(folder: Path, name: str, on_progress: OnProgress) -> Path:
    from robeval.core import catalogue
    from robeval.data.load import load as load_images
    from robeval.store.files import make_folder
    from robeval.train.job import Job, run_job
    from robeval.train.recipe import Recipe

    make_folder(folder)
    method, epochs, lr = TRAININGS[name]
    job = Job(
        catalogue.parse("trainers", method),
        Recipe(epochs=epochs, batch_size=64, optimizer="adam", lr=lr, eps=EPS),
        folder / f"{name}.pt",
        model_arguments={"act": "smooth"},  # the curvature bound needs a network that is twice differentiable
        held_out=80,
        note={"data": "digits"},
    )
    run_job(job, load_images("digits", "train"), on_progress=on_progress)
    return job.out


def _load(file: Path) -> tuple[Any, Any]:
    from robeval.cli.loading import load_both

    return load_both(str(file), "digits", "test", None)


def _attack(file: Path, folder: Path, on_progress: OnProgress) -> list[Any]:
    """The quick suite in linf at 2/16 on every image, and the nearest adversarial images in l2."""
    from robeval.core.choosing import choose
    from robeval.evaluate.attacking import attack_run
    from robeval.evaluate.settings import Settings

    classifier, images = _load(file)
    runs = [
        _linf(),
        Settings(choose("attacks", ["deepfool"], "l2"), "l2", [], each=True),
    ]
    return [
        attack_run(classifier, images, s, root=str(folder / "runs"), argv=sys.argv[1:], on_progress=on_progress)
        for s in runs
    ]


def _linf() -> Any:
    from robeval.evaluate.settings import Settings
    from robeval.evaluate.suites import suite

    return Settings(suite("quick", "linf")[0], "linf", [EPS], each=True)


def _diagnose(file: Path, folder: Path, attacked: Any) -> list[Any]:
    """The quick diagnosis of the linf run."""
    from robeval.cli.diagnosing import after_attack

    return after_attack(attacked, *_load(file), _linf(), str(folder / "runs"))


def _certify(file: Path, folder: Path, on_progress: OnProgress) -> list[Any]:
    """Both estimates in l2."""
    from robeval.certification.run import certify
    from robeval.certification.settings import Settings
    from robeval.core.choosing import choose

    classifier, images = _load(file)
    settings = Settings(choose("bounds", ["l-bound", "c-bound"], "l2"), "l2")
    return [
        certify(classifier, images, settings, root=str(folder / "runs"), argv=sys.argv[1:], on_progress=on_progress)
    ]


def _verify(stores: list[Any], folder: Path) -> tuple[int, int]:
    from robeval.evaluate.verify import verify

    checked = confirmed = 0
    for store in stores:
        manifest = store.manifest()
        if manifest["kind"] == "attack":
            classifier, images = _load(folder / f"{manifest['model']['name']}.pt")
            result = verify(store, classifier, images)
            result.insist()
            checked, confirmed = checked + result.checked, confirmed + result.confirmed
    return checked, confirmed


def demo_table(stores: list[Any]) -> Any:
    """One row per model: linf robust accuracy per attack, and the l2 estimates beside the l2 distance found."""
    from robeval.reports.beside import estimates
    from robeval.reports.frames import AttackFacts
    from robeval.reports.tables import Table, models_table

    table: Table = models_table([s for s in stores if s.manifest()["kind"] != "certify"], "linf")
    drop = [c for c in table.columns if c in ("mean distance", "found") or "bound" in c]
    table.columns = [c for c in table.columns if c not in drop]
    for store in stores:
        if store.manifest()["kind"] != "attack" or store.manifest()["threat"]["norm"] != "l2":
            continue
        facts = AttackFacts(store)
        mean, found = facts.mean_distance()
        upper = "l2 mean distance" + (" <=" if found == len(facts.clean) else f", {found} found")
        cells: dict[str, Any] = {f"l2 {k}": v for k, v in estimates(stores, facts).items()}
        cells[upper] = mean if math.isfinite(mean) else None
        for row in table.rows:
            if row["model"] == facts.manifest["model"]["name"]:
                row.update(cells)
        table.columns += [c for c in cells if c not in table.columns]
        table.notes.append(
            f"{facts.manifest['model']['name']} in l2: deepfool, {facts.cost()['forwards']:,} forward and "
            f"{facts.cost()['backwards']:,} backward passes, {store.folder}"
        )
    return table
