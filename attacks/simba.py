"""Simple black-box attack, pixel basis."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Logits
from robeval.core.streams import Streams


@attack(
    source="Guo, Gardner, You, Wilson, Weinberger 2019, Simple Black-box Adversarial Attacks, arXiv:1905.07121,"
    " algorithm 1",
    norms=("linf", "l2"),
    access="black-box",
)
def simba(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    step: float | None = None,
    queries: int | None = None,
) -> Attack:
    """Tries pixel after pixel in random order, up then down, and keeps what lowers the margin.

    No pixel is visited twice, so in linf a step of eps stays in the ball by construction.

    Args:
        step: Change of one pixel; none means eps in linf and 0.2 in l2.
        queries: Most queries per image, the one at the clean image included; none means all pixels once.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        1 or 2 forward passes per pixel and open image, and 1 at the start; every query is counted.
    Source:
        Guo et al. 2019, arXiv:1905.07121, algorithm 1, with the standard (pixel) basis.
    Departs:
        Compares margins of logits instead of probabilities, which saturate at 1 in float32 and then hide every
        improvement. In l2 the image is projected on the ball. A side that the box forbids costs no query.
    """
    size = x0[0].numel()
    length = step or (ball.eps if ball.norm == "linf" else 0.2)
    limit = 2 * size + 1 if queries is None else queries
    order = rng.permutation(size)
    at = yield Logits(x0)
    x, margin = x0, goal.margin(at.logits)
    spent = torch.ones_like(order[:, 0])
    for k in range(size):
        pixel = torch.zeros_like(x0).flatten(1).scatter_(1, order[:, k : k + 1], length).view_as(x0)
        tries = spent < limit
        for change in (pixel, -pixel):
            proposal = ball.project(x0, x + change)
            asks = tries & (spent < limit) & (proposal != x).flatten(1).any(1)
            at = yield Logits(proposal, only=asks)
            spent = spent + asks
            better = asks & at.open & (goal.margin(at.logits) < margin)
            margin = torch.where(better, goal.margin(at.logits), margin)
            x = torch.where(per_row(better, x), proposal, x)
            tries = tries & ~better
        if not (at.open & (spent < limit)).any():
            return None
    return None
