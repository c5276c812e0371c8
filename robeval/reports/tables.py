"""What a table says, apart from how it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from robeval.core.errors import UsageError
from robeval.core.numbers import pretty
from robeval.reports.beside import estimates, proven
from robeval.reports.diagnoses import DAGGER, Diagnosed, diagnosed
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate
from robeval.reports.verdict import FOOT, UNDIAGNOSED
from robeval.store.runstore import RunStore

Cell = str | int | float | Rate | None


@dataclass
class Table:
    """Rows of cells under named columns, and the notes that make every number traceable.

    Args:
        title: What the table shows.
        columns: Headings, unique.
        rows: Cells by heading; a missing one is empty.
        notes: Seeds, hashes, commands, conventions.
    """

    title: str
    columns: list[str]
    rows: list[dict[str, Cell]]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data: rates with their counts and interval."""

        def plain(cell: Cell) -> Any:
            if isinstance(cell, Rate):
                value = cell.value if cell.n else None
                return {"k": cell.k, "n": cell.n, "value": value, "interval": list(cell.interval)}
            return None if isinstance(cell, float) and not math.isfinite(cell) else cell

        rows = [{c: plain(row.get(c)) for c in self.columns} for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": self.notes}


def _attack_runs(stores: list[RunStore], norm: str | None) -> list[Diagnosed]:
    runs = diagnosed(stores)
    if norm is None:
        one_norm({d.facts.norm for d in runs})
    return [d for d in runs if norm in (None, d.facts.norm)]


def one_norm(norms: set[str]) -> None:
    if len(norms) > 1:
        raise UsageError(
            f"rows of different threat models cannot share a column: {', '.join(sorted(norms))}",
            code="T01",
            do="choose one with --norm",
        )


def one_name_one_model(stores: list[RunStore]) -> None:
    seen: dict[str, str] = {}
    for store in stores:
        model = store.manifest()["model"]
        if seen.setdefault(model["name"], model["fingerprint"]) != model["fingerprint"]:
            raise UsageError(
                f'two models are called "{model["name"]}"; sha256 differ', code="T02", do="rename one file"
            )


def models_table(stores: list[RunStore], norm: str | None = None) -> Table:
    """Models and radii against attacks.

    Args:
        stores: Attack runs, and runs of bounds for the estimates beside them.
        norm: Norm of the rows, needed when the runs have several.

    Raises:
        UsageError: several norms, or two models of one name.
        FileRefused: no run in that norm.
    """
    one_name_one_model(stores)
    runs = _attack_runs(stores, norm)
    facts = [d.facts for d in runs]
    if not facts:
        from robeval.reports.bounds import bounds_table

        return bounds_table(stores, norm)
    rows: list[dict[str, Cell]] = []
    columns = ["model", "eps", "clean"]
    notes: list[str] = []
    for run in runs:
        f, bare = run.facts, run.diagnosis is None and bool(run.facts.radii)
        name = f.manifest["model"]["name"] + ("" if f.complete else " (incomplete)") + (f" {DAGGER}" if bare else "")
        proofs = proven(stores, f)
        for eps in f.radii:
            row: dict[str, Cell] = {"model": name, "eps": pretty(eps), "clean": f.clean_accuracy}
            for a in f.per_attack(eps):
                row[f"{a.label} <="] = a.robust
                if not a.alone:
                    note = "attacks ran one after the other over the images still standing; such columns are cumulative"
                    notes += [note] if note not in notes else []
            row["worst case <="], row["diagnostics"] = f.worst_case(eps), run.said(eps)
            if proofs:
                row["certified >="] = proofs.certified(eps)
            rows.append(row)
        if not f.radii:
            rows.append({"model": name, "eps": "-", "clean": f.clean_accuracy})
        mean, found = f.mean_distance()
        for row in rows[-max(1, len(f.radii)) :]:
            row["mean distance"] = mean
            row["found"] = f"{found}/{len(f.clean)}"
            row.update(estimates(stores, f))
        if found < len(f.clean):
            notes.append(f"{name}: the mean distance is over the {found} of {len(f.clean)} images where one was found")
        if proofs and len(proofs.images) < len(f.clean):
            notes.append(f"{name}: certified counts the {len(proofs.images)} of {len(f.clean)} images with proofs")
        notes += _diagnosis_notes(run)
        notes.append(provenance(f))
    alone = {s.manifest()["threat"]["norm"] for s in stores if s.manifest()["kind"] == "certify"} - {
        f.norm for f in facts
    }
    if alone:
        notes.append(f"bounds in {', '.join(sorted(alone))} are left out: nothing here was attacked in that norm")
    for row in rows:
        columns += [c for c in row if c not in columns]
    ends = ("certified >=", "worst case <=", "diagnostics", "mean distance", "found")
    last = [c for c in columns if c in ends or "mean" in c or "inside" in c]
    columns = [c for c in columns if c not in last] + last
    title = f"Robust accuracy in {facts[0].norm}: images that no attack broke, an upper bound"
    return Table(title, columns, rows, list(dict.fromkeys(notes)))


def _diagnosis_notes(run: Diagnosed) -> list[str]:
    """What stands behind the numbers of a run: its verdict and what that cannot show, or that nobody looked."""
    end, name = run.verdict(), run.facts.manifest["model"]["name"]
    if end is None:
        return [f"{DAGGER} {name}: diagnostics {UNDIAGNOSED}"] if run.facts.radii else []
    lowered = {pretty(eps): run.facts.lowered(eps) for eps in run.facts.radii}
    more = [f"The diagnostics broke {k} more at {eps}." for eps, k in lowered.items() if k]
    return [" ".join([f"{name}: {end.text}", *more]), FOOT]


def attacks_table(store: RunStore, beside: Sequence[RunStore] = ()) -> Table:
    """One run: attacks against radii, with what each cost, and the headline of each radius.

    Args:
        store: The run.
        beside: Other runs, of which those that diagnosed the same model count.
    """
    others = [s for s in beside if s.folder != store.folder]
    return run_table(next(d for d in diagnosed([store, *others]) if d.facts.store is store))


def run_table(run: Diagnosed) -> Table:
    """:func:`attacks_table` of a run whose diagnosis is known."""
    f = run.facts
    rows: list[dict[str, Cell]] = []
    for eps in f.radii:
        for a in f.per_attack(eps):
            mine = f.ran(a.label, eps)
            rows.append(
                {
                    "eps": pretty(eps),
                    "attack": a.label,
                    "robust <=": a.robust,
                    "attacked": a.attacked,
                    "broken": a.broken,
                    "first to break": a.first,
                    "forwards": int(mine["forwards"].sum()),
                    "backwards": int(mine["backwards"].sum()),
                    "as": "alone" if a.alone else "cumulative",
                }
            )
        if f.lowered(eps):
            rows.append({"eps": pretty(eps), "attack": "diagnostics", "first to break": f.lowered(eps)})
        rows.append({"eps": pretty(eps), "attack": "worst case", "robust <=": f.worst_case(eps)})
    columns = ["eps", "attack", "robust <=", "attacked", "broken", "first to break", "forwards", "backwards", "as"]
    if not f.radii:
        rows, columns = (
            _nearest(f),
            ["attack", "attacked", "broken", "mean distance", "median", "rho_adv", "forwards", "backwards"],
        )
    title = f"{f.manifest['model']['name']}, {f.norm}, clean {f.clean_accuracy}"
    (mean, found), median = f.mean_distance(), f.median_distance()
    distance = (
        f"empirical distance, misclassified images 0: mean {mean:.4g} over the {found} of {len(f.clean)} images where "
        f"one was found, median {median:.4g} over all"
    )
    said = [run.headline(eps) for eps in f.radii] + _diagnosis_notes(run)
    return Table(title, columns, rows, [provenance(f), distance, *said])


def _nearest(f: AttackFacts) -> list[dict[str, Cell]]:
    """Rows of a run without radii: what each attack found, over the images that it broke.

    rho_adv is the mean of the Euclidean distance relative to the image's own norm (the average robustness of
    Moosavi-Dezfooli et al. 2016, DeepFool, arXiv:1511.04599), whatever norm the attack searched in.
    """
    rows: list[dict[str, Cell]] = []
    for label in f.labels:
        mine = f.ran(label, math.inf)
        distance = mine.loc[mine["success"], f"distance_{f.norm}"]
        rows.append(
            {
                "attack": label,
                "attacked": len(mine),
                "broken": len(distance),
                "mean distance": float(distance.mean()),
                "median": float(distance.median()),
                "rho_adv": float(mine.loc[mine["success"], "relative_l2"].mean(skipna=False)),
                "forwards": int(mine["forwards"].sum()),
                "backwards": int(mine["backwards"].sum()),
            }
        )
    return rows


def origin(m: dict[str, Any], seen: int) -> str:
    """Model, images and seed with their hashes."""
    return (
        f"{m['model']['name']}: sha256 {m['model']['fingerprint'][:12]}, "
        f"{m['data']['name']} {m['data'].get('subset') or 'all images'} "
        f"(n={seen}, sha256 {m['data']['fingerprint'][:12]}), seed {m['seed']}"
    )


def provenance(f: AttackFacts) -> str:
    """Where the numbers of a run come from."""
    m, cost = f.manifest, f.cost()
    text = (
        f"{origin(m, len(f.clean))}, "
        f"{cost['forwards']:,} forward and {cost['backwards']:,} backward passes, {cost['seconds']} s, {f.store.folder}"
    )
    if not f.complete:
        left = "some attacks still have images to see" if len(f.clean) == f.planned else ""
        text += f"; INCOMPLETE: {left or f'{len(f.clean)} of {f.planned} images seen'}, the same command goes on"
    for eps in f.radii:
        if f.proven(eps):
            text += f"; at {pretty(eps)} {len(f.proven(eps))} images were not attacked: a proof covers them"
        lost = f.not_evaluated(eps)
        if lost:
            low = Rate(f.worst_case(eps).k - lost, len(f.clean)).value
            text += (
                f"; at {pretty(eps)} robust accuracy between {100 * low:.1f} % (rest all broken) and "
                f"{100 * f.worst_case(eps).value:.1f} % (rest all robust), "
                f"{len(f.clean) - lost} of {len(f.clean)} evaluated"
            )
    return text


def frame_of(table: Table, text: Any) -> pd.DataFrame:
    """The table as a frame of text, each cell written by ``text``."""
    return pd.DataFrame([[text(row.get(c)) for c in table.columns] for row in table.rows], columns=table.columns)
