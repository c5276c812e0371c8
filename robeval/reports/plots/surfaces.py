"""P4 and P7: the loss around images, and around the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robeval.reports.groups import Group
from robeval.reports.picture import Picture
from robeval.reports.plots.evidence import evidence
from robeval.reports.tables import Cell, Table

LOSSES = {"ce": "cross-entropy", "cw": "margin, broken above 0"}


def surface(groups: Sequence[Group]) -> list[Picture]:
    """P4: per image a row, per loss a column."""
    found = []
    for g in groups:
        said = evidence(g, "P4")
        if said and said["images"]:
            found.append(_around_images(g, said))
    return found


def _around_images(g: Group, said: dict[str, Any]) -> Picture:
    axis, images = said["axis"], said["images"]
    rows: list[dict[str, Cell]] = [
        {"image": one["index"], "gradient sign": a, "random signs": b, "ce": one["ce"][j][i], "margin": one["cw"][j][i]}
        for one in images
        for j, b in enumerate(axis)
        for i, a in enumerate(axis)
    ]

    def paint(figure: Any) -> None:
        grid = figure.subplots(2, len(images), squeeze=False, sharex=True, sharey=True)
        for across, one in enumerate(images):
            for down, (loss, name) in enumerate(LOSSES.items()):
                axes = grid[down][across]
                _heat(axes, axis, np.array(one[loss]), zero=loss == "cw")
                axes.set_title(f"image {one['index']}" if down == 0 else "", fontsize=8)
                if across == 0:
                    axes.set_ylabel(f"{name}\nrandom signs, eps", fontsize=7)
                if down == 1:
                    axes.set_xlabel("gradient sign, eps", fontsize=7)
                axes.tick_params(labelsize=7)

    return Picture(
        f"surface-{g.key}",
        f"{g.name}: the loss around {len(images)} images",
        "The image stands in the middle, both axes reach to eps. Bright is a high loss; where the line is drawn the "
        "margin is 0, and beyond it the image is misclassified.",
        Table("", ["image", "gradient sign", "random signs", "ce", "margin"], rows),
        paint,
        (max(2.6, 1.45 * len(images)), 3.4),
    )


def _heat(axes: Any, axis: Sequence[float], values: Any, *, zero: bool) -> None:
    """A field of colours, an image inside the picture; with the line of 0 where it has one."""
    ends = (axis[0], axis[-1], axis[0], axis[-1])
    axes.imshow(values, origin="lower", extent=ends, cmap="cividis", aspect="equal", interpolation="nearest")
    if zero and values.min() < 0 < values.max():
        axes.contour(axis, axis, values, levels=[0], colors="white", linewidths=1.2)


def weights(groups: Sequence[Group]) -> list[Picture]:
    """P7: the mean loss on a plane through the weights."""
    found = []
    for g in groups:
        said = evidence(g, "P7")
        if said:
            found.append(_around_weights(g, said))
    return found


def _around_weights(g: Group, said: dict[str, Any]) -> Picture:
    axis, values = said["axis"], np.array(said["ce"])
    rows: list[dict[str, Cell]] = [
        {"first": a, "second": b, "ce": float(values[j, i])} for j, b in enumerate(axis) for i, a in enumerate(axis)
    ]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        levels = np.unique(np.quantile(values, np.linspace(0, 1, 13)))
        if len(levels) > 1:
            shades = axes.contourf(axis, axis, values, levels=levels, cmap="cividis")
            figure.colorbar(shades, ax=axes, label="mean cross-entropy")
        axes.plot([0], [0], "+", color="white", markersize=9)
        axes.set_xlabel("first random direction, filter-normalised")
        axes.set_ylabel("second")

    return Picture(
        f"weights-{g.key}",
        f"{g.name}: the loss around the weights",
        f"Mean cross-entropy of {said['images']} clean images. The trained weights are the cross; 1 moves every filter "
        "by its own norm. Levels are quantiles.",
        Table("", ["first", "second", "ce"], rows),
        paint,
        (4.4, 3.4),
    )
