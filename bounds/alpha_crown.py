"""Backward linear bounds with optimised slopes."""

from __future__ import annotations

from torch import Tensor

from robeval.bounds.ascent import ascend
from robeval.bounds.crown_intervals import relaxed
from robeval.bounds.graph import Graph
from robeval.bounds.proof import Proof, against
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
    return Proof(against(ascend(graph, region, y, found, lines, steps, rate)[0], y))
