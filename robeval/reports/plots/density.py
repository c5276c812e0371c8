"""P10: the density of the eigenvalues of the loss's input Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robeval.reports.curve import COLOURS
from robeval.reports.groups import Group
from robeval.reports.picture import INK, Picture
from robeval.reports.plots.evidence import evidence
from robeval.reports.tables import Cell, Table


def density(groups: Sequence[Group]) -> list[Picture]:
    """One picture per group with a stored spectrum."""
    return [_picture(g, said) for g in groups if (said := evidence(g, "P10"))]


def _picture(g: Group, said: dict[str, Any]) -> Picture:
    pairs = list(zip(said["eigenvalue"], said["density"], strict=True))
    rows: list[dict[str, Cell]] = [{"eigenvalue": at, "density": height} for at, height in pairs]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.semilogy(said["eigenvalue"], [max(height, 1e-9) for height in said["density"]], color=COLOURS[0])
        axes.axvline(0, color=INK, linewidth=0.5)
        top = max(said["density"])
        axes.set_ylim(top * 1e-6, top * 2)
        axes.set_xlabel("eigenvalue of the Hessian of the cross-entropy")
        axes.set_ylabel("density")

    largest, least, trace = (sum(said[k]) / len(said["ids"]) for k in ("largest", "least", "trace"))
    return Picture(
        f"density-{g.key}",
        f"{g.name}: curvature of the loss over directions",
        f"An ESTIMATE over {len(said['ids'])} images by stochastic Lanczos quadrature, smoothed. Means over images: "
        f"largest eigenvalue {largest:.3g}, smallest {least:.3g}, trace {trace:.3g}.",
        Table("", ["eigenvalue", "density"], rows),
        paint,
        (4.6, 2.9),
    )
