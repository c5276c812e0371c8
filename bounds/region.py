"""The points around images that a proof speaks of: balls of a norm, cut to the pixel box. Machinery of the proofs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robeval.bounds.rounding import TINY, gamma
from robeval.core.ball import per_row, vector_norm


@dataclass(frozen=True)
class Region:
    """All points within ``eps`` of each image in a norm, intersected with the box [0, 1].

    Args:
        x: (n, C, H, W) float64 images in [0, 1].
        norm: linf, l2 or l1.
        eps: (n,) float64, one radius per image, in pixel units.
    """

    x: Tensor
    norm: str
    eps: Tensor

    def take(self, rows: Tensor) -> Region:
        """The regions of some of the images."""
        return Region(self.x[rows], self.norm, self.eps[rows])

    @cached_property
    def low(self) -> Tensor:
        """Least value of each pixel, rounded outwards. (n, C, H, W)."""
        below = torch.nextafter(self.x - per_row(self.eps, self.x), torch.full_like(self.x, -torch.inf))
        return below.clamp_min(0)

    @cached_property
    def high(self) -> Tensor:
        """Largest value of each pixel, rounded outwards. (n, C, H, W)."""
        above = torch.nextafter(self.x + per_row(self.eps, self.x), torch.full_like(self.x, torch.inf))
        return above.clamp_max(1)

    def contains(self, points: Tensor) -> Tensor:
        """Which points lie in their image's region, without any allowance. (n, C, H, W) -> (n,) bool."""
        boxed = ((points >= 0) & (points <= 1)).flatten(1).all(1)
        return boxed & (vector_norm(points - self.x, self.norm) <= self.eps)

    def minimum(self, a: Tensor) -> Tensor:
        """A lower bound of <a, x'> over the region, rounding enclosed; see :meth:`lowest`.

        Shapes:
            (n, S, C, H, W), S rows of coefficients for each image -> (n, S).
        """
        return self.lowest(a.flatten(2), *(t.flatten(1)[:, None] for t in (self.x, self.low, self.high)))

    def lowest(self, a: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """A lower bound of <a, x'> over the region, for rows that stand on some pixels only.

        For linf it is the minimum. For l2 and l1 it is the value of the dual problem at its best multiplier as far as
        that could be found: whatever the multiplier, the value is a lower bound (weak duality), with the box and the
        ball both in force.

        Args:
            a: (n, S, m) coefficients.
            x: Those pixels of the images; broadcasts against ``a``, as the next two.
            low: Their least values.
            high: Their largest values.
        """
        if self.norm == "linf":
            middle, half = (low + high) / 2, (high - low) / 2
            value = (a * middle).sum(2) - (a.abs() * half).sum(2)
        else:
            dual = self._dual_l2 if self.norm == "l2" else self._dual_l1
            value = (a * x).sum(2) + dual(a, low - x, high - x)
        size = (a.abs() * (x.abs() + high.abs() + (high - low))).sum(2)
        return value - 4 * gamma(a.shape[2] + 64) * size - TINY

    def _dual_l2(self, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """max over t > 0 of the minimum of <a, v> + (|v|^2 - eps^2) / (2 t) over the box: v = clip(-t a)."""
        eps = self.eps[:, None]
        length = torch.linalg.vector_norm(a, dim=2)
        plain = -eps * length
        # The box binds where -t a leaves it; the length of the clipped v grows with t, so t is found by bisection.
        t_low = eps / length.clamp_min(TINY)
        full = torch.where(a > 0, low, high).masked_fill(a == 0, 0)
        slack = torch.linalg.vector_norm(full, dim=2) <= eps  # even the farthest corner lies in the ball
        corner = (a * full).sum(2)
        t_high = t_low * 2
        for _ in range(60):
            short = torch.linalg.vector_norm((-t_high[..., None] * a).clamp(low, high), dim=2) < eps
            short &= ~slack & (t_high < 1e30)
            if not short.any():
                break
            t_high = torch.where(short, t_high * 4, t_high)
        for _ in range(30):
            middle = (t_low + t_high) / 2
            short = torch.linalg.vector_norm((-middle[..., None] * a).clamp(low, high), dim=2) < eps
            t_low, t_high = torch.where(short, middle, t_low), torch.where(short, t_high, middle)
        t = t_high.clamp_min(TINY)
        v = (-t[..., None] * a).clamp(low, high)
        dual = (a * v).sum(2) + (v.square().sum(2) - eps.square()) / (2 * t)
        # corner needs no ball, plain no box: each is a lower bound of its own, and the largest one counts.
        rough = 4 * gamma(a.shape[2] + 64)
        dual = dual - rough * (eps.square() + v.square().sum(2)) / t
        return torch.maximum(torch.maximum(plain * (1 + rough), dual), corner)

    def _dual_l1(self, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """max over w >= 0 of the minimum of <a, v> + w (|v|_1 - eps) over the box: -sum (|a| - w)^+ room - w eps."""
        eps = self.eps[:, None]
        room = torch.where(a > 0, -low, high)
        steep, order = a.abs().sort(dim=2, descending=True)
        spent = room.expand_as(a).gather(2, order).cumsum(2)
        # The multiplier is the slope at which the room of steeper pixels uses the budget up; 0 if it never does.
        k = (spent < eps[..., None]).sum(2, keepdim=True)
        w = torch.where(k < a.shape[2], steep.gather(2, k.clamp_max(a.shape[2] - 1)), 0.0)
        return -((a.abs() - w).clamp_min(0) * room).sum(2) - w[..., 0] * eps * (1 + 4 * gamma(64))
