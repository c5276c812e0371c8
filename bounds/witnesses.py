"""Points of regions at which a margin is small. Machinery of ``bab``, no bound itself."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.bounds.graph import Graph
from robeval.bounds.region import Region
from robeval.core.ball import Ball, per_row, vector_norm

#: How far beyond the ball a point starts whose projection minimises a linear function, in radii.
FAR = 1e3


def minimisers(region: Region, image: Tensor, slope: Tensor) -> Tensor:
    """Points of the regions where linear functions are least; in l2 the box comes after the ball.

    Shapes:
        image (D,) places in the batch, slope (D, C, H, W) -> (D, C, H, W).
    """
    steep = (
        slope.sign() if region.norm == "linf" else slope / per_row(vector_norm(slope, "linf"), slope).clamp_min(1e-300)
    )
    return pulled_in(region, image, region.x[image] - FAR * per_row(region.eps[image], slope) * steep)


def pulled_in(region: Region, image: Tensor, points: Tensor) -> Tensor:
    """Points projected into the regions of their images. (D, C, H, W) -> (D, C, H, W)."""
    inside = torch.empty_like(points)
    for i in image.unique().tolist():
        own = image == i
        inside[own] = Ball(region.norm, float(region.eps[i])).project(
            region.x[i : i + 1].expand_as(points[own]), points[own]
        )
    return inside


@torch.enable_grad()
def descend(
    graph: Graph, region: Region, y: Tensor, image: Tensor, rival: Tensor, points: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """A few steps of projected descent on the margin f_y - f_rival.

    Args:
        graph: The network.
        region: n regions.
        y: (n,) classes.
        image: (D,) whose region each point is in.
        rival: (D,) the class that should overtake.
        points: (D, C, H, W) where to start.
        steps: Steps, each half a radius long at first and ever shorter.

    Returns:
        The points with the least margins seen, and the margins, (D,).
    """
    best, least = points, points.new_full((len(points),), torch.inf)
    own = y[image]
    for t in range(steps + 1):
        with torch.set_grad_enabled(t < steps):
            points = points.detach().requires_grad_(t < steps)
            z = graph.logits(points)
            margin = (z.gather(1, own[:, None]) - z.gather(1, rival[:, None]))[:, 0]
        better = margin.detach() < least
        least, best = (
            torch.where(better, margin.detach(), least),
            torch.where(per_row(better, best), points.detach(), best),
        )
        if t < steps:
            (g,) = torch.autograd.grad(margin.sum(), points, allow_unused=True, materialize_grads=True)
            direction = Ball(region.norm, 1.0).ascent(-g, points.detach())
            length = per_row(region.eps[image], g) * 0.5 * (1 - t / steps)
            points = pulled_in(region, image, points.detach() + length * direction)
    return best, least
