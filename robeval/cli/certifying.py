"""The results of ``robeval certify`` on a screen and as plain data: one block per bound, headed by its kind."""

from __future__ import annotations

import math
from typing import Any

#: What each kind of bound says, behind its name.
HEADINGS = {
    "proof": "holds for every point of the ball in the box",
    "probabilistic": "of the SMOOTHED classifier, each image with probability {confidence:g}",
    "estimate": "its constant was sampled: not a proof",
}


def plain(value: Any) -> Any:
    """What JSON can hold: no nan, no infinity."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(table: list[dict[str, Any]]) -> None:
    """One block per bound on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for row in table:
        heading = HEADINGS[row["kind"]].format(confidence=row["confidence"])
        console.print(f"{row['kind'].upper()} {row['bound']} ({heading})", markup=False, style="bold")
        grid = Table(box=None, show_header=False, pad_edge=False)
        grid.add_column()
        grid.add_column(overflow="fold")
        for name, text in _lines(row):
            grid.add_row(name, text)
        console.print(grid)
        console.print()


def _lines(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What a block says, line by line."""
    lines = [] if row["kind"] == "estimate" else _certified(row)
    if math.isfinite(row["mean_radius"]):
        lines.append(("mean radius", f"{row['mean_radius']:.4g} {row['norm']} over {row['images']} images"))
        lines.append(("median radius", f"{row['median_radius']:.4g}"))
    lines.append(("clean accuracy", f"{row['correct']}/{row['images']}; a misclassified image has radius 0"))
    if math.isfinite(row["constant"]):
        taken = f"{row['constant']:.4g} of {row['loss']}, largest over the {row['domain']}"
        lines.append((f"constant {row['symbol']}".strip(), taken))
    if row["kind"] == "estimate":
        lines.append(("falsified", _falsified(row)))
    if row.get("checked_against"):
        raised = f"{row['repaired_constant']:.4g}"
        lines.append((f"repaired {row['symbol']}", f"{raised}, from {row['checked_against']} adversarial images"))
    seconds = f"{row['seconds']:.2f} s" if math.isfinite(row["seconds"]) else "finished earlier"
    lines.append(("cost", f"{row['passes']:,} passes, {seconds}, {row['arithmetic']}"))
    return lines


def _certified(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Certified accuracy at each radius, and what became of the images."""
    from robeval.core.numbers import pretty
    from robeval.reports.stats import Rate

    whose = "certified accuracy" if row["kind"] == "proof" else "certified accuracy, smoothed"
    lines = []
    for share in row["certified"]:
        rate = Rate(share["k"], share["n"])
        lines.append((whose, f">= {share['k']}/{share['n']} {rate} at {row['norm']} {pretty(share['eps'])}"))
    told = [", ".join(f"{count} {name}" for name, count in status.items()) for status in row["statuses"]]
    words = [f"{text} at {pretty(share['eps'])}" for text, share in zip(told, row["certified"], strict=False)]
    return [*lines, ("images", "; ".join(words) if len(told) > 1 else told[0])]


def _falsified(row: dict[str, Any]) -> str:
    """How attacks contradict an estimate, in words."""
    if not row["attacked"]:
        return "not checked: no attack records of this model and data"
    text = f"{row['falsified']}/{row['attacked']} attacked images ({100 * row['share']:.1f} %)"
    if row["broken"]:
        text += f", largest radius / attack distance {row['worst_ratio']:.3g} (image {row['witness']})"
    return text + f"; attacks: {row['attacks']}"
