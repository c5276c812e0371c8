"""Proofs below, attacks above: per image the distance to the nearest adversarial image lies between the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robeval.core.errors import Contradicted, FileRefused
from robeval.reports.certificates import CertificateFacts
from robeval.reports.curve import label, ticks
from robeval.reports.falsify import falsify, hits
from robeval.reports.frames import ABS, REL, AttackFacts
from robeval.reports.stats import Rate
from robeval.reports.tables import Cell, Table, one_name_one_model, one_norm
from robeval.reports.writers import csv
from robeval.store.runstore import RunStore

#: Columns of the file of images.
IMAGES = (
    "model", "norm", "index", "label", "correct", "proof", "proof_by", "proof_run", "attack", "attack_by", "attack_run",
    "attack_margin", "gap", "alarm",
)  # fmt: skip


@dataclass(frozen=True)
class Sandwich:
    """One model on one data set in one norm.

    Args:
        model: Its name.
        norm: Norm of radii and distances.
        images: One row per image that both sides have seen: the columns of :data:`IMAGES`.
        radii: Radii that a proof or an attack was asked for.
        proofs: The runs of proofs.
        attacks: The attack runs.
        others: Runs with estimates or probabilistic bounds.
    """

    model: str
    norm: str
    images: pd.DataFrame
    radii: list[float]
    proofs: list[CertificateFacts]
    attacks: list[AttackFacts]
    others: list[CertificateFacts]

    def certified(self, eps: float) -> Rate:
        """Images that some proof covers at eps: a lower bound of robust accuracy."""
        covered = self.images["correct"] & (self.images["proof"] >= eps)
        return Rate(int(covered.sum()), len(self.images))

    def attacked(self, eps: float) -> Rate:
        """Images that no attack broke at eps: an upper bound of robust accuracy."""
        return Rate(int((self.images["attack"] > eps * (1 + REL) + ABS).sum()), len(self.images))

    @property
    def alarms(self) -> pd.DataFrame:
        """Images with an adversarial image closer than a proof allows."""
        return self.images[self.images["alarm"]]


def sandwiches(stores: Sequence[RunStore], norm: str | None = None) -> list[Sandwich]:
    """The proofs and the attacks that speak of the same model, data set and norm.

    A found adversarial image counts in every norm, since its distance is known in all. Proofs that the class stays
    among the k best are left out: attacks ask for the best.

    Args:
        stores: Certify and attack runs.
        norm: Norm, needed when the proofs have several.

    Raises:
        UsageError: several norms (T01), or two models of one name (T02).
        FileRefused: no proof, or no attack on what is proven (R05).
    """
    certificates = [CertificateFacts(s) for s in stores if s.manifest()["kind"] == "certify"]
    certificates = [c for c in certificates if norm in (None, c.norm) and c.top_k == 1]
    proofs = [c for c in certificates if c.of_kind("proof")]
    if not proofs:
        raise FileRefused(
            "no proof among these" + (f" in {norm}" if norm else ""),
            code="R05",
            why="estimates and probabilistic bounds say nothing certain about this classifier",
            do="robeval certify MODEL --bound crown",
        )
    one_norm({c.norm for c in proofs})
    attacks = [AttackFacts(s) for s in stores if s.manifest()["kind"] == "attack"]
    one_name_one_model([c.store for c in proofs])
    found = []
    for subject in dict.fromkeys(_subject(c.manifest) for c in proofs):
        mine = [c for c in proofs if _subject(c.manifest) == subject]
        against = [a for a in attacks if _subject(a.manifest) == subject]
        if against:
            others = [
                c for c in certificates if _subject(c.manifest) == subject and c.norm == mine[0].norm
                and (c.of_kind("estimate") or c.of_kind("probabilistic"))
            ]  # fmt: skip
            found.append(_join(mine, against, others))
    found = [s for s in found if len(s.images)]
    if not found:
        raise FileRefused(
            "no attack run on the model, the data set and the images that a proof speaks of",
            code="R05",
            do="robeval attack MODEL with the same data, or give the folder of its runs too",
        )
    return found


def _subject(manifest: dict[str, Any]) -> tuple[str, str]:
    return manifest["model"]["fingerprint"], manifest["data"]["name"]


def _join(proofs: list[CertificateFacts], attacks: list[AttackFacts], others: list[CertificateFacts]) -> Sandwich:
    norm, model = proofs[0].norm, proofs[0].manifest["model"]["name"]
    lower = pd.concat(
        [
            facts.rows(bound)
            .assign(proof=facts.reach(bound), proof_by=bound, proof_run=str(facts.store.folder))
            .reset_index()[["index", "label", "clean_correct", "proof", "proof_by", "proof_run"]]
            for facts in proofs
            for bound in facts.of_kind("proof")
        ]
    )
    lower = lower.sort_values("proof", ascending=False, kind="stable").drop_duplicates(["index", "label"])
    clean = pd.concat([a.clean.reset_index()[["index", "label", "clean_correct"]] for a in attacks])
    clean = clean.rename(columns={"clean_correct": "correct"}).drop_duplicates(["index", "label"])
    images = lower.merge(clean, on=["index", "label"]).sort_values("index", kind="stable").reset_index(drop=True)
    column = f"distance_{norm}"
    broken = hits(a.store for a in attacks)
    broken = broken[broken["success"].astype(bool)].sort_values(column, kind="stable")
    broken = broken.drop_duplicates(["index", "label"])[["index", "label", "attack", column, "run", "margin"]]
    broken.columns = pd.Index(["index", "label", "attack_by", "attack", "attack_run", "attack_margin"])
    images = images.merge(broken, on=["index", "label"], how="left")
    images["attack"] = images["attack"].fillna(math.inf).where(images["correct"], 0.0)
    images[["attack_by", "attack_run"]] = images[["attack_by", "attack_run"]].fillna("")
    images["proof_by"] = images["proof_by"].where(images["proof"] > 0, "")
    images["gap"] = images["attack"] - images["proof"]
    images["alarm"] = images["correct"] & (images["attack"] * (1 + REL) + ABS < images["proof"])
    radii = {r for f in proofs for r in f.radii} | {r for a in attacks if a.norm == norm for r in a.radii}
    images = images.assign(model=model, norm=norm)[list(IMAGES)]
    return Sandwich(model, norm, images, sorted(radii), proofs, attacks, others)


def insist(found: Sequence[Sandwich]) -> None:
    """Fail loudly where an attack landed inside a proof: a wrong proof, or a wrong attack record.

    Raises:
        Contradicted: with both records of the worst image.
    """
    alarms = pd.concat([s.alarms for s in found], ignore_index=True)
    if alarms.empty:
        return
    worst = alarms.loc[(alarms["attack"] / alarms["proof"]).idxmin()]
    raise Contradicted(
        f"ALARM: an attack landed inside a proof on {len(alarms)} images of {worst['model']}",
        code="P01",
        where=(
            f"image {worst['index']}: {worst['proof_by']} proves {worst['norm']} {worst['proof']:.6g} in "
            f"{worst['proof_run']}, {worst['attack_by']} broke it at {worst['attack']:.6g} (margin "
            f"{worst['attack_margin']:.3g}) in {worst['attack_run']}"
        ),
        why="one of the two records is wrong; both are kept and no table is made of them",
        do="robeval verify ATTACK_RUN checks the attack; if it holds, the proof has a fault: please report it",
    )


def sandwich_table(found: Sequence[Sandwich], eps: Sequence[float] = ()) -> Table:
    """Per model and eps: what is certified, what is not broken, and what lies between.

    Args:
        found: At least one sandwich.
        eps: Radii of the rows; by default those that were asked for.
    """
    rows: list[dict[str, Cell]] = []
    notes = []
    for s in found:
        ends = s.images.loc[s.images["correct"], ["proof", "attack"]].to_numpy().ravel()
        finite = ends[np.isfinite(ends)]
        grid = list(eps) or s.radii or [e for e in ticks(s.norm, float(finite.max(initial=0.0))) if e > 0]
        for e in grid:
            low, high = s.certified(e), s.attacked(e)
            rows.append(
                {
                    "model": s.model,
                    "eps": label(e, s.norm, s.radii),
                    "certified >=": low,
                    "attacked <=": high,
                    "between": Rate(high.k - low.k, low.n),
                }
            )
        notes.append(_note(s))
    title = f"Robust accuracy in {found[0].norm} lies between the proofs and the attacks"
    return Table(title, ["model", "eps", "certified >=", "attacked <=", "between"], rows, notes)


def _note(s: Sandwich) -> str:
    known = s.images[np.isfinite(s.images["attack"])]
    sides = ", ".join(dict.fromkeys(bound for f in s.proofs for bound in f.of_kind("proof")))
    names = ", ".join(dict.fromkeys(attack for a in s.attacks for attack in a.labels))
    subject, runs = s.proofs[0].manifest, [*(f.store for f in s.proofs), *(a.store for a in s.attacks)]
    return (
        f"{s.model}: sha256 {subject['model']['fingerprint'][:12]}, {subject['data']['name']}, "
        f"{len(s.images)} images that both sides saw; mean proven radius {s.images['proof'].mean():.4g}, mean attack "
        f"distance {known['attack'].mean():.4g} over the {len(known)} where one is known; proofs: {sides}; attacks: "
        f"{names}; {', '.join(str(store.folder) for store in runs)}"
    )


def estimates_table(found: Sequence[Sandwich]) -> Table:
    """The estimates of the same models: their mean radius, and how many images an attack falsified."""
    rows: list[dict[str, Cell]] = []
    for s in found:
        against = hits(a.store for a in s.attacks)
        for facts in s.others:
            for bound in facts.of_kind("estimate"):
                if facts.top[bound] > 1:  # attacks ask for the best class
                    continue
                mine = facts.rows(bound).reset_index()
                told = falsify(mine, against).iloc[0]
                ratio = float(told["worst_ratio"])
                rows.append(
                    {
                        "model": s.model,
                        "ESTIMATE": bound,
                        "mean radius": float(mine["radius"].mean()),
                        "falsified": Rate(int(told["falsified"]), int(told["attacked"])),
                        "worst radius / distance": ratio if math.isfinite(ratio) else None,
                    }
                )
    columns = ["model", "ESTIMATE", "mean radius", "falsified", "worst radius / distance"]
    return Table(
        f"Estimates in {found[0].norm}: sampled constants, no proofs; not falsified says nothing more", columns, rows
    )


def smoothed_table(found: Sequence[Sandwich], eps: Sequence[float] = ()) -> Table:
    """Probabilistic bounds: they speak of the smoothed classifier, not of the network that was attacked."""
    rows: list[dict[str, Cell]] = []
    for s in found:
        for facts in s.others:
            for bound in facts.of_kind("probabilistic"):
                kept = facts.rows(bound)
                wrong = int((kept["status"] == "abstain").sum())
                for e in list(eps) or s.radii or [0.0]:
                    rows.append(
                        {
                            "model": s.model,
                            "PROBABILISTIC": bound,
                            "eps": label(e, s.norm, s.radii),
                            "certified >=": facts.certified(bound, e),
                            "abstained": Rate(wrong, len(kept)),
                            "confidence per image": float(kept["confidence"].iloc[0]),
                        }
                    )
    columns = ["model", "PROBABILISTIC", "eps", "certified >=", "abstained", "confidence per image"]
    return Table(f"The SMOOTHED classifiers in {found[0].norm}, another model each than the one above", columns, rows)


def images_csv(found: Sequence[Sandwich]) -> str:
    """One row per image with both ends and where each stands."""
    rows: list[dict[str, Cell]] = []
    for s in found:
        for row in s.images.to_dict("records"):
            rows.append({str(k): int(v) if isinstance(v, bool | np.bool_) else v for k, v in row.items()})
    return csv(Table("", list(IMAGES), rows))
