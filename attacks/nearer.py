"""What searches for the nearest point share: a radius that closes in on the boundary, and a last descent along it."""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
from torch import Tensor

from robeval.core.ball import Ball, per_row, project_l1, vector_norm
from robeval.core.goal import Goal
from robeval.core.questions import Answer, Gradient, Logits, Question

#: First and last share by which the radius changes, and first and last step as a share of the distance. Chosen on
#: adversarially trained networks for digits and Fashion-MNIST, among shares of 0.005 to 0.03 and steps of 0.03 to 0.3.
SHARE, STEP = (0.03, 5e-4), (0.3, 1e-3)


def annealed(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def within(d: Tensor, norm: str, eps: Tensor) -> Tensor:
    """Each row brought into the ball of its own radius, in l2 onto its sphere. Shapes: (n, ...), (n,) -> (n, ...)."""
    if norm == "linf":
        limit = per_row(eps, d)
        return torch.minimum(torch.maximum(d, -limit), limit)
    if norm == "l2":
        return d * per_row(eps / vector_norm(d, "l2").clamp_min(1e-12), d)
    return project_l1(d, eps[:, None])


def nearest(distance: Tensor, group: Tensor) -> Tensor:
    """The row of each group with the least distance, the first among equals; none where all are infinite.

    Shapes:
        distance (n,), group (n, k), rows of equal numbers belong together -> (n,) bool.
    """
    groups, of = group.unique(dim=0, return_inverse=True)
    least = distance.new_full((len(groups),), torch.inf).scatter_reduce(0, of, distance, "amin")
    place = torch.arange(len(of), device=of.device)
    candidates = torch.where((distance == least[of]) & distance.isfinite(), place, len(of))
    first = torch.full_like(of[: len(groups)], len(of)).scatter_reduce(0, of, candidates, "amin")
    return first[of] == place


def nearer(
    x: Tensor, x0: Tensor, goal: Goal, ball: Ball, only: Tensor, steps: int
) -> Generator[Question, Answer, None]:
    """Ascend the margin on a sphere that shrinks after each misclassified point and grows after each other one.

    FMN's alternation (Pintor et al. 2021, arXiv:2102.12827, algorithm 1) with two changes that suit a start on the
    boundary: steps are measured by the distance (and steepest in linf for linf), and the radius stays below the best
    distance, so that each success is nearer than the one before. Use with ``yield from``; the engine judges all points.

    Args:
        x: Misclassified points, (n, C, H, W).
        x0: The images, same shape.
        goal: One goal per row.
        ball: Its norm counts.
        only: (n,) bool, the rows that go on.
        steps: Gradients per row.
    """
    best = radius = ball.norm_of(x - x0)
    steepest = Ball("l2", math.inf) if ball.norm == "l1" else ball
    for k in range(steps):
        at = yield Gradient(x, "cw", only=only)
        hit = at.open & goal.reached(at.logits)
        share, step = annealed(*SHARE, k / steps), annealed(*STEP, k / steps)
        best = torch.where(hit, torch.minimum(best, ball.norm_of(x - x0)), best)
        radius = torch.where(hit, (1 - share) * best, torch.minimum((1 + share) * radius, (1 - SHARE[1]) * best))
        move = per_row(step * steepest.norm_of(x - x0), x) * steepest.ascent(at.grad)
        x = (x0 + within(x - x0 + move, ball.norm, radius)).clamp(0, 1)
    if steps:
        yield Logits(x, only=only)
