"""What bounds say beside an attack run on the same model, images and norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robeval.reports.certificates import CertificateFacts
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate
from robeval.store.runstore import RunStore

if TYPE_CHECKING:
    from robeval.reports.sandwich import Sandwich


def _subject(manifest: dict[str, Any]) -> tuple[str, str, str]:
    """What a run is about: model, data set and norm. Runs about the same may stand in one row."""
    return manifest["model"]["fingerprint"], manifest["data"]["name"], manifest["threat"]["norm"]


def estimates(stores: list[RunStore], facts: AttackFacts) -> dict[str, float | Rate]:
    """Mean radius of each estimated bound of the same model, images and norm, and the share that the attacks refute.

    Of several runs of one bound, the one over the same images as the attack counts, else the last.
    """
    cells: dict[str, float | Rate] = {}
    distance = facts.distances()
    images = facts.manifest["data"]["fingerprint"]
    for store in sorted(_bounds_on(stores, facts), key=lambda s: bool(s.manifest()["data"]["fingerprint"] == images)):
        certificates = CertificateFacts(store)
        for bound in certificates.of_kind("estimate"):
            if certificates.top[bound] > 1:  # attacks ask for the best class
                continue
            rows = certificates.rows(bound)
            cells[f"{bound} (ESTIMATE) mean"] = float(rows["radius"].mean())
            both = rows.join(distance.rename("found"), how="inner")
            refuted = both["found"] < both["radius"]
            cells[f"{bound} attacked inside"] = Rate(int(refuted.sum()), len(both))
    return cells


def _bounds_on(stores: list[RunStore], facts: AttackFacts) -> list[RunStore]:
    """Runs of bounds about what an attack run is about."""
    return [
        s for s in stores if s.manifest()["kind"] == "certify" and _subject(s.manifest()) == _subject(facts.manifest)
    ]


def proven(stores: list[RunStore], facts: AttackFacts) -> Sandwich | None:
    """The proofs about the images of an attack run; none where there are none.

    Raises:
        Contradicted: one of the attacks landed inside one of the proofs.
    """
    from robeval.reports.sandwich import insist, sandwiches  # it makes tables too

    mine = [s for s in _bounds_on(stores, facts) if CertificateFacts(s).of_kind("proof")]
    mine = [s for s in mine if CertificateFacts(s).top_k == 1]
    if not mine:
        return None
    found = sandwiches([*mine, facts.store])
    insist(found)
    return found[0]
