"""A local Lipschitz constant from intervals of slopes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robeval.bounds.constants import less, margins_at
from robeval.bounds.crown_intervals import relaxed
from robeval.bounds.graph import Graph
from robeval.bounds.intervals import intervals
from robeval.bounds.proof import Proof, against, margins_of
from robeval.bounds.region import Region
from robeval.bounds.slopes import jumps, pulled, slopes, steepest_fall
from robeval.core.catalogue import bound


@bound(
    source="Zhang, Zhang, Hsieh 2019, RecurJac: An Efficient Recursive Algorithm for Bounding Jacobian Matrix of Neural"
    " Networks and Its Applications, arXiv:1810.11783",
    norms=("linf", "l2", "l1"),
    kind="proof",
    order=1,
    smooth=False,
    presets={"jacobian-ibp": {"intermediate": "ibp"}},
)
def jacobian(graph: Graph, region: Region, y: Tensor, *, intermediate: Literal["crown", "ibp"] = "crown") -> Proof:
    """Margin less the most that it can fall, from intervals of everything that a Jacobian is made of.

    A margin's change g(x') - g(x) is <J, x' - x>, where J is a product of weights and slopes of chords from the image
    to x'. Intervals of the slopes give intervals of J; its largest sizes make a Lipschitz constant about the image.

    Args:
        intermediate: What bounds the neurons: linear bounds (crown), or ibp, which is fast and looser.

    Shapes:
        region of n images, y (n,); lower bounds (n, K).
    Cost:
        Two backward passes per class for a radius, and what bounds the neurons.
    Source:
        Zhang et al. 2019, arXiv:1810.11783, section 3, for Jacobians by intervals.
    Departs:
        Plain interval products in place of their recursion, and slopes of chords from the image in place of
        derivatives: they lie between the derivatives, so they are never worse, and hold for every x' of the region. A
        pixel at the end of the box moves one way only, so that one end of its interval counts.
    Raises:
        ContractBroken: B03, an operator that proofs do not know.
    """
    found, _ = relaxed(graph, region, tight=intermediate == "crown")
    centre = intervals(graph, Region(region.x, region.norm, torch.zeros_like(region.eps)))
    change, seen = pulled(graph, margins_of(y, graph.classes).data, slopes(graph, found, centre))
    fall, constant = steepest_fall(region, change)
    lower = less(margins_at(graph, region.x, y), fall + jumps(graph, seen))
    lower = against(lower, y)
    return Proof(lower, constant.gather(1, lower.argmin(1, keepdim=True))[:, 0])
