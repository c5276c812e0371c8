"""Points around images: drawn, moved uphill, and what constants on growing balls say. Machinery of the bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robeval.bounds.curvature import second_order_radius
from robeval.bounds.expansion import Draws
from robeval.core.ball import Ball, per_row, project_l1_in_box, vector_norm

#: Length of one step uphill, in radii of the ball.
STEP = 0.25


def offsets(norm: str, shape: tuple[int, ...], count: int, rng: Draws, ids: list[int], number: int) -> Tensor:
    """Points uniform in the unit ball, ``count`` per image from its own stream. -> (n * count, *shape), float32."""
    streams = rng(ids, number)
    size = torch.Size(shape).numel()
    if norm == "linf":
        d = 2 * streams.uniform(count, size) - 1
    elif norm == "l2":  # a Gaussian direction, and a radius whose power d is uniform
        d = streams.normal(count, size)
        d = d / d.norm(dim=2, keepdim=True) * streams.uniform(count, 1) ** (1 / size)
    else:  # exponential coordinates over their sum plus one more are uniform in the l1 ball
        e = -streams.uniform(count, size + 1).clamp_min(1e-30).log()
        d = e[:, :, :size] / e.sum(2, keepdim=True) * streams.sign(count, size)
    return d.reshape(-1, *shape)


def into_ball(norm: str, x0: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Bring points into balls of their own radii, cut to the box. x0, x (n, C, H, W), eps (n,) -> (n, C, H, W)."""
    d, radius = x - x0, per_row(eps.to(x0), x0)
    if norm == "linf":
        d = torch.minimum(torch.maximum(d, -radius), radius)
    elif norm == "l2":
        length = per_row(vector_norm(d, "l2"), d)
        d = d * (radius / length.clamp_min(torch.finfo(d.dtype).tiny)).clamp_max(1)
    else:
        d = project_l1_in_box(x0, d, eps.to(x0)[:, None].clamp_min(torch.finfo(d.dtype).tiny))
    return (x0 + d).clamp(0, 1)


def largest_nearby(
    norm: str,
    x: Tensor,
    eps: Tensor,
    start: Tensor,
    value: Callable[[Tensor, Tensor], Tensor],
    uphill: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    steps: int,
    batch_size: int,
) -> Tensor:
    """Largest value found in the ball around each image: at the given points, then by projected ascent from the best.

    Args:
        norm: Norm of the ball.
        x: (n, C, H, W).
        eps: (n,), radii.
        start: (n * s, C, H, W), s points around each image.
        value: (points, number of each point's image) -> (m,).
        uphill: The same, and a gradient: -> (m,), (m, C, H, W).
        steps: Steps of the ascent.
        batch_size: Most points in one call of ``value``.

    Returns:
        (n,) float64.
    """
    n, ball = len(x), Ball(norm, 1.0)
    rows = torch.arange(n, device=x.device)
    each = rows.repeat_interleave(len(start) // n)
    parts = zip(start.split(batch_size), each.split(batch_size), strict=True)
    best, at = torch.cat([value(p, r) for p, r in parts]).view(n, -1).max(1)
    point = start.view(n, -1, *x.shape[1:])[rows, at]
    for _ in range(steps):
        here, gradient = uphill(point, rows)
        best = torch.maximum(best, here)
        point = into_ball(norm, x, point + STEP * per_row(eps.to(x), x) * ball.ascent(gradient.to(x), point), eps)
    return torch.maximum(best, value(point, rows)) if steps else best


def first_order_reach(gap: Tensor, shells: Tensor, slopes: Tensor) -> Tensor:
    """Largest r <= s_m with sum_k (s_k - s_{k-1}) L_k <= gap, where L_k is the slope on the shell (s_{k-1}, s_k].

    Shapes:
        gap (n,), shells and slopes (n, m), both not falling -> (n,).
    """
    inner = torch.cat([torch.zeros_like(shells[:, :1]), shells[:, :-1]], 1)
    used = ((shells - inner) * slopes).cumsum(1)
    left = gap[:, None] - torch.cat([torch.zeros_like(used[:, :1]), used[:, :-1]], 1)
    reach = torch.minimum(inner + left.clamp_min(0) / slopes, shells)
    return torch.where(left > 0, reach, 0).amax(1)


def second_order_reach(gap: Tensor, slope: Tensor, shells: Tensor, curvatures: Tensor) -> Tensor:
    """The same with curvature C_k on each shell: the slope grows by C_k per unit of distance from its value at 0.

    Shapes:
        gap and slope (n,), shells and curvatures (n, m), both not falling -> (n,).
    """
    reach = torch.zeros_like(gap)
    inner, left, here = torch.zeros_like(gap), gap, slope
    for k in range(shells.shape[1]):
        width, c = shells[:, k] - inner, curvatures[:, k].clamp_min(0)
        further = torch.minimum(second_order_radius(left, here, c), width)
        reach = torch.where(left > 0, inner + further, reach)
        left = left - width * here - c * width.square() / 2
        inner, here = shells[:, k], here + c * width
    return reach
