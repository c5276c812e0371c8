"""How many images each attack left standing, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robeval.core.numbers import pretty
from robeval.reports.curve import COLOURS
from robeval.reports.frames import AttackFacts
from robeval.reports.groups import Group
from robeval.reports.picture import INK, Picture, label
from robeval.reports.stats import Rate
from robeval.reports.tables import Cell, Table


def waterfall(groups: Sequence[Group]) -> list[Picture]:
    """One picture per attack run and radius."""
    return [
        _picture(g, f, eps, number)
        for g in groups
        for number, f in enumerate(g.attacks)
        for eps in f.radii
        if f.labels and len(f.clean)
    ]


def _stages(f: AttackFacts, eps: float) -> list[tuple[str, int, int]]:
    """(what happened, images lost by it, images standing after it)."""
    n, correct = len(f.clean), f.clean_accuracy.k
    entries = f.per_attack(eps)
    left = correct - (correct - f.worst_case(eps).k - sum(a.first for a in entries))
    stages = [("all images", 0, n), ("misclassified when clean", n - correct, correct)]
    if left < correct:
        stages.append(("broken at a smaller eps", correct - left, left))
    for a in entries:
        left -= a.first
        stages.append((a.label, a.first, left))
    return stages


def _picture(g: Group, f: AttackFacts, eps: float, number: int) -> Picture:
    stages, n = _stages(f, eps), len(f.clean)
    rows: list[dict[str, Cell]] = [
        {"model": g.name, "eps": eps, "stage": name, "lost": lost, "standing": Rate(left, n)}
        for name, lost, left in stages
    ]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for k, (_, lost, left) in enumerate(stages):
            axes.barh(k, left, color=COLOURS[0], height=0.7)
            axes.barh(k, lost, left=left, color=COLOURS[1], height=0.7)
            told = f"{left}" + (f" (-{lost})" if k else "")
            axes.text(left + lost + 0.01 * n, k, told, va="center", color=INK, fontsize=8)
        axes.set_yticks(range(len(stages)), [label(name, 26) for name, _, _ in stages])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * n)
        axes.set_xlabel("images standing (blue), lost at this stage (orange)")

    return Picture(
        f"waterfall-{g.key}-{number}-{pretty(eps).replace('/', 'of')}",
        f"{g.name}: survivors attack by attack, {f.norm} eps {pretty(eps)}",
        "Each attack is credited with the images that it was the first to break. What is left at the bottom is an "
        "upper bound on robust accuracy.",
        Table("", ["model", "eps", "stage", "lost", "standing"], rows),
        paint,
        (4.8, 0.9 + 0.28 * len(stages)),
    )
