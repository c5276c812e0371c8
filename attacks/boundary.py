"""Boundary attack."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.attacks.decision import Oracle, nearest_start
from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack
from robeval.core.streams import Streams

#: Random directions of the start; every how many proposals the sideways move is asked about by itself.
TRIES, CHECK = 16, 10
#: An image whose step towards it has shrunk to this share of the distance is done.
CONVERGED = 1e-6


@attack(
    source="Brendel, Rauber, Bethge 2018, Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box"
    " Machine Learning Models, arXiv:1712.04248, algorithm 1",
    norms=("l2",),
    access="black-box",
    search="minimal",
)
def boundary(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    queries: int = 5000,
    sideways: float = 0.3,
    forward: float = 0.03,
) -> Attack:
    """Random walk along the decision boundary towards the image; sees the predicted class only.

    A proposal moves sideways on the sphere around the image, then forward to the image, and is kept if it is still
    misclassified. Both lengths adapt so that half of the sideways moves and a quarter of the proposals succeed.

    Args:
        queries: Most queries per image.
        sideways: First length of the sideways move, as a share of the distance.
        forward: First length of the move to the image, as a share of the distance.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        At most ``queries`` forward passes per image; fewer once the walk has converged.
    Source:
        Brendel et al. 2018, arXiv:1712.04248, algorithm 1.
    Departs:
        Starts from the nearest of several noise directions. Lengths change a little after every answer instead of by
        counts over a window, and the sideways move alone is asked about at every tenth proposal only.
    """
    oracle = Oracle(goal, queries, x0)
    x = yield from nearest_start(oracle, x0, ball, rng, TRIES, 0.01)
    found, k = (x != x0).flatten(1).any(1), 0
    turn = torch.full_like(oracle.left, sideways, dtype=x.dtype)
    step = torch.full_like(turn, forward)
    while (live := found & (oracle.left > 0) & (step > CONVERGED)).any():
        distance = ball.norm_of(x - x0)
        radial = ball.ascent(x - x0)
        u = rng.normal(*x0.shape[1:])
        u = ball.ascent(u - per_row((u * radial).flatten(1).sum(1), u) * radial)
        around = radial + per_row(turn, u) * u
        around = (x0 + per_row(distance / (1 + turn**2).sqrt(), u) * around).clamp(0, 1)
        fits = live
        if k % CHECK == 0:
            fits = yield from oracle.ask(around, live)
            turn = (turn * torch.where(fits, 1.2, 1 / 1.2)).clamp_max(1)
        length = ball.norm_of(around - x0)  # the box may have brought it nearer already
        ahead = (1 - step) * distance / torch.where(length > 0, length, 1)
        proposal = (x0 + per_row(ahead.clamp_max(1), u) * (around - x0)).clamp(0, 1)
        kept = yield from oracle.ask(proposal, fits)
        step = torch.where(live, step * torch.where(kept, 1.1, 1.1 ** (-1 / 3)), step).clamp_max(0.5)
        x, k = torch.where(per_row(kept, x), proposal, x), k + 1
    return None
