"""What a table says, apart from how it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from robeval.core.errors import FileRefused, UsageError
from robeval.core.numbers import pretty
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate
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
                return {"k": cell.k, "n": cell.n, "value": cell.value, "interval": list(cell.interval)}
            return None if isinstance(cell, float) and not math.isfinite(cell) else cell

        rows = [{c: plain(row.get(c)) for c in self.columns} for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": self.notes}


def _attack_stores(stores: list[RunStore], norm: str | None) -> list[AttackFacts]:
    facts = [AttackFacts(s) for s in stores if s.manifest()["kind"] == "attack"]
    norms = {f.norm for f in facts}
    if norm is None and len(norms) > 1:
        raise UsageError(
            f"rows of different threat models cannot share a column: {', '.join(sorted(norms))}",
            code="T01",
            do="choose one with --norm",
        )
    return [f for f in facts if norm in (None, f.norm)]


def _one_name_one_model(stores: list[RunStore]) -> None:
    seen: dict[str, str] = {}
    for store in stores:
        model = store.manifest()["model"]
        if seen.setdefault(model["name"], model["fingerprint"]) != model["fingerprint"]:
            raise UsageError(
                f'two models are called "{model["name"]}"; sha256 differ', code="T02", do="rename one file"
            )


def estimates(stores: list[RunStore], facts: AttackFacts) -> dict[str, Cell]:
    """Mean radius of each estimated bound of the same model, images and norm, and the share that the attacks refute."""
    cells: dict[str, Cell] = {}
    distance = facts.distances()
    for store in stores:
        manifest = store.manifest()
        same = manifest["model"]["fingerprint"] == facts.manifest["model"]["fingerprint"]
        if manifest["kind"] != "certify" or not same or manifest["data"]["name"] != facts.manifest["data"]["name"]:
            continue
        frame = store.frame()
        for bound, rows in frame[frame["norm"] == facts.norm].groupby("bound", sort=True):
            name = f"{bound} ({rows['kind'].iloc[0].upper()}) mean"
            cells[name] = float(rows["radius"].mean())
            both = rows.set_index("index").join(distance.rename("found"), how="inner")
            refuted = both["found"] < both["radius"]
            cells[f"{bound} attacked inside"] = Rate(int(refuted.sum()), len(both))
    return cells


def models_table(stores: list[RunStore], norm: str | None = None) -> Table:
    """Models and radii against attacks.

    Args:
        stores: Attack runs, and runs of bounds for the estimates beside them.
        norm: Norm of the rows, needed when the runs have several.

    Raises:
        UsageError: several norms, or two models of one name.
        FileRefused: no attack run.
    """
    facts = _attack_stores(stores, norm)
    if not facts:
        raise FileRefused("no attack run among these" + (f" in {norm}" if norm else ""), code="R05")
    _one_name_one_model(stores)
    rows: list[dict[str, Cell]] = []
    columns = ["model", "eps", "clean"]
    notes: list[str] = []
    for f in facts:
        for eps in f.radii:
            row: dict[str, Cell] = {"model": f.manifest["model"]["name"], "eps": pretty(eps), "clean": f.clean_accuracy}
            for a in f.per_attack(eps):
                row[f"{a.label} <="] = a.robust
                if not a.alone:
                    note = "attacks ran one after the other over the images still standing; such columns are cumulative"
                    notes += [note] if note not in notes else []
            row["worst case <="] = f.worst_case(eps)
            rows.append(row)
        if not f.radii:
            rows.append({"model": f.manifest["model"]["name"], "eps": "-", "clean": f.clean_accuracy})
        mean, found = f.mean_distance()
        for row in rows[-max(1, len(f.radii)) :]:
            row["mean distance <="] = mean
            row["found"] = f"{found}/{len(f.clean)}"
            row.update(estimates(stores, f))
        notes.append(provenance(f))
    for row in rows:
        columns += [c for c in row if c not in columns]
    last = [c for c in columns if c in ("worst case <=", "mean distance <=", "found") or "mean" in c or "inside" in c]
    columns = [c for c in columns if c not in last] + last
    title = f"Robust accuracy in {facts[0].norm}: images that no attack broke, an upper bound"
    return Table(title, columns, rows, notes)


def attacks_table(store: RunStore) -> Table:
    """One run: attacks against radii, with what each cost."""
    f = AttackFacts(store)
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
        rows.append({"eps": pretty(eps), "attack": "worst case", "robust <=": f.worst_case(eps)})
    columns = ["eps", "attack", "robust <=", "attacked", "broken", "first to break", "forwards", "backwards", "as"]
    return Table(f"{f.manifest['model']['name']}, {f.norm}, clean {f.clean_accuracy}", columns, rows, [provenance(f)])


def provenance(f: AttackFacts) -> str:
    """Where the numbers of a run come from."""
    m, cost = f.manifest, f.cost()
    text = (
        f"{m['model']['name']}: sha256 {m['model']['fingerprint'][:12]}, "
        f"{m['data']['name']} {m['data']['subset'] or 'all images'} "
        f"(n={len(f.clean)}, sha256 {m['data']['fingerprint'][:12]}), seed {m['seed']}, "
        f"{cost['forwards']:,} forward and {cost['backwards']:,} backward passes, {cost['seconds']} s, {f.store.folder}"
    )
    if not f.complete:
        text += f"; INCOMPLETE: {len(f.clean)} of {f.planned} images seen, the same command goes on"
    for eps in f.radii:
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
