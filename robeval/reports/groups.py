"""Runs about the same model, images and norm, brought together for one verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from robeval.core.records import COUNTEREXAMPLES
from robeval.reports.certificates import CertificateFacts
from robeval.reports.curve import Curve, merge
from robeval.reports.diagnoses import Diagnosed, diagnosed
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate
from robeval.reports.tables import one_name_one_model
from robeval.reports.verdict import NORM, UNDIAGNOSED, headline
from robeval.store.runstore import RunStore

__all__ = ["NORM", "Group", "groups"]


@dataclass
class Group:
    """All runs on one model, one set of images and one norm.

    Args:
        name: How the model is called.
        norm: Norm of the threat model.
        manifest: Of one of the runs, for what they share.
        runs: Attack runs, each with its diagnosis.
        certificates: Runs of bounds.
        diagnoses: Runs of diagnostics.
    """

    name: str
    norm: str
    manifest: dict[str, Any]
    runs: list[Diagnosed] = field(default_factory=list)
    certificates: list[CertificateFacts] = field(default_factory=list)
    diagnoses: list[RunStore] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Letters, digits and hyphens that name the group among others of a page."""
        return f"{self.manifest['model']['fingerprint'][:8] or 'model'}-{self.norm}-{self.fingerprint[:6]}"

    @property
    def fingerprint(self) -> str:
        """Of the images."""
        return str(self.manifest["data"]["fingerprint"])

    @property
    def attacks(self) -> list[AttackFacts]:
        """What the attack runs say; what diagnostics broke is among it."""
        return [run.facts for run in self.runs]

    @property
    def radii(self) -> list[float]:
        """Where attacks of a fixed eps ran, ascending."""
        return sorted({r for f in self.attacks for r in f.radii})

    @property
    def diagnosis(self) -> RunStore | None:
        """The diagnosis that counts."""
        return next((run.diagnosis for run in self.runs if run.diagnosis), next(iter(self.diagnoses), None))

    def curve(self) -> Curve:
        """The smallest distance of every image over all attack runs."""
        return merge(self.name, self.attacks)

    def headline(self, eps: float) -> str:
        """The line that stands for the model at a radius, over all attack runs."""
        standing = pd.concat([f.standing(eps) for f in self.attacks], axis=1).fillna(True).all(axis=1)
        gone = sorted({index for f in self.attacks for index in f.lost(eps)} & set(standing.index[standing]))
        proven = {index for f in self.attacks for index in f.proven(eps)} & set(standing.index[standing])
        names = {a.label for f in self.attacks for a in f.per_attack(eps) if a.attacked}
        kept = standing.drop(gone)
        return headline(
            Rate(int(kept.sum()), len(kept)),
            len([name for name in names if not name.startswith(COUNTEREXAMPLES)]),
            self.norm,
            eps,
            self.runs[0].said(eps) if self.runs else UNDIAGNOSED,
            lowered=max(f.lowered(eps) for f in self.attacks),
            unevaluated=len(gone),
            proven=len(proven),
        )

    def about(self) -> str:
        """Such as ``digits/test, all images``."""
        data = self.manifest["data"]
        return f"{data['name']}, {data.get('subset') or 'all images'}"


def groups(stores: list[RunStore]) -> list[Group]:
    """Runs by model, images and norm, in the order of the models' names.

    Raises:
        UsageError: two models of one name (T02).
    """
    one_name_one_model(stores)
    found: dict[tuple[str, str, str], Group] = {}

    def at(manifest: dict[str, Any]) -> Group:
        key = (manifest["model"]["name"], manifest["threat"]["norm"], manifest["data"]["fingerprint"])
        return found.setdefault(key, Group(key[0], key[1], manifest))

    for run in diagnosed(stores):
        at(run.facts.manifest).runs.append(run)
    for store in stores:
        manifest = store.manifest()
        if manifest["kind"] == "certify":
            at(manifest).certificates.append(CertificateFacts(store))
        elif manifest["kind"] == "diagnose":
            at(manifest).diagnoses.append(store)
    return [found[key] for key in sorted(found)]
