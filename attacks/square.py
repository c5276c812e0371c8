"""The Square attack."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Logits
from robeval.core.streams import Streams

#: The share of the image that a square covers is halved after each of these proposals (of 10,000).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def side(proposal: int, share: float, height: int, width: int) -> int:
    """Side of the square at a proposal of the 10,000-proposal schedule."""
    share = share / 2 ** sum(proposal > h for h in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


@attack(
    source="Andriushchenko, Croce, Flammarion, Hein 2020, Square Attack: a query-efficient black-box adversarial attack"
    " via random search, arXiv:1912.00049, algorithms 1 and 2",
    norms=("linf",),
    access="black-box",
    attempts="restarts",
)
def square(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    queries: int = 5000,
    share: float = 0.8,
    schedule: Literal["autoattack", "paper"] = "autoattack",
    restarts: int = 1,
) -> Attack:
    """Random search with squares of +-eps that shrink over time; sees logits only.

    Starts from vertical stripes of +-eps. A proposal paints one square per image, one sign per channel, and is kept
    when the margin falls.

    Args:
        queries: Proposals after the start.
        share: Share of the image that the first squares cover.
        schedule: autoattack shrinks the squares as if there were 10,000 proposals; paper rescales the schedule to the
            budget.
        restarts: Independent runs; the worst case counts.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        At most ``queries`` + 1 forward passes per restart and open image; none for a proposal that changes nothing.
    Source:
        Andriushchenko et al. 2020, arXiv:1912.00049, algorithm 1 with the linf sampling of algorithm 2.
    Departs:
        Every image draws its own squares (the AutoAttack code shares them over a batch), squares reach the last row and
        column, and proposals that change nothing are skipped rather than drawn again.
    """
    channels, height, width = x0.shape[1:]
    x = ball.project(x0, x0 + ball.eps * rng.sign(channels, 1, width))
    at = yield Logits(x)
    margin = goal.margin(at.logits)
    down = torch.arange(height, device=x0.device)[None, None, :, None]
    along = torch.arange(width, device=x0.device)[None, None, None, :]
    low, high = ball.limits(x0)
    for query in range(queries):
        if query % 64 == 0:  # draw for many proposals at once: the generator works on whole blocks
            places, signs = rng.uniform(64, 2).double(), rng.sign(64, channels)
        scaled = query if schedule == "autoattack" else int(query / queries * 10_000)
        s = side(scaled, share, height, width)
        free = torch.tensor([height - s + 1, width - s + 1], device=x0.device)
        top, left = (places[:, query % 64] * free).long().minimum(free - 1).unbind(1)
        top, left = per_row(top, x0), per_row(left, x0)
        window = (down >= top) & (down < top + s) & (along >= left) & (along < left + s)
        proposal = torch.where(window, torch.where(signs[:, query % 64, :, None, None] > 0, high, low), x)
        changed = (proposal != x).flatten(1).any(1)
        at = yield Logits(proposal, only=changed)
        better = changed & at.open & (goal.margin(at.logits) < margin)
        margin = torch.where(better, goal.margin(at.logits), margin)
        x = torch.where(per_row(better, x), proposal, x)
    return None
