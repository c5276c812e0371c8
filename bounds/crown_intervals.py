"""Tight intervals before every activation, by linear bounds carried back to the image. Machinery of the proofs."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.bounds.convex import Convex
from robeval.bounds.graph import Graph
from robeval.bounds.intervals import Interval, advance, spread
from robeval.bounds.linear import Choice, Lines, backward, relax
from robeval.bounds.operators import Maximum
from robeval.bounds.region import Region
from robeval.bounds.rows import Rows

#: Most entries of one batch of rows of coefficients, 128 MiB in float64.
ENTRIES = 1 << 24


def relaxed(graph: Graph, region: Region, *, tight: bool) -> tuple[list[Interval], dict[int, Lines | Choice]]:
    """Intervals of all nodes and lines of all curved ones.

    Args:
        graph: The network.
        region: n regions.
        tight: Carry every undecided entry before an activation back to the image (CROWN); otherwise intervals alone.
    """
    found: list[Interval] = []
    lines: dict[int, Lines | Choice] = {}
    scales = spread(graph) if region.norm != "linf" else {}
    values = graph.values(region.x) if scales else []
    for k, node in enumerate(graph.nodes):
        op = node.op
        if isinstance(op, Convex | Maximum):
            before = node.inputs[0]
            # The first layer's intervals are exact in linf already.
            if tight and (lines or region.norm != "linf"):
                found[before] = _tighter(graph, region, before, undecided(op, found[before]), found, lines)
            lines[k] = relax(op, found[before])
        found.append(advance(graph, k, region, found, scales, values))
    return found, lines


def undecided(op: Convex | Maximum, at: Interval) -> Tensor:
    """Entries whose interval matters to the operator's bounds: (n, *shape) bool."""
    if isinstance(op, Maximum):
        return torch.ones_like(at.low, dtype=torch.bool)
    return ~op.straight(at.low, at.high)


def _tighter(
    graph: Graph, region: Region, node: int, wanted: Tensor, found: list[Interval], lines: dict[int, Lines | Choice]
) -> Interval:
    """The interval of a node met with linear bounds of the wanted entries.

    Images have different numbers of wanted entries; those with fewer repeat one of theirs.
    """
    now = found[node]
    flat = wanted.flatten(1)
    most = int(flat.sum(1).max())
    if most == 0:
        return now
    n = len(flat)
    which = flat.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    low, high = now.low.flatten(1).clone(), now.high.flatten(1).clone()
    shape = graph.nodes[node].shape
    widest = max(found[k].low[0].numel() for k in range(node + 1))
    for part in which.split(max(1, ENTRIES // (n * widest)), dim=1):
        rows = Rows.neurons(part, shape, low)
        below = backward(graph, region, node, rows, found, lines)
        above = -backward(graph, region, node, rows.times(-1.0), found, lines)
        low.scatter_(1, part, torch.maximum(low.gather(1, part), below))
        high.scatter_(1, part, torch.minimum(high.gather(1, part), above))
    return Interval(low.view_as(now.low), torch.maximum(low, high).view_as(now.high))
