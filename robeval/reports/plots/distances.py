"""P5: the smallest distance that broke each image, and P3: how many passes and restarts it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robeval.core.numbers import pretty
from robeval.reports.curve import COLOURS
from robeval.reports.frames import AttackFacts
from robeval.reports.groups import NORM, Group
from robeval.reports.picture import Picture, label
from robeval.reports.stats import Rate
from robeval.reports.tables import Cell, Table

BINS = 24


def distances(groups: Sequence[Group]) -> list[Picture]:
    """P5, one histogram per group: broken images by distance, with those that stand as a bar of their own."""
    return [_histogram(g) for g in groups if g.attacks]


def _histogram(g: Group) -> Picture:
    curve = g.curve()
    found = curve.distances[np.isfinite(curve.distances) & (curve.distances > 0)]
    standing = int(np.isinf(curve.distances).sum())
    wrong = int((curve.distances == 0).sum())
    counts, edges = np.histogram(found, bins=BINS, range=(0, curve.end or 1.0))
    rows: list[dict[str, Cell]] = [{"from": 0.0, "to": 0.0, "images": wrong, "what": "misclassified when clean"}]
    rows += [
        {"from": float(a), "to": float(b), "images": int(k), "what": "broken"}
        for a, b, k in zip(edges, edges[1:], counts, strict=False)
    ]
    rows.append({"from": curve.end, "to": None, "images": standing, "what": "never broken"})

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        width = edges[1] - edges[0]
        axes.bar(edges[:-1], counts, width=0.92 * width, align="edge", color=COLOURS[1], label="broken")
        axes.bar([-1.5 * width], [wrong], width=width, color=COLOURS[4], label="misclassified when clean")
        axes.bar([edges[-1] + 1.5 * width], [standing], width=width, color=COLOURS[0], label="never broken")
        axes.set_xlabel(f"smallest {NORM[g.norm]} distance found, pixels in [0, 1]")
        axes.set_ylabel("images")
        axes.legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), columnspacing=1)  # never over a bar

    return Picture(
        f"distances-{g.key}",
        f"{g.name}: smallest distance that broke each image",
        f"{len(found)} of {len(curve.distances)} images were broken at these distances; {standing} were never broken.",
        Table("", ["from", "to", "images", "what"], rows),
        paint,
        (4.6, 2.8),
    )


def passes(groups: Sequence[Group]) -> list[Picture]:
    """P3, one picture per attack run and radius: accuracy against forward passes, each attack on its own."""
    return [
        p
        for g in groups
        for number, f in enumerate(g.attacks)
        for eps in f.radii
        if (p := _passes(g, f, eps, number)) is not None
    ]


def _passes(g: Group, f: AttackFacts, eps: float, number: int) -> Picture | None:
    n, lines = len(f.clean), []
    hits = f.hits(eps)
    for a in f.per_attack(eps):
        mine = f.ran(a.label, eps)
        if not a.alone or not len(mine):
            continue
        at = hits.loc[hits["attack"] == a.label].set_index("index")["first_success_forward"]
        at = at[at.index.isin(set(mine["index"]))].clip(lower=1).sort_values()
        lines.append((a.label, at.to_numpy(float), int(mine["forwards"].max())))
    if not lines:
        return None
    correct = f.clean_accuracy.k
    rows: list[dict[str, Cell]] = []
    for name, at, _ in lines:
        rows.append({"model": g.name, "attack": name, "forwards": 0, "robust": Rate(correct, n)})
        steps, counts = np.unique(at, return_counts=True)
        left = correct - np.cumsum(counts)
        rows += [
            {"model": g.name, "attack": name, "forwards": int(s), "robust": Rate(int(k), n)}
            for s, k in zip(steps, left, strict=True)
        ]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for k, (name, at, most) in enumerate(lines):
            x = np.concatenate([[1.0], at, [max(most, 1.0)]])
            y = correct - np.concatenate([[0.0], np.arange(1, len(at) + 1), [len(at)]])
            axes.step(x, 100 * y / n, where="post", color=COLOURS[k % len(COLOURS)], label=" " + label(name))
        axes.set_xscale("log")
        axes.set_ylim(0, 102)
        axes.set_xlabel("forward passes of an image until its first adversarial point")
        axes.set_ylabel("robust accuracy <=, %")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(fontsize=8)

    return Picture(
        f"passes-{g.key}-{number}-{pretty(eps).replace('/', 'of')}",
        f"{g.name}: accuracy against passes, {f.norm} eps {pretty(eps)}",
        "Attacks that saw every correct image. A line that still falls at its right end belongs to an attack that was "
        "stopped too early.",
        Table("", ["model", "attack", "forwards", "robust"], rows),
        paint,
    )
