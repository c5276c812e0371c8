"""What decision-based attacks share: yes-or-no questions under a budget, a line search, and a misclassified start.

All are generators that pass their questions on to the engine; use them with ``yield from``.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from robeval.core.ball import Ball, per_row
from robeval.core.goal import Goal
from robeval.core.questions import Answer, Logits, Question
from robeval.core.streams import Streams

Asking = Generator[Question, Answer, Tensor]
#: Sides of the squares that the noise of a start is made of, in turn: fine noise is one class to many networks.
GRAINS = (1, 2, 4, 8)


class Oracle:
    """Tells whether a point is misclassified and nothing else, so many times per image.

    Args:
        goal: One goal per row.
        queries: How many answers an image gets.
        x0: The images.
    """

    def __init__(self, goal: Goal, queries: int, x0: Tensor):
        self.goal = goal
        self.left = torch.full((len(x0),), queries, dtype=torch.int64, device=x0.device)

    def ask(self, points: Tensor, only: Tensor) -> Asking:
        """(n, C, H, W), (n,) bool -> (n,) bool; false for rows that do not ask or have no answer left."""
        asks = only & (self.left > 0)
        at = yield Logits(points, only=asks)
        self.left = torch.where(at.open, self.left - asks.long(), 0)
        return asks & at.open & self.goal.reached(at.logits)


def blend(x0: Tensor, x: Tensor, share: Tensor, ball: Ball) -> Tensor:
    """The point at this share of the distance between image and ``x``: on their line, in linf ``x`` clipped."""
    d = x - x0
    if ball.norm == "linf":
        radius = per_row(share * ball.norm_of(d), d)
        return (x0 + d.clamp(-radius, radius)).clamp(0, 1)
    return (x0 + per_row(share, d) * d).clamp(0, 1)


def to_boundary(oracle: Oracle, x0: Tensor, x: Tensor, only: Tensor, ball: Ball, tolerance: float) -> Asking:
    """Binary search between each image and a misclassified ``x``, to ``tolerance`` times their distance.

    Returns the misclassified end; rows that do not ask keep ``x``. Shapes: (n, C, H, W) -> same.
    """
    low = torch.zeros_like(oracle.left, dtype=x0.dtype)
    high, gap, best = torch.ones_like(low), 1.0, x
    while gap > tolerance and only.any():
        gap, middle = gap / 2, (low + high) / 2
        point = blend(x0, x, middle, ball)
        hit = yield from oracle.ask(point, only)
        best = torch.where(per_row(hit, x), point, best)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    return best


def nearest_start(oracle: Oracle, x0: Tensor, ball: Ball, rng: Streams, tries: int, tolerance: float) -> Asking:
    """The nearest misclassified point found in several random directions; the image itself where there is none.

    One answer tells whether a direction meets the boundary before the best one so far; only then it is searched.
    Shapes: (n, C, H, W) -> same.
    """
    channels, height, width = x0.shape[1:]
    everybody = torch.ones_like(oracle.left, dtype=torch.bool)
    x, distance = x0, torch.full_like(oracle.left, torch.inf, dtype=x0.dtype)
    for k in range(tries):  # all of them, so that every row has drawn as much
        grain = GRAINS[k % len(GRAINS)]
        down = torch.arange(height, device=x0.device) // grain
        along = torch.arange(width, device=x0.device) // grain
        noise = rng.uniform(channels, height, width)[:, :, down][..., along]
        point = blend(x0, noise, (distance / ball.norm_of(noise - x0)).clamp_max(1), ball)
        nearer = yield from oracle.ask(point, everybody)
        point = yield from to_boundary(oracle, x0, point, nearer, ball, tolerance)
        x = torch.where(per_row(nearer, x), point, x)
        distance = torch.where(nearer, ball.norm_of(x - x0), distance)
    return x
