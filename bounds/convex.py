"""Convex activations that never fall, with everything that a proof asks of them. Machinery, no bound itself.

ReLU, LeakyReLU, smooth ReLU and softplus all are: one treatment serves them. A new activation of this kind is one
function here and one line in :mod:`robeval.bounds.graph`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robeval.bounds.rounding import ULPS, UNIT, gamma
from robeval.core.smooth import smooth_relu

How = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Convex:
    """A convex activation that never falls, with slopes between ``low`` and 1.

    Args:
        name: As people call it.
        value: The function.
        slope: Its derivative, which never falls; at a kink one of the derivatives beside it.
        straight: Tells from the ends of intervals where it is affine on all of them.
        bend: Largest second derivative between two points; None where it has a kink.
        low: Smallest slope.
        exact: Its values carry no rounding.
        below: The function as computed may lie this much below the convex one.
    """

    name: str
    value: How
    slope: How
    straight: Callable[[Tensor, Tensor], Tensor]
    bend: Callable[[Tensor, Tensor], Tensor] | None
    low: float = 0.0
    exact: bool = False
    below: float = 0.0

    def slack(self, size: Tensor) -> Tensor:
        """Rounding of values and lines whose terms are of this size."""
        return 4 * ULPS * UNIT * size

    def interval(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value between two points."""
        a, b = self.value(low), self.value(high)
        if self.exact:
            return a, b
        return a - self.slack(a.abs() + low.abs()) - self.below, b + self.slack(b.abs() + high.abs()) + self.below

    def lines(self, low: Tensor, high: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slope and height of a line below and of one above the function on [low, high].

        Above, the chord: whatever its slope k, the height max(s - k x) over the ends is right, since s - k x is convex.
        Below, a tangent: at the point ``low + at (high - low)``, and for a kink at 0 the line through it with the slope
        ``at`` between the two of its sides. ``at`` in [0, 1]; None takes the middle, and for a kink the side where most
        of the interval lies. With a kink, intervals on one side of it get the function itself.

        Returns:
            lower slope, lower height, upper slope, upper height.
        """
        size = torch.maximum(low.abs(), high.abs())
        s_low, s_high = self.value(low), self.value(high)
        wide = high - low
        narrow = wide <= 1e-12 * (1 + size)
        up = torch.where(narrow, self.slope(high), (s_high - s_low) / wide.masked_fill(narrow, 1)).clamp(self.low, 1)
        top = torch.maximum(s_low - up * low, s_high - up * high) + self.below
        top = top + self.slack(s_low.abs() + s_high.abs() + size)
        if self.bend is None:
            sign = torch.where(high > -low, 1.0, self.low).to(low) if at is None else self.low + (1 - self.low) * at
            down = torch.where(low >= 0, 1.0, torch.where(high <= 0, self.low, sign))
            one_side = (low >= 0) | (high <= 0)
            return (
                down,
                torch.zeros_like(low),
                torch.where(one_side, down, up),
                top.masked_fill(one_side, 0),
            )
        t = low + wide * (0.5 if at is None else at)
        down = self.slope(t)
        height = self.value(t) - down * t - self.slack(self.value(t).abs() + 3 * size + 1) - self.below
        return down, height, up, top


def relu(leak: float = 0.0) -> Convex:
    """ReLU, or LeakyReLU with a leak in [0, 1]."""
    return Convex(
        "ReLU" if leak == 0 else "LeakyReLU",
        lambda u: functional.leaky_relu(u, leak) if leak else u.clamp_min(0),
        lambda u: torch.full_like(u, leak).masked_fill(u > 0, 1.0),  # where() of two numbers would be float32
        lambda low, high: (low >= 0) | (high <= 0),
        None,
        low=leak,
        exact=leak == 0,
    )


def _smooth_bend(low: Tensor, high: Tensor) -> Tensor:
    """Largest 6 t (1 - t), t = u + 1/2 cut to [0, 1], between two points; it peaks at u = 0."""
    u = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
    t = (u + 0.5).clamp(0, 1)
    return 6 * t * (1 - t) * (1 + 2 * ULPS * UNIT)


def smooth() -> Convex:
    """The smooth ReLU of Finlay and Oberman."""

    def slope(u: Tensor) -> Tensor:
        t = (u + 0.5).clamp(0, 1)
        return t * t * (3 - 2 * t)

    return Convex("smooth ReLU", smooth_relu, slope, lambda low, high: (low >= 0.5) | (high <= -0.5), _smooth_bend)


def softplus(beta: float, threshold: float) -> Convex:
    """Softplus as torch computes it: the identity from threshold / beta on, exp(-threshold) / beta too low there."""

    def bend(low: Tensor, high: Tensor) -> Tensor:
        u = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
        p = torch.sigmoid(beta * u)
        return beta * p * (1 - p) * (1 + 1e-12) + 1e-15

    return Convex(
        "softplus",
        lambda u: functional.softplus(u, beta, threshold),
        lambda u: torch.sigmoid(beta * u),
        lambda low, high: torch.zeros_like(low, dtype=torch.bool),
        bend,
        below=float(torch.tensor(-threshold, dtype=torch.float64).exp()) / beta * (1 + gamma(ULPS)),
    )
