"""The shortest way from points of the box [0, 1]^d to hyperplanes, without leaving the box.

Seen from the hyperplane, each pixel has a steepness |w_i|, and a room up to the face that it moves towards. In the dual
of the problem one number per row is unknown: the level up to which pixels move. What a level gains is concave and
piecewise linear in linf and l2, where Newton steps find the level, and a staircase in l1, where bisection does.
Nothing is sorted, and only entries of one row are ever combined.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def shortest_move(x: Tensor, w: Tensor, gap: Tensor, norm: str) -> Tensor:
    """The shortest d with <w, x + d> = b and x + d in the box; where there is none, the d that comes nearest to it.

    Args:
        x: Points of the box, shape (n, ...).
        w: Normals of the hyperplanes, same shape.
        gap: <w, x> - b, shape (n,); the caller often knows it without the rounding of the two large terms.
        norm: ``linf``, ``l2`` or ``l1``.

    Shapes:
        Returns the shape of x.
    """
    towards = -w.flatten(1) * torch.where(gap < 0, -1, 1)[:, None]
    face = above(towards, 0)
    steep = towards.abs()
    room = (face - x.flatten(1)).abs() * above(steep, 0)
    steep = steep * above(room, 0)
    # Rows are scaled so that the steepest pixel with room has 1, which keeps squares and sums finite.
    scale = steep.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    steep = steep / scale
    need = gap.abs() / scale.squeeze(1)
    if norm == "linf":
        length = torch.minimum(room, level(need, steep, room)[:, None])
    elif norm == "l2":
        ends = room / steep.clamp_min(torch.finfo(x.dtype).tiny)
        length = torch.minimum(room, level(need, steep**2, ends)[:, None] * steep)
    else:
        length = room * share(need, steep, steep * room)
    return (length * towards.sign()).view_as(x)


def above(t: Tensor, bound: Tensor | float, out: Tensor | None = None) -> Tensor:
    """1 where t > bound, otherwise 0, as floats: products with it are several times quicker than masks."""
    return torch.gt(t, bound, out=torch.empty_like(t) if out is None else out)


def level(need: Tensor, slopes: Tensor, ends: Tensor) -> Tensor:
    """The least t with sum_i slopes_i * min(t, ends_i) = need; the largest number where no t gains so much.

    Newton's method from the left on a concave function: t only grows, and each step passes an end or is the last, so
    that at most d + 1 steps are taken. Remaining need times slope falls at least fourfold a step, so it takes few.

    Shapes:
        need (n,), slopes (n, d), ends (n, d) -> (n,).
    """
    gains = slopes * ends
    free, work = torch.empty_like(ends), torch.empty_like(ends)  # memory used again and again is much quicker
    t = torch.zeros_like(need)
    while True:
        above(ends, t[:, None], out=free)
        reached = torch.addcmul(gains, gains, free, value=-1, out=work).sum(1)
        slope = torch.mul(slopes, free, out=work).sum(1)
        further = (need - reached) / slope  # x / 0 where all pixels stand at their ends
        further = torch.maximum(t, further.nan_to_num(nan=0.0, neginf=0.0))
        if torch.equal(further, t):
            return t
        t = further


def share(need: Tensor, steep: Tensor, gains: Tensor) -> Tensor:
    """The share of its gain that each pixel takes, the steepest first, until need is met; ties take equal shares.

    Bisects for the steepness at which need is met, until one pixel or one number lies between the bounds. After 32
    halvings of the interval its bits are halved, which are ordered as the numbers are: 63 steps more suffice.

    Shapes:
        need (n,), steep (n, d) in [0, 1], gains (n, d) -> (n, d) in [0, 1].
    """
    bits = torch.int32 if steep.dtype == torch.float32 else torch.int64
    within = gains.sum(1) > need
    # Pixels steeper than low gain too much, and there are more of them; those steeper than high do not.
    low, high = torch.zeros_like(need), steep.amax(1) * within
    more, fewer = above(steep, 0).sum(1), torch.zeros_like(need)
    up, work = torch.empty_like(steep), torch.empty_like(steep)
    for step in itertools.count():
        open_ = (more - fewer > 1) & (high.view(bits) - low.view(bits) > 1)
        if not open_.any():
            break
        middle = (low + high) / 2 if step < 32 else ((low.view(bits) + high.view(bits)) // 2).view(steep.dtype)
        middle = torch.where(open_, middle, high)
        count = above(steep, middle[:, None], out=up).sum(1)
        too_much = open_ & (torch.mul(gains, up, out=work).sum(1) > need)
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
        more, fewer = torch.where(too_much, count, more), torch.where(too_much, fewer, count)
    full = above(steep, high[:, None])
    partly = above(steep, low[:, None]) - full  # one pixel, or several of one steepness
    rest = (need - (gains * full).sum(1)) / (gains * partly).sum(1)  # 0 / 0 where all pixels are full
    return full + partly * rest.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1)[:, None]
