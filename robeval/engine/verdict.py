"""The verdict on a candidate adversarial image, independent of the attack that proposed it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.goal import Goal
from robeval.engine.backend import Backend


@dataclass
class Verdicts:
    """One entry per candidate.

    Args:
        adversarial: (n,) bool, the candidate stands.
        prediction: (n,) int64.
        margin: (n,) true logit minus best other logit.
        survives_8bit: (n,) bool, still adversarial as an 8-bit image inside the ball.
        evaluable: (n,) bool, the logits were finite.
    """

    adversarial: Tensor
    prediction: Tensor
    margin: Tensor
    survives_8bit: Tensor
    evaluable: Tensor


def to_8bit(x0: Tensor, x: Tensor, ball: Ball) -> Tensor:
    """The 8-bit image next to ``x`` that stays in the ball where one exists. Shapes: (n, C, H, W) -> same.

    Rounds to the nearest of 256 levels; where that leaves the ball, rounds each pixel towards the clean image.
    """
    nearest = (x * 255).round() / 255
    low, high = ball.limits(x0)
    inner = ((x * 255).round().clamp(min=(low * 255).ceil(), max=(high * 255).floor())) / 255
    nearest = torch.where((inner >= low) & (inner <= high), inner, nearest)
    inward = torch.where(x > x0, (x * 255).floor(), (x * 255).ceil()) / 255
    inside = ball.contains(x0, nearest)
    return torch.where(inside.reshape(-1, 1, 1, 1), nearest, inward)


def judge_points(backend: Backend, x0: Tensor, x: Tensor, goal: Goal, ball: Ball) -> Verdicts:
    """Evaluate candidates afresh, in float32 outside autocast and in a batch of their own.

    A candidate counts when it is finite, in the box, within eps in float64 (tolerance of :mod:`robeval.core.ball`), and
    its prediction meets the goal. Costs two forward passes per candidate: the image and its 8-bit form.

    Shapes:
        x0, x (n, C, H, W) in [0, 1].
    """
    n = len(x)
    rounded = to_8bit(x0, x, ball)
    both = torch.cat([torch.arange(n), torch.arange(n)]).to(x.device)
    with torch.autocast(x.device.type, enabled=False), backend.exactly():
        z = backend.logits(torch.cat([x, rounded]), goal[both])
    finite = z.isfinite().all(1)
    hit = goal[both].reached(z) & finite & ball.contains(torch.cat([x0, x0]), torch.cat([x, rounded]))
    margin = goal[both].margin(z)
    return Verdicts(hit[:n], z[:n].argmax(1), margin[:n], hit[n:], finite[:n])
