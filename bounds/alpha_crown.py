"""Backward linear bounds with optimised slopes."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.bounds.convex import Convex
from robeval.bounds.crown_intervals import relaxed
from robeval.bounds.graph import Graph
from robeval.bounds.linear import Choice, Lines, backward, relax
from robeval.bounds.proof import Proof, against, margins_of
from robeval.bounds.region import Region
from robeval.core.catalogue import bound


@bound(
    source="Xu et al. 2021, Fast and Complete: Enabling Complete Verification with Rapid and Massively Parallel"
    " Incomplete Verifiers, arXiv:2011.13824",
    norms=("linf", "l2", "l1"),
    kind="proof",
    order=1,
    smooth=False,
)
def alpha_crown(graph: Graph, region: Region, y: Tensor, *, steps: int = 20, rate: float = 0.25) -> Proof:
    """CROWN with the line below every activation chosen by gradient ascent on the margins.

    Whatever the lines are, the bound holds: every step is a proof and the best of them counts, margin by margin.

    Args:
        steps: Steps of Adam.
        rate: Its first step size, in units of the range between the extreme lines; it falls by 2 % a step.

    Shapes:
        region of n images, y (n,); lower bounds (n, K).
    Cost:
        That of crown, and ``steps`` forward and backward passes per class for a radius.
    Source:
        Xu et al. 2021, arXiv:2011.13824, section 3.2.
    Departs:
        The intervals before the activations stay those of crown; the paper optimises theirs too.
    Raises:
        ContractBroken: B03, an operator that proofs do not know.
    """
    found, lines = relaxed(graph, region, tight=True)
    last, margins = len(graph.nodes) - 1, margins_of(y, graph.classes)
    best = backward(graph, region, last, margins, found, lines)
    positions = {k: _start(graph, k, line) for k, line in lines.items()}
    free = [p for p in positions.values() if p is not None]
    if not free:
        return Proof(against(best, y))
    optimizer = torch.optim.Adam(free, lr=rate)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            now = dict(lines)
            for k, p in positions.items():
                op = graph.nodes[k].op
                if p is not None and isinstance(op, Convex):
                    now[k] = relax(op, found[graph.nodes[k].inputs[0]], p)
            lower = backward(graph, region, last, margins, found, now)
        best = torch.maximum(best, lower.detach())
        if step < steps:
            optimizer.zero_grad()
            # Margins that are proven already need no more; the ones closest to it matter most for the verdict.
            (-lower.clamp_max(0) - 1e-2 * lower).sum().backward()
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.98
            for p in free:
                p.data.clamp_(0, 1)
    return Proof(against(best, y))


def _start(graph: Graph, k: int, line: Lines | Choice) -> Tensor | None:
    """The position of crown's own line, one for each row of the margins; None for operators without a choice."""
    op = graph.nodes[k].op
    if not isinstance(op, Convex) or not isinstance(line, Lines):
        return None
    start = line.down if op.bend is None else torch.full_like(line.down, 0.5)
    if op.bend is None:
        start = ((start - op.low) / (1 - op.low)) if op.low < 1 else torch.ones_like(start)
    return start[:, None].repeat(1, graph.classes, *[1] * (start.dim() - 1)).clamp(0, 1).requires_grad_()
