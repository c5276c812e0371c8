"""Bounds alone: every model, bound and radius, each row with its kind."""

from __future__ import annotations

import pandas as pd

from robeval.core.errors import FileRefused
from robeval.core.numbers import pretty
from robeval.reports.certificates import CertificateFacts
from robeval.reports.stats import Rate
from robeval.reports.tables import Cell, Table, one_name_one_model, one_norm, origin
from robeval.store.runstore import RunStore

COLUMNS = ["model", "bound", "kind", "eps", "certified >=", "mean radius", "median radius", "falsified", "seconds"]


def bounds_table(stores: list[RunStore], norm: str | None = None) -> Table:
    """One row per model and bound, and for proofs at given radii one per radius.

    Certified accuracy is of proofs; that of a probabilistic bound is the smoothed classifier's. An estimate has none:
    beside its radius stands on how many attacked images it is falsified, where attack runs are among the stores.

    Args:
        stores: Certify runs, and attack runs to hold the estimates against.
        norm: Norm of the rows, needed when the runs have several.

    Raises:
        UsageError: several norms (T01), or two models of one name (T02).
        FileRefused: no certify run in that norm (R05).
    """
    from robeval.reports.falsify import attack_runs_among, falsify, hits

    mine = [CertificateFacts(s) for s in stores if s.manifest()["kind"] == "certify"]
    mine = [c for c in mine if norm in (None, c.norm)]
    if not mine:
        where = f" in {norm}" if norm else ""
        raise FileRefused(f"no attack run and no run of bounds among these{where}", code="R05")
    one_norm({c.norm for c in mine})
    one_name_one_model([c.store for c in mine])
    rows: list[dict[str, Cell]] = []
    notes = []
    for facts in mine:
        against = hits(attack_runs_among(stores, facts.manifest))
        for bound in facts.kinds:
            rows += _rows(facts, bound)
            if facts.kinds[bound] == "estimate" and facts.top[bound] == 1:
                told = falsify(facts.rows(bound).reset_index(), against).iloc[0]
                if told["attacked"]:
                    rows[-1]["falsified"] = Rate(int(told["falsified"]), int(told["attacked"]))
        notes.append(f"{origin(facts.manifest, facts.frame['index'].nunique())}, {facts.store.folder}")
        if any(kind == "probabilistic" for kind in facts.kinds.values()):
            notes.append(f"{facts.manifest['model']['name']}: probabilistic bounds speak of the SMOOTHED classifier")
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    return Table(f"Bounds in {mine[0].norm}; misclassified images have radius 0", columns, rows, notes)


def _rows(facts: CertificateFacts, bound: str) -> list[dict[str, Cell]]:
    """The rows of one bound; the last holds what does not depend on a radius."""
    kind, reach = facts.kinds[bound], facts.reach(bound)
    top = f", top {facts.top[bound]}" if facts.top[bound] > 1 else ""
    start: dict[str, Cell] = {
        "model": facts.manifest["model"]["name"],
        "bound": bound + top,
        "kind": kind.upper() if kind == "estimate" else kind,
    }
    rows = [start]
    if kind != "estimate" and facts.radii:
        rows = [start | {"eps": pretty(e), "certified >=": facts.certified(bound, e)} for e in facts.radii]
    if pd.isna(facts.rows(bound)["eps"]).any():
        rows[-1] |= {"mean radius": float(reach.mean()), "median radius": float(reach.median())}
    seconds = facts.seconds(bound)
    rows[-1]["seconds"] = seconds if seconds == seconds else None
    return rows
