"""What ``robeval sweep`` does with its points: processes, attacks, and the summary."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robeval.cli.common import note, progress
from robeval.core.numbers import pretty
from robeval.train import orders
from robeval.train.sweeps import Point

if TYPE_CHECKING:
    from robeval.reports.frames import AttackFacts
    from robeval.reports.tables import Cell, Table


def written(points: Sequence[Point], folder: Path) -> None:
    """The settings of every point beside its model, as a file for ``robeval train --config``.

    Raises:
        MachineError: the disk is full or not writable.
    """
    from robeval.store.files import cannot_write, make_folder, write_whole

    make_folder(folder)
    for p in points:
        path = _settings_file(p)
        try:
            write_whole(path, orders.to_toml(p.order).encode())
        except OSError as error:
            raise cannot_write(error, path) from None


def _settings_file(point: Point) -> Path:
    return Path(point.order.out).with_suffix(".toml")


def train_apart(points: Sequence[Point], jobs: int, fresh: bool) -> dict[str, str]:
    """Train in processes of their own, so many at a time, a point after those it needs. -> why some failed, by name."""
    failed: dict[str, str] = {}
    started: list[subprocess.Popen[str]] = []
    left = list(points)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            while left:
                waiting = {p.name for p in left}
                ready = [p for p in left if not waiting & set(p.needs)]
                lost = [p for p in ready if set(p.needs) & set(failed)]
                failed |= {p.name: f"not started: it needs {next(n for n in p.needs if n in failed)}" for p in lost}
                able = [p for p in ready if p not in lost]
                told = pool.map(lambda p: _process(p, jobs, fresh, started), able)
                for p, why in zip(able, told, strict=True):
                    note(f"{p.name}: {why or 'trained'}")
                    failed |= {p.name: why} if why else {}
                left = [p for p in left if p not in ready]
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
    return failed


def _process(point: Point, jobs: int, fresh: bool, started: list[subprocess.Popen[str]]) -> str:
    """``robeval train`` on the point's own settings. -> why it failed, or nothing."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(orders.VARIABLE)}
    variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    words = ["train", "--config", str(_settings_file(point)), "--json", *(["--fresh"] if fresh else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "robeval", *words],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables,
    )  # fmt: skip
    started.append(process)
    out, _ = process.communicate()
    if process.returncode == 0:
        return ""
    try:
        error = json.loads(out)["error"]
    except (ValueError, KeyError, TypeError):
        return f"robeval train ended with exit code {process.returncode}"
    return f"{error['what']} [{error['code']}]"


def attack_settings(point: Point, attack: Mapping[str, Any]) -> Any:
    """What the sweep's attack is on this point: norm and eps are the training's own unless the table says others.

    Raises:
        UsageError: unknown names, or bad radii.
    """
    from robeval.cli.planning import settings_of

    norm = str(attack.get("norm", point.order.norm))
    return settings_of(
        attack.get("suite"), attack.get("attacks"), norm, str(attack.get("eps", point.order.eps)),
        each=attack.get("each", False), seed=attack.get("seed", 0), batch_size=attack.get("batch-size", 256),
    )  # fmt: skip


def attacked(point: Point, attack: Mapping[str, Any], folder: Path) -> AttackFacts:
    """Attack a finished point, or find that done, and look at every stored image again.

    Raises:
        RobevalError: as ``robeval attack`` does.
    """
    from robeval.cli.loading import load_both
    from robeval.evaluate.attacking import attack_run
    from robeval.evaluate.verify import verify
    from robeval.reports.frames import AttackFacts

    images = attack.get("images")
    classifier, chosen = load_both(
        point.order.out, str(attack.get("data", point.order.data)), str(attack.get("split", "test")),
        None if images is None else str(images), device=point.order.device,
    )  # fmt: skip
    settings = attack_settings(point, attack)
    with progress(f"attack {point.name}") as on_progress:
        store = attack_run(
            classifier, chosen, settings, root=str(folder / "runs"), argv=sys.argv[1:], on_progress=on_progress
        )
    verify(store, classifier, chosen).insist()
    return AttackFacts(store)


def summary(points: Sequence[Point], failed: Mapping[str, str], facts: Mapping[str, AttackFacts]) -> Table:
    """One row per point: method, settings, accuracies with their counts, cost, and where the numbers come from."""
    from robeval.reports.tables import Table, provenance

    rows = [_row(p, failed.get(p.name, ""), facts.get(p.name)) for p in points]
    first = ["name", "method", "settings", "norm", "eps"]
    last = ["epoch", "seconds", "seed", "file sha256", "warnings", "status"]
    between = list(dict.fromkeys(c for row in rows for c in row if c not in (*first, *last)))
    told = dict.fromkeys(n for p in points for n in [_seen(p, failed)] if n)
    notes = ["clean and PGD-20 are those of training's own log", *told, *(provenance(f) for f in facts.values())]
    return Table(f"{len(points)} trainings", [*first, *between, *last], rows, notes)


def _seen(point: Point, failed: Mapping[str, str]) -> str:
    """Where a point's own accuracies were measured."""
    if point.name in failed and not Path(point.order.out).is_file():
        return ""
    recipe = _recipe(point)[0]
    return f"measured on: {recipe.get('metrics_on', 'held-out images')}, n={recipe.get('metrics_images', 'not stored')}"


def _recipe(point: Point) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Recipe and metrics of a model file, and its hash."""
    from robeval.models.checkpoint import read

    held = read(point.order.out)
    assert held.spec is not None
    return held.spec["recipe"], held.spec["metrics"], held.sha256


def _row(point: Point, why: str, facts: AttackFacts | None) -> dict[str, Cell]:
    from robeval.reports.stats import Rate
    from robeval.train.job import judged

    method, _, settings = point.order.label.partition(":")
    row: dict[str, Cell] = {"name": point.name, "method": method, "settings": settings}
    row |= {orders.flag(k): v for k, v in point.swept.items()}
    row |= {"norm": point.order.norm, "eps": point.order.eps, "seed": point.order.seed, "status": why or "complete"}
    if why and not (facts or why.startswith("attack:")):
        return row
    recipe, metrics, digest = _recipe(point)
    n = recipe.get("metrics_images", 0)  # models of early versions do not say
    cells = [Rate(round(share * n), n) if n else f"{100 * share:.1f} %" for share in judged(metrics)]
    row |= dict(zip(("clean", "PGD-20 <="), cells, strict=True))
    for eps in facts.radii if facts else []:
        assert facts is not None
        rate, name = facts.worst_case(eps), f"{facts.norm} {pretty(eps)}"
        row |= {f"worst case {name} <=": rate, f"k/n {name}": f"{rate.k}/{rate.n}"}
    row |= {"epoch": f"{recipe['chosen_epoch']}/{recipe['epochs']}", "seconds": _seconds(point)}
    return row | {"file sha256": digest[:12], "warnings": " ".join(dict.fromkeys(recipe["warnings"]))}


def _seconds(point: Point) -> str:
    """Wall time of all epochs, to a tenth."""
    log = Path(f"{point.order.out}.train") / "log.csv"
    with log.open(newline="", encoding="utf-8") as file:
        return f"{sum(float(row['seconds']) for row in csv.DictReader(file)):.1f}"


def short(table: Table) -> Table:
    """The columns that a screen has room for."""
    hidden: tuple[str, ...] = ("method", "settings", "norm", "eps", "seed", "file sha256", "seconds")
    if all(row["status"] == "complete" for row in table.rows):
        hidden = (*hidden, "status")
    columns = [c for c in table.columns if c not in hidden and not c.startswith("k/n ")]
    return replace(table, columns=columns)
