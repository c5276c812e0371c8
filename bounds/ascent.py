"""The lines below every activation, chosen by gradient ascent on the margins. Machinery of the proofs."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.bounds.convex import Convex
from robeval.bounds.graph import Graph
from robeval.bounds.intervals import Interval
from robeval.bounds.linear import Choice, Lines, backward, relax
from robeval.bounds.proof import margins_of
from robeval.bounds.region import Region


@torch.enable_grad()
def ascend(
    graph: Graph,
    region: Region,
    y: Tensor,
    found: list[Interval],
    lines: dict[int, Lines | Choice],
    steps: int,
    rate: float,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Adam on the positions of the lines, from those of crown (Xu et al. 2021, arXiv:2011.13824, section 3.2).

    Args:
        graph: The network.
        region: n regions.
        y: (n,) their classes.
        found: Intervals of all nodes.
        lines: Lines of all curved nodes to start from.
        steps: Steps of Adam.
        rate: Its first step size; it falls by 2 % a step.

    Returns:
        (n, K) lower bounds of the margins, the best of all steps each, and the last positions by node, (n, K, *shape).
    """
    last, margins = len(graph.nodes) - 1, margins_of(y, graph.classes)
    best = backward(graph, region, last, margins, found, lines)
    started = {k: _start(graph, k, line) for k, line in lines.items()}
    positions = {k: p for k, p in started.items() if p is not None}
    if not positions:
        return best, {}
    optimizer = torch.optim.Adam(positions.values(), lr=rate)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            now = dict(lines)
            for k, p in positions.items():
                op = graph.nodes[k].op
                assert isinstance(op, Convex)
                now[k] = relax(op, found[graph.nodes[k].inputs[0]], p)
            lower = backward(graph, region, last, margins, found, now)
        best = torch.maximum(best, lower.detach())
        if step < steps:
            optimizer.zero_grad()
            # Margins that are proven already need no more; the ones closest to it matter most for the verdict.
            with torch.enable_grad():
                cost = (-lower.clamp_max(0) - 1e-2 * lower).sum()
            cost.backward()
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.98
            for p in positions.values():
                p.data.clamp_(0, 1)
    return best, {k: p.detach() for k, p in positions.items()}


def _start(graph: Graph, k: int, line: Lines | Choice) -> Tensor | None:
    """The position of crown's own line, one for each row of the margins; None for operators without a choice."""
    op = graph.nodes[k].op
    if not isinstance(op, Convex) or not isinstance(line, Lines):
        return None
    start = line.down if op.bend is None else torch.full_like(line.down, 0.5)
    if op.bend is None:
        start = ((start - op.low) / (1 - op.low)) if op.low < 1 else torch.ones_like(start)
    return start[:, None].repeat(1, graph.classes, *[1] * (start.dim() - 1)).clamp(0, 1).requires_grad_()
