"""Interval bound propagation."""

from __future__ import annotations

from torch import Tensor

from robeval.bounds.graph import Graph
from robeval.bounds.intervals import intervals
from robeval.bounds.linear import backward
from robeval.bounds.proof import Proof, against, margins_of
from robeval.bounds.region import Region
from robeval.core.catalogue import bound


@bound(
    source="Gowal et al. 2018, On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust"
    " Models, arXiv:1810.12715",
    norms=("linf", "l2", "l1"),
    kind="proof",
    order=0,
    smooth=False,
)
def ibp(graph: Graph, region: Region, y: Tensor) -> Proof:
    """Intervals of every neuron, layer by layer, up to the margins.

    The cheapest proof: about two forward passes. It is loose unless the network was trained for it.

    Shapes:
        region of n images, y (n,); lower bounds (n, K).
    Cost:
        About 2 forward passes for a radius.
    Source:
        Gowal et al. 2018, arXiv:1810.12715, section 3; the last layer merged with the margins as in their equation 6.
    Departs:
        In l2 and l1 the first layer uses the norms of its rows over the ball, met with the box. Rounding is enclosed.
    Raises:
        ContractBroken: B03, an operator that proofs do not know.
    """
    found = intervals(graph, region)
    last = len(graph.nodes) - 1
    margins = margins_of(y, graph.classes)  # carried back over the affine layers behind the last activation
    return Proof(against(backward(graph, region, last, margins, found, {}), y))
