"""Hold bounds against attacks: an adversarial image closer than a bound proves the bound wrong. Frames only, no torch.

Not being falsified is no evidence that a bound holds: it says as much about the attacks as about the bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from robeval.core.records import CLEAN
from robeval.reports.certificates import CertificateFacts
from robeval.reports.stats import Rate
from robeval.store.find import runs
from robeval.store.runstore import RunStore

NORMS = ("linf", "l2", "l1")


def attack_runs(folder: str | Path, manifest: dict[str, Any]) -> list[RunStore]:
    """Attack runs in a folder on the same weights and the same data set as a certify run; none where there is none."""
    path = Path(folder)
    if not (path / "manifest.json").is_file() and not any(path.glob("*/manifest.json")):
        return []
    return attack_runs_among(runs(path), manifest)


def attack_runs_among(stores: Iterable[RunStore], manifest: dict[str, Any]) -> list[RunStore]:
    """The attack runs on the same weights and the same data set as a certify run."""
    return [
        store
        for store in stores
        if (other := store.manifest())["kind"] == "attack"
        and other["model"]["fingerprint"] == manifest["model"]["fingerprint"]
        and other["data"]["name"] == manifest["data"]["name"]
    ]


def hits(stores: Iterable[RunStore]) -> pd.DataFrame:
    """All attack records of some runs, without the clean rows; the column ``run`` says where each stands."""
    frames = [store.frame().assign(run=str(store.folder)) for store in stores]
    if not frames:
        return pd.DataFrame({"index": pd.Series(dtype="int64"), "label": pd.Series(dtype="int64"), "attack": []})
    frame = pd.concat(frames, ignore_index=True)
    return frame[frame["attack"] != CLEAN].reset_index(drop=True)


def nearest(certificates: pd.DataFrame, attacks: pd.DataFrame) -> pd.DataFrame:
    """Certificates of correct images that were attacked, each with the nearest adversarial image in its own norm.

    A found image counts in every norm, whatever norm the attack worked in, since its distance is known in all. Images
    whose label differs between the two frames are not the same images and are left out.

    Returns:
        The certificates with the columns ``distance`` (inf when no attack succeeded), ``closest`` (row of the nearest
        hit in ``attacks``, -1 if none), ``falsified`` and ``ratio`` (radius over distance).
    """
    rows = certificates[certificates["clean_correct"]]
    rows = rows.merge(attacks[["index", "label"]].drop_duplicates(), on=["index", "label"]).reset_index(drop=True)
    rows = rows.assign(distance=math.inf, closest=-1)
    for norm in [n for n in NORMS if n in set(rows["norm"])]:
        found = attacks[attacks["success"].astype(bool)].sort_values(f"distance_{norm}", kind="stable")
        best = found.drop_duplicates(["index", "label"])
        place = {
            (i, y): (d, row)
            for i, y, d, row in zip(best["index"], best["label"], best[f"distance_{norm}"], best.index, strict=True)
        }
        here = rows["norm"] == norm
        pairs = [
            place.get(key, (math.inf, -1)) for key in zip(rows.loc[here, "index"], rows.loc[here, "label"], strict=True)
        ]
        rows.loc[here, "distance"] = [float(d) for d, _ in pairs]
        rows.loc[here, "closest"] = [int(row) for _, row in pairs]
    rows["falsified"] = rows["distance"] < rows["radius"]
    found_any = rows["distance"].map(math.isfinite)
    rows["ratio"] = (rows["radius"] / rows["distance"]).where(found_any, 0.0)
    return rows


def falsify(certificates: pd.DataFrame, attacks: pd.DataFrame) -> pd.DataFrame:
    """Per bound: on how many attacked images an attack landed below the radius, and how far below.

    Returns:
        One row per bound and norm: ``attacked`` (correct images with attack records), ``broken`` (an adversarial image
        is known), ``falsified``, ``share`` (falsified / attacked, nan without attacks), ``worst_ratio`` (largest radius
        over attack distance; above 1 means wrong), ``witness`` (id of that image, -1 if none) and ``attacks``.
    """
    joined = nearest(certificates, attacks)
    names = ", ".join(sorted(set(attacks["attack"])))
    table = []
    for bound, norm in certificates[["bound", "norm"]].drop_duplicates().itertuples(index=False):
        rows = joined[(joined["bound"] == bound) & (joined["norm"] == norm)]
        broken = rows["distance"].map(math.isfinite)
        wrong = int(rows["falsified"].sum())
        worst = rows.loc[rows["ratio"].idxmax()] if broken.any() else None
        table.append(
            {
                "bound": bound,
                "norm": norm,
                "attacked": len(rows),
                "broken": int(broken.sum()),
                "falsified": wrong,
                "share": wrong / len(rows) if len(rows) else math.nan,
                "worst_ratio": float(worst["ratio"]) if worst is not None else math.nan,
                "witness": int(worst["index"]) if worst is not None else -1,
                "attacks": names,
            }
        )
    return pd.DataFrame(table)


def summary(store: RunStore, attacks: pd.DataFrame) -> list[dict[str, Any]]:
    """One plain row per bound of a certify run.

    Every bound: images, radii (misclassified images count 0), constant, cost. An estimate has no certified accuracy; it
    is held against the attacks. Proofs and probabilistic bounds have ``certified``, the share of images at each radius
    asked for, and ``statuses``.
    """
    facts = CertificateFacts(store)
    table = []
    for bound, kind in facts.kinds.items():
        rows, reach = facts.rows(bound), facts.reach(bound)
        first, sought = rows.iloc[0], bool(rows["eps"].isna().any())
        row = {
            "bound": bound,
            "kind": kind,
            "norm": first["norm"],
            "loss": first["loss"],
            "images": len(rows),
            "correct": int(rows["clean_correct"].sum()),
            "mean_radius": float(reach.mean()) if sought else math.nan,
            "median_radius": float(reach.median()) if sought else math.nan,
            "constant": float(rows["constant"].max()),
            "domain": first["domain"],
            "arithmetic": first["arithmetic"],
            "confidence": float(first["confidence"]),
            "passes": int(rows["forwards"].sum() + rows["backwards"].sum()),
            "seconds": facts.seconds(bound),
        }
        if kind == "estimate":
            seen = attacks if facts.top[bound] == 1 else attacks[:0]  # attacks ask for the best class
            row |= falsify(rows.reset_index(), seen).iloc[0].drop(["bound", "norm"]).to_dict()
        else:
            row["certified"] = [_share(eps, facts.certified(bound, eps)) for eps in facts.radii]
            row["statuses"] = [facts.statuses(bound, None if sought else eps) for eps in facts.radii or [math.nan]]
        table.append(row)
    return table


def _share(eps: float, rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {"eps": eps, "k": rate.k, "n": rate.n, "value": rate.value, "low": low, "high": high}
