"""P1: accuracy against eps, the per-image minimum over all attacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from robeval.reports.curve import Curve, curves, paint
from robeval.reports.groups import NORM, Group
from robeval.reports.picture import Picture
from robeval.reports.tables import Cell, Table


def accuracy(groups: Sequence[Group]) -> list[Picture]:
    """One picture per norm, a curve per model and set of images."""
    pictures = []
    for norm in dict.fromkeys(g.norm for g in groups if g.attacks):
        found = curves([f.store for g in groups if g.norm == norm for f in g.attacks], norm)
        rows: list[dict[str, Cell]] = [
            {"model": c.name, "eps": eps, "robust": rate} for c in found for eps, rate in c.steps()
        ]
        readings = [n for c in found for n in c.notes if "upper bound" in n]
        pictures.append(
            Picture(
                f"accuracy-{norm}",
                f"Accuracy against eps in {NORM[norm]}",
                "Images that no attack broke within eps, an upper bound at every eps; band: 95 % Wilson interval of "
                "the sample. " + " ".join(f"{r}." for r in readings),
                Table("", ["model", "eps", "robust"], rows),
                partial(_paint, found, NORM[norm]),
            )
        )
    return pictures


def _paint(found: list[Curve], norm: str, figure: Any) -> None:
    paint(figure.add_subplot(), found, norm)
