"""P9: the covariance of adversarial perturbations against the distance of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robeval.reports.curve import COLOURS
from robeval.reports.groups import Group
from robeval.reports.picture import INK, Picture, label
from robeval.reports.plots.evidence import evidence
from robeval.reports.tables import Cell, Table


def covariance(groups: Sequence[Group]) -> list[Picture]:
    """One picture per group with a stored covariance; values as shares of that at distance 0."""
    found = []
    for g in groups:
        said = evidence(g, "P9")
        if said:
            found.append(_picture(g, said))
    return found


def _picture(g: Group, said: dict[str, Any]) -> Picture:
    sides = {name: said[name] for name in ("within", "between") if said[name]}
    rows: list[dict[str, Cell]] = [
        {"channels": name, "distance": r, "covariance": value}
        for name, values in sides.items()
        for r, value in enumerate(values)
    ]
    unit = said["within"][0] or 1.0

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for k, (name, values) in enumerate(sides.items()):
            axes.plot([v / unit for v in values], "o-", color=COLOURS[k], markersize=4, label=label(f"{name} channels"))
        axes.axhline(0, color=INK, linewidth=0.5)
        if said["decay"] is not None:
            axes.axvline(said["decay"], color=INK, linewidth=0.8, linestyle=":", label="decay length")
        axes.set_xlabel("distance of two pixels, pixels")
        axes.set_ylabel("covariance, share of that at 0")
        axes.legend(fontsize=8)

    decay = "is not reached" if said["decay"] is None else f"is {said['decay']} pixels"
    return Picture(
        f"covariance-{g.key}",
        f"{g.name}: covariance of PGD perturbations",
        f"Over {said['images']} images. The decay length (to 1/e) {decay}; the second moment is "
        f"{said['moment_over_mean']:.3g} times that of the mean perturbation.",
        Table("", ["channels", "distance", "covariance"], rows),
        paint,
        (4.6, 2.9),
    )
