"""Two attack runs over the same images, image by image: where they agree, and whether the difference is more than luck.

Both kinds of question are asked of the same records: two models under the same attacks, or two attacks on one model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from robeval.core.errors import UsageError
from robeval.core.numbers import pretty
from robeval.reports.diagnoses import Diagnosed, beside
from robeval.reports.frames import ABS, REL, AttackFacts
from robeval.reports.paired import holm, mcnemar, newcombe
from robeval.reports.stats import Rate
from robeval.reports.tables import Cell, Table, provenance
from robeval.reports.verdict import UNDIAGNOSED
from robeval.store.runstore import RunStore

#: Fewer differing images than this cannot reach p < 0.05, whatever they say.
FEWEST = 6


@dataclass(frozen=True)
class Agreement:
    """What two runs say of the same images at one radius.

    Args:
        eps: The radius.
        both: Ids of the images that are broken in both runs; misclassified ones count as broken.
        only_a: Broken in A alone.
        only_b: Broken in B alone.
        neither: Broken in neither.
        unknown: Images left out because a run could not evaluate or has not seen them.
    """

    eps: float
    both: list[int]
    only_a: list[int]
    only_b: list[int]
    neither: list[int]
    unknown: int

    @property
    def images(self) -> int:
        """Images that count."""
        return len(self.both) + len(self.only_a) + len(self.only_b) + len(self.neither)

    @property
    def p(self) -> float:
        """Of McNemar's exact test."""
        return mcnemar(len(self.only_a), len(self.only_b))

    @property
    def robust(self) -> tuple[Rate, Rate]:
        """Images that stand in A, and in B."""
        stand = len(self.neither)
        return Rate(stand + len(self.only_b), self.images), Rate(stand + len(self.only_a), self.images)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the robust accuracy in A minus that in B."""
        return newcombe(len(self.neither), len(self.only_b), len(self.only_a), len(self.both))


def agreement(a: AttackFacts, b: AttackFacts, eps: float) -> Agreement:
    """Sort the images by who broke them at this radius."""
    (stands_a, known_a), (stands_b, known_b) = standing(a, eps), standing(b, eps)
    ids = sorted(known_a & known_b)
    cells: dict[tuple[bool, bool], list[int]] = {(x, y): [] for x in (True, False) for y in (True, False)}
    for i in ids:
        cells[bool(stands_a[i]), bool(stands_b[i])].append(i)
    shared = a.ids & b.ids
    unknown = len(shared) - len(ids)
    return Agreement(eps, cells[False, False], cells[False, True], cells[True, False], cells[True, True], unknown)


def _same_images(a: AttackFacts, b: AttackFacts) -> int:
    """How many images only one of two runs was made for.

    Runs over other subsets are matched by the name of the set and the ids; labels must agree, pixels are not at hand.

    Raises:
        UsageError: another set, no image in both, or one with another label (T04).
    """
    data_a, data_b = a.manifest["data"], b.manifest["data"]
    if data_a["fingerprint"] == data_b["fingerprint"]:
        return 0
    shared = a.ids & b.ids
    seen = list(a.clean.index.intersection(b.clean.index))
    differ = bool((a.clean.loc[seen, "label"] != b.clean.loc[seen, "label"]).any())
    if data_a["name"] != data_b["name"] or not shared or differ:
        names = [f"{d['name']} {d.get('subset') or 'all images'}" for d in (data_a, data_b)]
        raise UsageError(
            f"the runs are not over the same images: {names[0]} and {names[1]}",
            code="T04",
            where=f"sha256 {data_a['fingerprint'][:12]} and {data_b['fingerprint'][:12]}",
            do="run both with the same --data, --split and --images",
        )
    return len(a.ids ^ b.ids)


def standing(f: AttackFacts, eps: float) -> tuple[pd.Series, set[int]]:
    """Per image: does it stand; and the images of which that is known."""
    stands = f.standing(eps)
    failed = f.attacks[(f.attacks["error"] != "") & (f.attacks["eps"] >= eps)]["index"]
    lost = set(failed) & set(stands.index[stands])
    return stands, {int(i) for i in stands.index if i not in lost}


class Comparison:
    """Two runs that can be compared.

    Two models are compared with what their diagnoses say and broke; two runs on one model by their own attacks alone.

    Args:
        a: An attack run.
        b: Another one over some of the same images in the same norm.

    Raises:
        UsageError: no image in common (T04), another norm (T01), or no radius in common (T05).
    """

    def __init__(self, a: RunStore, b: RunStore):
        models = [store.manifest()["model"]["fingerprint"] for store in (a, b)]
        self.same_model = models[0] == models[1]  # the runs differ in the attack, not in the model
        self.sides: tuple[Diagnosed, Diagnosed] = (
            beside(a, lowered=not self.same_model), beside(b, lowered=not self.same_model)
        )  # fmt: skip
        self.a, self.b = (side.facts for side in self.sides)
        self.dropped = _same_images(self.a, self.b)
        if self.a.norm != self.b.norm:
            raise UsageError(
                f"rows of different threat models cannot share a column: {self.a.norm}, {self.b.norm}", code="T01"
            )
        self.agreements = [agreement(self.a, self.b, eps) for eps in self._common_radii()]

    @property
    def tested(self) -> bool:
        """A p-value has a meaning: attacks on one model, or two models whose diagnoses found no failure."""
        return self.same_model or all(side.comparable for side in self.sides)

    def _common_radii(self) -> list[float]:
        """A run that searched nearest images alone has an answer at every radius."""
        radii_a, radii_b = self.a.radii, self.b.radii
        if not radii_a or not radii_b:
            return radii_a or radii_b
        common = [eps for eps in radii_a if any(math.isclose(eps, other, rel_tol=1e-9) for other in radii_b)]
        if not common:
            said = [", ".join(pretty(eps) for eps in radii) for radii in (radii_a, radii_b)]
            raise UsageError(
                f"the runs have no eps in common: {said[0]} and {said[1]}",
                code="T05",
                do="attack both at one --eps, or with attacks that search the nearest image",
            )
        return common

    def tables(self) -> dict[str, Table]:
        """The comparison as tables: ``agreement``, ``images`` and ``runs``."""
        return {"agreement": self._agreement_table(), "images": self._images_table(), "runs": self._runs_table()}

    @property
    def title(self) -> str:
        """What is compared."""
        a, b = self.a.manifest["model"]["name"], self.b.manifest["model"]["name"]
        if self.same_model:
            return f"Two attack runs on {a} in {self.a.norm}: A {_attacks(self.a)}; B {_attacks(self.b)}"
        return f"Two models in {self.a.norm}: A {a}, B {b}"

    def _agreement_table(self) -> Table:
        adjusted: Sequence[Cell] = (
            holm([x.p for x in self.agreements]) if self.tested else ["withheld"] * len(self.agreements)
        )
        rows: list[dict[str, Cell]] = []
        for x, p_holm in zip(self.agreements, adjusted, strict=True):
            (robust_a, robust_b), (low, high) = x.robust, x.interval
            row: dict[str, Cell] = {"eps": pretty(x.eps), "A robust <=": robust_a, "B robust <=": robust_b}
            row |= {"A - B": robust_a.value - robust_b.value, "low": low, "high": high}
            row |= {"both broken": len(x.both), "only A": len(x.only_a), "only B": len(x.only_b)}
            row |= {"neither": len(x.neither), "p": x.p if self.tested else "withheld"}
            rows.append(row | ({"p (Holm)": p_holm} if len(adjusted) > 1 else {}))
        columns = list(rows[0]) if rows else ["eps"]
        notes = [
            "A - B: difference of robust accuracies with Newcombe's paired 95 % interval; p: McNemar's exact test",
            "both compare upper bounds under these attacks: a model that hides its gradients can win unfairly",
        ]
        notes += [] if self.same_model else diagnoses_of("AB", self.sides)
        if self.dropped:
            notes.append(f"{self.dropped} images that only one of the runs has are left out")
        if not rows:
            notes = ["neither run has a radius; the distances are in the table of the runs"]
        if not self.same_model and self.a.labels != self.b.labels:
            notes.append(f"the attacks differ too: A {_attacks(self.a)}; B {_attacks(self.b)}")
        for x in self.agreements:
            few = len(x.only_a) + len(x.only_b)
            if few < FEWEST:
                notes.append(f"eps {pretty(x.eps)}: {few} images differ; under {FEWEST} no split reaches p < 0.05")
            if x.unknown:
                notes.append(
                    f"eps {pretty(x.eps)}: {x.unknown} images are left out, not seen or not evaluated in a run"
                )
        return Table(self.title, columns, rows, [*notes, provenance(self.a), provenance(self.b)])

    def _images_table(self) -> Table:
        """Images that one run broke and the other did not, with the attacks that did it."""
        rows: list[dict[str, Cell]] = []
        for x in self.agreements:
            for name, f, ids in (("A", self.a, x.only_a), ("B", self.b, x.only_b)):
                hits, distances = f.hits(x.eps), f.distances()
                for i in ids:
                    mine = hits[hits["index"] == i]
                    by = ", ".join(dict.fromkeys(mine["attack"])) or "no attack: misclassified"
                    distance = float(distances[i])
                    row: dict[str, Cell] = {"eps": pretty(x.eps), "image": i, "label": int(f.clean["label"][i])}
                    rows.append(row | {"broken in": name, "by": by, "distance": distance})
        columns = ["eps", "image", "label", "broken in", "by", "distance"]
        return Table("Images that one run broke and the other did not", columns, rows)

    def _runs_table(self) -> Table:
        """What each run cost, and whose adversarial images lie closer."""
        distance_a, distance_b = (f.distances() for f in (self.a, self.b))
        pair = pd.DataFrame({"A": distance_a, "B": distance_b}).replace([np.inf], np.nan).dropna()
        pair = pair[(pair > 0).all(axis=1)]  # misclassified images have no distance to compare
        rows: list[dict[str, Cell]] = []
        for name, other, f in (("A", "B", self.a), ("B", "A", self.b)):
            mean, found = f.mean_distance()
            closer = pair[name] < pair[other] * (1 - REL) - ABS
            row: dict[str, Cell] = {"run": name, "model": f.manifest["model"]["name"], "attacks": _attacks(f)}
            row |= {"clean": f.clean_accuracy, "mean distance": mean, "found": f"{found}/{len(f.clean)}"}
            row |= {"closer": Rate(int(closer.sum()), len(pair))}
            row |= {"ratio": float((pair[name] / pair[other]).median()) if len(pair) else math.nan}
            rows.append(row | f.cost())
        notes = [
            f"closer, ratio: over the {len(pair)} images where both found an adversarial one; ratio is the median of "
            "its distance over the other's"
        ]
        return Table("Distances and costs", list(rows[0]), rows, notes)


def diagnoses_of(names: Sequence[str], sides: Sequence[Diagnosed]) -> list[str]:
    """What the diagnoses of compared models say, and that p is withheld where one of them says no good."""
    said = [
        f"{name} {UNDIAGNOSED if (end := d.verdict()) is None else end.short}"
        for name, d in zip(names, sides, strict=True)
    ]
    notes = ["diagnostics: " + "; ".join(said)]
    if not all(d.comparable for d in sides):
        notes.append("p is withheld: it needs a diagnosis without a failure on every side (robeval diagnose MODEL)")
    return notes


def _attacks(f: AttackFacts) -> str:
    return ", ".join(f.labels) + ("" if f.complete else " (INCOMPLETE)")
