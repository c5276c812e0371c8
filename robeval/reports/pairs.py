"""Several attack runs over the same images: do they differ at all, and which pairs do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from robeval.core.numbers import pretty
from robeval.reports.compare import Agreement, Comparison, diagnoses_of, standing
from robeval.reports.paired import cochran, holm
from robeval.reports.tables import Cell, Table, provenance
from robeval.store.runstore import RunStore

#: Letters of the runs, in the order given.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Pairs:
    """Every pair of several runs, with p-values adjusted for their number.

    Args:
        stores: Three attack runs or more, over some of the same images in the same norm.

    Raises:
        UsageError: as :class:`robeval.reports.compare.Comparison`, for any pair.
    """

    def __init__(self, stores: Sequence[RunStore]):
        self.found = {
            (i, j): Comparison(stores[i], stores[j]) for i, j in combinations(range(len(stores)), 2)
        }  # fmt: skip
        first = [self.found[0, j] for j in range(1, len(stores))]
        self.sides = [first[0].sides[0], *(c.sides[1] for c in first)]

    def tables(self) -> dict[str, Table]:
        """The comparison as a table: ``pairs``."""
        lines = [(i, j, c, x) for (i, j), c in self.found.items() for x in c.agreements]
        lines.sort(key=lambda line: line[3].eps)  # radii together, pairs in their order
        tested = [x.p for _, _, c, x in lines if c.tested]
        adjusted = iter(holm(tested))
        rows: list[dict[str, Cell]] = []
        for i, j, c, x in lines:
            row: dict[str, Cell] = {"eps": pretty(x.eps), "pair": f"{LETTERS[i]} - {LETTERS[j]}"}
            row |= _difference(x)
            row |= {"p": x.p, "p (Holm)": next(adjusted)} if c.tested else dict.fromkeys(("p", "p (Holm)"), "withheld")
            rows.append(row)
        names = [f"{a} {s.facts.manifest['model']['name']}" for a, s in zip(LETTERS, self.sides, strict=False)]
        notes = [
            "difference: of robust accuracies, upper bounds under these attacks, with Newcombe's paired 95 % interval; "
            f"p: McNemar's exact test; p (Holm): adjusted for all {len(tested)} tests of the table",
            *self._cochran(),
        ]
        if not all(c.same_model for c in self.found.values()):
            notes += diagnoses_of(LETTERS[: len(self.sides)], self.sides)
        dropped = max(c.dropped for c in self.found.values())
        notes += [f"pairs leave out up to {dropped} images that only one of them has"] if dropped else []
        notes += [f"{a}: {provenance(s.facts)}" for a, s in zip(LETTERS, self.sides, strict=False)]
        title = f"{len(self.sides)} attack runs in {self.sides[0].facts.norm}: {', '.join(names)}"
        columns = list(rows[0]) if rows else ["eps"]
        return {"pairs": Table(title, columns, rows, notes)}

    def _cochran(self) -> list[str]:
        """Per radius that all runs have in common: do the runs differ at all?"""
        if not all(c.tested for c in self.found.values()):
            return []
        common = [x.eps for x in self.found[0, 1].agreements]
        radii = [eps for eps in common if all(any(x.eps == eps for x in c.agreements) for c in self.found.values())]
        notes = []
        for eps in radii:
            states = [standing(s.facts, eps) for s in self.sides]
            ids = sorted(set.intersection(*(known for _, known in states)))
            q, p = cochran(
                np.array([[bool(stands[i]) for stands, _ in states] for i in ids], bool).reshape(len(ids), -1)
            )
            p_text = f"{p:.2g}" if p >= 1e-4 else f"{p:.1e}"
            notes.append(
                f"eps {pretty(eps)}: Cochran's Q {q:.2f} over {len(ids)} images that all runs decided, p = {p_text}"
            )
        return notes


def _difference(x: Agreement) -> dict[str, Any]:
    (robust_a, robust_b), (low, high) = x.robust, x.interval
    return {
        "first robust <=": robust_a, "second robust <=": robust_b, "difference": robust_a.value - robust_b.value,
        "low": low, "high": high, "only first broken": len(x.only_a), "only second broken": len(x.only_b),
    }  # fmt: skip
