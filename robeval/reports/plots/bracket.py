"""What is known of every image: the radius of a bound below, the distance of an adversarial image above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from robeval.reports.curve import COLOURS
from robeval.reports.groups import NORM, Group
from robeval.reports.picture import INK, Picture, label
from robeval.reports.tables import Cell, Table

MARKS = ("o", "s", "^", "D", "v")


def bracket(groups: Sequence[Group]) -> list[Picture]:
    """One picture per group with a bound."""
    return [p for g in groups if (p := _picture(g)) is not None]


def sides(g: Group) -> pd.DataFrame:
    """Per image: ``distance`` of the nearest adversarial image, and the radius of each bound; nan where not known."""
    columns: dict[str, pd.Series] = {}
    if g.attacks:
        columns["distance"] = pd.concat([f.distances() for f in g.attacks], axis=1).min(axis=1)
    for facts in g.certificates:
        for bound, kind in facts.kinds.items():
            columns[f"{bound} ({kind.upper() if kind == 'estimate' else kind})"] = facts.reach(bound)
    return pd.DataFrame(columns)


def _picture(g: Group) -> Picture | None:
    frame = sides(g)
    bounds = [c for c in frame.columns if c != "distance"]
    if not bounds or not len(frame):
        return None
    order = [c for c in ("distance", *bounds) if c in frame]
    frame = frame.sort_values(order, kind="stable", na_position="last")
    known = frame.to_numpy(float)
    finite = known[np.isfinite(known)]
    top = float(finite.max()) * 1.12 if len(finite) and finite.max() > 0 else 1.0
    rows: list[dict[str, Cell]] = [
        {"model": g.name, "image": int(index), **{c: _plain(row[c]) for c in order}} for index, row in frame.iterrows()
    ]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        x = np.arange(len(frame))
        if "distance" in frame:
            above = frame["distance"].to_numpy(float)
            seen = np.isfinite(above)
            axes.plot(x[seen], above[seen], ".", color=COLOURS[1], markersize=4, label="attack: nearest image found")
            never = x[np.isinf(above)]
            if len(never):
                axes.plot(never, [0.97 * top] * len(never), "|", color=COLOURS[1], label="attack: none found")
        for k, name in enumerate(bounds):
            below, proof = frame[name].to_numpy(float), not name.endswith("(ESTIMATE)")
            colour = COLOURS[(0, 2, 3, 4, 5)[k % 5]]
            fill = colour if proof else "none"
            axes.plot(
                x, below, MARKS[k % len(MARKS)], color=colour, markersize=2.5, markerfacecolor=fill,
                markeredgewidth=0.6, label=label(name),
            )  # fmt: skip
        axes.set_ylim(0, top)
        axes.set_xlim(-1, len(frame))
        axes.set_xlabel("images, sorted")
        axes.set_ylabel(f"distance in {NORM[g.norm]}, pixels in [0, 1]")
        axes.legend(loc="upper left", fontsize=8, labelcolor=INK)

    estimates = [b for b in bounds if "(ESTIMATE)" in b]
    return Picture(
        f"bracket-{g.key}",
        f"{g.name}: per-image bracket in {NORM[g.norm]}",
        "Every image has a bound below and the nearest adversarial image that was found above; misclassified images "
        "stand at 0." + (" Hollow marks are estimates, which prove nothing." if estimates else ""),
        Table("", ["model", "image", *order], rows),
        paint,
    )


def _plain(value: float) -> Cell:
    """A number as a table holds it; nothing where nothing is known."""
    return None if math.isnan(value) else float(value)
