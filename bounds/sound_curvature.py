"""The second-order bound of Finlay and Oberman as a proof."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robeval.bounds.constants import less, margins_at, reach
from robeval.bounds.crown_intervals import relaxed
from robeval.bounds.graph import Graph
from robeval.bounds.hessians import largest_curvature, pushed
from robeval.bounds.intervals import intervals
from robeval.bounds.proof import Proof, against, margins_of
from robeval.bounds.region import Region
from robeval.bounds.rounding import UNIT
from robeval.bounds.slopes import jumps, pulled, slopes, steepest_fall
from robeval.core.catalogue import bound
from robeval.core.errors import ContractBroken

#: Most entries of one layer's Jacobians, which are kept once for every class; images beyond it take turns.
ENTRIES = 1 << 22


@bound(
    name="curvature",
    source="Finlay, Oberman 2019, Scaleable input gradient regularization for adversarial robustness,"
    " arXiv:1905.11468, section 2.2; Singla, Feizi 2020, Second-Order Provable Defenses against Adversarial Attacks,"
    " arXiv:2006.00731; Entesari, Sharifi, Fazlyab 2024, Compositional Curvature Bounds for Deep Neural Networks,"
    " arXiv:2406.05119",
    norms=("l2", "linf", "l1"),
    kind="proof",
    order=2,
    smooth=True,
    presets={"curvature-ibp": {"intermediate": "ibp"}},
)
def sound_curvature(
    graph: Graph, region: Region, y: Tensor, *, intermediate: Literal["crown", "ibp"] = "crown", shells: int = 3
) -> Proof:
    """Margin less slope times distance less C times half its square, C a bound of the curvature over the whole region.

    The slope is the gradient's at the image, sign by sign. C bounds the largest eigenvalue of the margin's Hessian at
    every point of the region, from intervals of all Jacobians and second derivatives that the Hessian is made of. Near
    the image a smaller C holds: the half square is the integral of (r - s) C(s), C(s) a step function.

    Args:
        intermediate: What bounds the neurons: linear bounds (crown), or ibp, which is fast and looser.
        shells: Steps of C(s); 1 takes the constant of the whole region everywhere.

    Shapes:
        region of n images, y (n,); lower bounds (n, K).
    Cost:
        Per shell of a radius two forward passes per pixel, two backward passes per class, K (d, d) matrices, and what
        bounds the neurons: for small images.
    Source:
        Finlay and Oberman 2019, section 2.2, for the bound; Singla and Feizi 2020, theorem 4, and Entesari et al. 2024
        for proven constants.
    Departs:
        The constant is neither global nor a product of norms: it is that of the region, from an interval of the whole
        Hessian, whose middle keeps the signs of weights and of curvature, and it grows with the distance in steps.
        linf and l1 go through the l2 distance of the farthest point, and through the size of every entry of the
        Hessian.
    Raises:
        ContractBroken: B01, a network without second derivatives; B03, an operator that proofs do not know.
    """
    if graph.kinks():
        raise ContractBroken(
            f"curvature needs a twice differentiable network; this one has {', '.join(graph.kinks()[:3])}",
            code="B01",
            why="the Hessian of a piecewise linear function is 0 almost everywhere and says nothing about its kinks",
            do="train with act=smooth (robeval train standard --model-arg act=smooth), or use crown or jacobian",
        )
    widest = max(torch.Size(node.shape).numel() for node in graph.nodes) * region.x[0].numel()
    parts = [
        _lower(graph, region.take(rows), y[rows], intermediate == "crown", shells)
        for rows in torch.arange(len(y), device=y.device).split(max(1, ENTRIES // widest))
    ]
    lower, constant = (torch.cat(part) for part in zip(*parts, strict=True))
    return Proof(lower, constant.gather(1, lower.argmin(1, keepdim=True))[:, 0])


def _lower(graph: Graph, region: Region, y: Tensor, tight: bool, shells: int) -> tuple[Tensor, Tensor]:
    """Lower bounds of the margins and the constants C of the whole regions, (n, K) each."""
    rows = margins_of(y, graph.classes).data
    at = intervals(graph, Region(region.x, region.norm, torch.zeros_like(region.eps)))
    gradient, _ = pulled(graph, rows, slopes(graph, at))
    fall, _ = steepest_fall(region, gradient)
    room = torch.maximum(region.high - region.x, region.x - region.low).flatten(1)
    constant = torch.zeros_like(fall)
    for k in range(1, shells + 1):
        # The point x + t v with t <= k / shells lies in the region of that part of the radius.
        part = Region(region.x, region.norm, region.eps * (k / shells) * (1 + 4 * UNIT) if k < shells else region.eps)
        found, _ = relaxed(graph, part, tight=tight)
        steep = slopes(graph, found)
        _, seen = pulled(graph, -rows, steep)
        if not seen:  # an affine network
            break
        constant, corner = largest_curvature(graph, found, pushed(graph, region.x, steep), seen, room)
        most = torch.minimum(constant * reach(region).square()[:, None], corner)
        weight = ((1 - (k - 1) / shells) ** 2 - (1 - k / shells) ** 2) / 2  # of 1 - t, integrated over the shell
        fall = fall + most * weight * (1 + 1e-12)
        if k == shells:
            fall = fall + 2 * jumps(graph, seen)
    return against(less(margins_at(graph, region.x, y), fall), y), constant
