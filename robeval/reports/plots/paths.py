"""P2 and P8: loss and success along an attack, and the probabilities along its direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robeval.reports.curve import COLOURS
from robeval.reports.groups import Group
from robeval.reports.picture import BAND, INK, Picture
from robeval.reports.plots.evidence import evidence
from robeval.reports.tables import Cell, Table

NAMES = {"ce": "cross-entropy", "cw": "margin", "dlr": "DLR"}


def paths(groups: Sequence[Group]) -> list[Picture]:
    """P2: median and quartiles of each loss after each step, and the share of images broken so far."""
    found = []
    for g in groups:
        said = evidence(g, "P2")
        if said and said["losses"]:
            found.append(_along_attack(g, said))
    return found


def _along_attack(g: Group, said: dict[str, Any]) -> Picture:
    losses = said["losses"]
    rows: list[dict[str, Cell]] = [
        {"loss": loss, "step": step, **{k: float(one[k][step]) for k in ("low", "median", "high", "broken")}}
        for loss, one in losses.items()
        for step in range(len(one["median"]))
    ]

    def paint(figure: Any) -> None:
        grid = figure.subplots(1, len(losses) + 1)
        for k, (loss, one) in enumerate(losses.items()):
            steps, colour = range(len(one["median"])), COLOURS[k]
            grid[k].plot(steps, one["median"], color=colour)
            grid[k].fill_between(steps, one["low"], one["high"], color=colour, alpha=BAND, linewidth=0)
            grid[k].set_title(NAMES.get(loss, loss), fontsize=8, color=INK)
            grid[-1].plot(steps, [100 * b for b in one["broken"]], color=colour, label=NAMES.get(loss, loss))
        grid[-1].set_title("broken, %", fontsize=8)
        grid[-1].set_ylim(0, 102)
        grid[-1].legend(fontsize=7)
        for axes in grid:
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=7)

    return Picture(
        f"paths-{g.key}",
        f"{g.name}: loss and success from step to step",
        f"PGD on {said['images']} images, one loss per panel: median, and quartiles as a band. A loss that still rises "
        "at the end means too few steps.",
        Table("", ["loss", "step", "low", "median", "high", "broken"], rows),
        paint,
        (1.7 * (len(losses) + 1), 2.3),
    )


def softmax(groups: Sequence[Group]) -> list[Picture]:
    """P8: softmax outputs on the line through an image and its adversarial counterpart."""
    found = []
    for g in groups:
        said = evidence(g, "P8")
        if said and said["images"]:
            found.append(_along_direction(g, said))
    return found


def _along_direction(g: Group, said: dict[str, Any]) -> Picture:
    images, times = said["images"], said["t"]
    rows: list[dict[str, Cell]] = [
        {"image": one["index"], "class": name, "t": t, "probability": p}
        for one in images
        for name, curve in one["probabilities"].items()
        for t, p in zip(times, curve, strict=True)
    ]

    def paint(figure: Any) -> None:
        grid = figure.subplots(1, len(images), squeeze=False, sharey=True)[0]
        for axes, one in zip(grid, images, strict=True):
            for k, (name, curve) in enumerate(one["probabilities"].items()):
                true = int(name) == one["label"]
                axes.plot(times, curve, color=COLOURS[k], linewidth=2.0 if true else 1.2, label=f" {name}")
            axes.axvline(0, color=INK, linewidth=0.5)
            axes.axvline(1, color=INK, linewidth=0.5, linestyle=":")
            axes.set_title(f"image {one['index']}, class {one['label']}", fontsize=8)
            axes.set_xlabel("t", fontsize=8)
            axes.legend(fontsize=6, handlelength=1, loc="center left")
            axes.tick_params(labelsize=7)
        grid[0].set_ylabel("softmax output", fontsize=8)

    return Picture(
        f"softmax-{g.key}",
        f"{g.name}: probabilities along the direction of an attack",
        "At t = 0 the image, at 1 (dotted) the end of PGD; the line goes on far beyond, on both sides. The thick line "
        "is the true class.",
        Table("", ["image", "class", "t", "probability"], rows),
        paint,
        (max(2.6, 1.7 * len(images)), 2.4),
    )
