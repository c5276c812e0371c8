"""Fast minimum norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robeval.attacks.nearer import annealed, within
from robeval.core.ball import Ball
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Gradient
from robeval.core.streams import Streams


@attack(
    source="Pintor, Roli, Brendel, Biggio 2021, Fast Minimum-norm Adversarial Attacks through Adaptive Norm"
    " Constraints, arXiv:2102.12827, algorithm 1",
    norms=("linf", "l2", "l1"),
    search="minimal",
)
def fmn(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
) -> Attack:
    """Ascends the margin inside a ball whose radius closes in on the boundary.

    Until the first success the radius is the distance to the boundary as the gradient estimates it; then it shrinks
    after each success and grows after each failure, by ever smaller shares.

    Args:
        steps: Gradient steps.
        step_size: Length (l2) of the first step in pixel units; annealed to a hundredth by a cosine.
        gamma: Share by which the radius changes at first; annealed to 0.001.

    Shapes:
        x0 (n, C, H, W) in [0, 1]; returns the same shape.
    Cost:
        ``steps`` forward and backward passes and one more forward per image.
    Source:
        Pintor et al. 2021, arXiv:2102.12827, algorithm 1.
    Departs:
        Starts at the image, without an initial adversarial point. After a fifth of the steps the radius of an image
        without a success grows at every step by at least its share; the estimate alone creeps up to the boundary and
        may never cross it. In l2 a change shorter than the radius is stretched to it. The last iterate is judged too.
    """
    farthest = ball.norm_of(torch.maximum(x0, 1 - x0))  # no point of the box is farther
    x, best, eps = x0, farthest, torch.zeros_like(farthest)
    found = torch.zeros_like(eps, dtype=torch.bool)
    steepest = Ball("l2", math.inf).ascent  # the gradient's own direction, whatever the norm of the ball
    for k in range(steps):
        at = yield Gradient(x, "cw")
        alpha, share = annealed(step_size, step_size / 100, k / steps), annealed(gamma, 0.001, k / steps)
        hit, length = goal.reached(at.logits), ball.norm_of(x - x0)
        found = found | hit
        best = torch.where(hit, torch.minimum(length, best), best)
        boundary = length + at.loss.abs() / ball.dual_norm(at.grad).clamp_min(1e-12)
        grown = (1 + share) * eps
        estimate = boundary if k < steps // 5 else torch.maximum(grown, boundary)
        grown = torch.where(found, grown, estimate)
        eps = torch.where(hit, torch.minimum((1 - share) * eps, best), grown)
        eps = torch.minimum(eps, farthest)
        x = (x0 + within(x - x0 + alpha * steepest(at.grad), ball.norm, eps)).clamp(0, 1)
    return x
