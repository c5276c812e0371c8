"""Backward linear bounds."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robeval.bounds.crown_intervals import relaxed
from robeval.bounds.graph import Graph
from robeval.bounds.linear import backward
from robeval.bounds.proof import Proof, against, margins_of
from robeval.bounds.region import Region
from robeval.core.catalogue import bound


@bound(
    source="Zhang, Weng, Chen, Hsieh, Daniel 2018, Efficient Neural Network Robustness Certification with General"
    " Activation Functions, arXiv:1811.00866",
    norms=("linf", "l2", "l1"),
    kind="proof",
    order=1,
    smooth=False,
    presets={"crown-ibp": {"intermediate": "ibp"}},
)
def crown(graph: Graph, region: Region, y: Tensor, *, intermediate: Literal["crown", "ibp"] = "crown") -> Proof:
    """Lines below and above every activation, carried back from the margins to the image.

    Every neuron whose sign is open is bounded in the same way first, which is what makes it tight and what it costs.

    Args:
        intermediate: What bounds the neurons: crown itself, or ibp, which is fast and looser (Zhang et al. 2020).

    Shapes:
        region of n images, y (n,); lower bounds (n, K).
    Cost:
        One backward pass per open neuron and per class for a radius; with ibp per class only.
    Source:
        Zhang et al. 2018, arXiv:1811.00866, section 3.2 and theorem 3.2; crown-ibp: Zhang et al. 2020,
        arXiv:1906.06316.
    Departs:
        In l2 and l1 the ball is met with the pixel box by its dual problem. The line below a smooth activation is the
        tangent in the middle. Rounding is enclosed.
    Raises:
        ContractBroken: B03, an operator that proofs do not know.
    """
    found, lines = relaxed(graph, region, tight=intermediate == "crown")
    last = len(graph.nodes) - 1
    return Proof(against(backward(graph, region, last, margins_of(y, graph.classes), found, lines), y))
