"""HopSkipJump."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robeval.attacks.decision import Asking, Oracle, nearest_start, to_boundary
from robeval.core.ball import Ball, per_row, vector_norm
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack
from robeval.core.streams import Streams

#: Random directions of the start; most halvings of a step.
TRIES, HALVINGS = 16, 15
#: Distance of the probes, in units of the paper's.
REACH = 4


def normal_at(
    oracle: Oracle, x: Tensor, radius: Tensor, norm: str, rng: Streams, probes: int, live: Tensor, reserve: int
) -> Asking:
    """The boundary's normal at ``x``, estimated from the answers at random points ``radius`` away.

    Rows stop asking when only ``reserve`` answers are left, and use what they have. Shapes: (n, C, H, W) -> same.
    """
    asked, balance = torch.zeros_like(radius), torch.zeros_like(radius)
    plain, signed = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(probes):
        u = rng.normal(*x.shape[1:]) if norm == "l2" else 2 * rng.uniform(*x.shape[1:]) - 1
        point = (x + per_row(radius / vector_norm(u, "l2"), u) * u).clamp(0, 1)
        asks = live & (oracle.left > reserve)
        hit = yield from oracle.ask(point, asks)
        sign = torch.where(hit, 1.0, -1.0).to(x) * asks
        asked, balance = asked + asks, balance + sign
        plain = plain + per_row(asks, x) * (point - x)
        signed = signed + per_row(sign, x) * (point - x)
    mean = balance / asked.clamp_min(1)
    mean = torch.where(mean.abs() == 1, 0, mean)  # nothing to compare with when all answers agree
    return signed - per_row(mean, x) * plain


@attack(
    source="Chen, Jordan, Wainwright 2020, HopSkipJumpAttack: A Query-Efficient Decision-Based Attack,"
    " arXiv:1904.02144, algorithm 2",
    norms=("l2", "linf"),
    access="black-box",
    search="minimal",
)
def hopskipjump(
    x0: Tensor, goal: Goal, ball: Ball, rng: Streams, *, queries: int = 5000, probes: int | None = None
) -> Attack:
    """Walks along the decision boundary towards the image; sees the predicted class only.

    Each round estimates the normal of the boundary from the classes of random points nearby, steps along it into the
    misclassified side, halving the step until it stays there, and returns to the boundary by binary search.

    Args:
        queries: Most queries per image.
        probes: Points for the first estimate, sqrt(t) times as many for the t-th; none means queries / 20, at most 100.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        At most ``queries`` forward passes per image.
    Source:
        Chen et al. 2020, arXiv:1904.02144, algorithms 1 and 2.
    Departs:
        Starts from the nearest of several noise directions, probes at 4 times the paper's radius (in the first round
        too), so that the tolerance of the binary search does not drown the answers, and spends the last queries on a
        step with as many probes as are left.
    """
    size = x0[0].numel()
    tolerance = size**-1.5 if ball.norm == "l2" else size**-2.0
    reserve = math.ceil(-math.log2(tolerance)) + 3
    probes = probes or min(100, max(1, queries // 20))
    oracle = Oracle(goal, queries, x0)
    x = yield from nearest_start(oracle, x0, ball, rng, TRIES, 0.01)
    t, live = 0, (x != x0).flatten(1).any(1)
    while (live := live & (oracle.left > reserve)).any():
        t, distance = t + 1, ball.norm_of(x - x0)
        count = int(probes * math.sqrt(t))
        normal = yield from normal_at(oracle, x, REACH * distance / size, ball.norm, rng, count, live, reserve)
        direction, step = ball.ascent(normal), distance / math.sqrt(t)
        ahead, pending = x, live
        for _ in range(HALVINGS):
            point = (x + per_row(step, x) * direction).clamp(0, 1)
            hit = yield from oracle.ask(point, pending)
            ahead, pending = torch.where(per_row(hit, x), point, ahead), pending & ~hit
            step = step / 2
        x = yield from to_boundary(oracle, x0, ahead, live & ~pending, ball, tolerance)
    return None
