"""Certified accuracy against eps, a step down at every image's proven radius, below what the attacks left standing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robeval.reports.certificates import CertificateFacts
from robeval.reports.curve import COLOURS
from robeval.reports.groups import NORM, Group
from robeval.reports.picture import BAND, INK, Picture, label
from robeval.reports.stats import Rate
from robeval.reports.tables import Cell, Table

Steps = list[tuple[float, Rate]]


def certified(groups: Sequence[Group]) -> list[Picture]:
    """One picture per group with a proof or a probabilistic bound."""
    return [p for g in groups if (p := _picture(g)) is not None]


def steps(facts: CertificateFacts, bound: str) -> Steps:
    """Where certified accuracy falls, ascending from 0; each value holds up to and including its eps."""
    reach = facts.reach(bound)
    return [(eps, facts.certified(bound, eps)) for eps in sorted({0.0, *reach[reach > 0].tolist()})]


def _picture(g: Group) -> Picture | None:
    found: dict[str, Steps] = {}
    for facts in g.certificates:
        for bound in [*facts.of_kind("proof"), *facts.of_kind("probabilistic")]:
            top = f" top {facts.top[bound]}" if facts.top[bound] > 1 else ""
            smoothed = ", smoothed classifier" if facts.kinds[bound] == "probabilistic" else ""
            found[f"{bound}{top} ({facts.kinds[bound]}{smoothed})"] = steps(facts, bound)
    if not found:
        return None
    above = g.curve() if g.attacks else None
    end = max([eps for line in found.values() for eps, _ in line] + ([above.end] if above else [])) * 1.04 or 1.0
    rows: list[dict[str, Cell]] = [
        {"model": g.name, "bound": name, "eps": eps, "certified >=": rate}
        for name, line in found.items()
        for eps, rate in line
    ]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        if above:
            left = above.steps()
            y = [100 * rate.value for _, rate in left]
            axes.step(
                [*(eps for eps, _ in left), end],
                [*y, y[-1]],
                where="post",
                color=INK,
                linewidth=1,
                label="standing after the attacks",
            )
        for k, (name, line) in enumerate(found.items()):
            # Up to its eps, beyond it the next value: the last image's radius ends the curve.
            x = [eps for eps, _ in line] + [end]
            shown = [rate for _, rate in line] + [Rate(0, line[-1][1].n)]
            values = [100 * r.value for r in shown]
            colour, style = COLOURS[k % len(COLOURS)], "--" if "smoothed" in name else "-"
            axes.step(x, values, where="pre", color=colour, linestyle=style, linewidth=1.6, label=label(name))
            low, high = ([100 * r.interval[end_] for r in shown] for end_ in (0, 1))
            axes.fill_between(x, low, high, step="pre", color=colour, alpha=BAND, linewidth=0)
        axes.set_xlim(0, end)
        axes.set_ylim(0, 102)
        axes.set_xlabel(f"radius eps in {NORM[g.norm]}, pixels in [0, 1]")
        axes.set_ylabel("certified accuracy (lower bound), %")
        axes.legend(fontsize=8, labelcolor=INK)

    return Picture(
        f"certified-{g.key}",
        f"{g.name}: certified accuracy in {NORM[g.norm]}",
        "Images that a bound certifies at eps; band: 95 % Wilson interval of the sample. Proofs hold for the network "
        "that was attacked, probabilistic bounds for its smoothed version. Estimates certify nothing and are left out.",
        Table("", ["model", "bound", "eps", "certified >="], rows),
        paint,
    )
