"""The attack of Carlini and Wagner in l2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robeval.attacks.decision import Oracle, to_boundary
from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Gradient
from robeval.core.streams import Streams


@attack(
    source="Carlini and Wagner 2017, Towards Evaluating the Robustness of Neural Networks, arXiv:1608.04644,"
    " sections V and VI.A",
    norms=("l2",),
    search="minimal",
    aliases=("carlini-wagner",),
)
def cw_l2(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    searches: int = 9,
    iterations: int = 1000,
    learning_rate: float = 0.01,
    c: float = 1e-3,
    confidence: float = 0.0,
    bisections: int = 10,
) -> Attack:
    """Minimises the squared distance plus c times the margin with Adam, and searches for the smallest c that succeeds.

    The image is the tanh of a free variable, so that the box needs no projection.

    Args:
        searches: Values of c that are tried: ten times larger until one succeeds, halving the interval from then on.
        iterations: Most Adam steps per value of c.
        learning_rate: Of Adam, in units of the free variable.
        c: First weight of the margin.
        confidence: Margin, in logits, that the search wants beyond the boundary.
        bisections: Halvings of the line between the image and the nearest point found, in the end.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        At most ``searches`` x ``iterations`` forward and backward passes per image, mostly a sixth to a half of that,
        and ``bisections`` forward passes.
    Source:
        Carlini and Wagner 2017, arXiv:1608.04644, section V.B (objective f6, tanh variable) and section VI.A (l2).
    Departs:
        An image leaves a search on its own when its lowest loss has not fallen by 0.01 % in a tenth of the iterations,
        20 at least; the published code compares momentary losses, summed over the batch. The nearest misclassified
        point is kept even where it lacks the confidence, and is drawn to the boundary by bisection in the end. A long
        search is not repeated with the largest c.
    """
    shrunk = (2 * x0 - 1) * (1 - 1e-6)
    start = ((1 + shrunk).log() - (1 - shrunk).log()) / 2  # atanh, whose rounding in torch depends on the place
    weight = x0.new_full((len(x0),), c)
    low, high = torch.zeros_like(weight), torch.full_like(weight, math.inf)
    nearest, distance = x0, torch.full_like(weight, math.inf)
    window = max(20, iterations // 10)  # less is within one swing of Adam
    for _ in range(searches):
        w, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
        lowest, before = torch.full_like(weight, math.inf), torch.full_like(weight, math.inf)
        active = torch.ones_like(weight, dtype=torch.bool)
        found = ~active
        for k in range(1, iterations + 1):
            tanh = w.tanh()
            x = (tanh + 1) / 2
            at = yield Gradient(x, "cw", only=active)
            short = goal.margin(at.logits) + confidence
            hit = active & goal.reached(at.logits)
            found = found | (hit & (short <= 0))
            length = ball.norm_of(x - x0)
            closer = hit & (length < distance)
            distance, nearest = torch.where(closer, length, distance), torch.where(per_row(closer, x), x, nearest)
            loss = length * length + weight * short.clamp_min(0)
            lowest = torch.where(active, torch.minimum(lowest, loss), lowest)
            if k % window == 0:
                active, before = active & at.open & (lowest < 0.9999 * before), lowest
                if not active.any():
                    break
            slope = 2 * (x - x0) - per_row(weight * (short > 0), x) * at.grad
            slope = slope * (1 - tanh * tanh) / 2
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope * slope
            step = first / (1 - 0.9**k) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)
            w = w - learning_rate * step
        high, low = torch.where(found, weight, high), torch.where(found, low, weight)
        weight = torch.where(high.isinf(), 10 * weight, (low + high) / 2)
    oracle = Oracle(goal, bisections, x0)
    yield from to_boundary(oracle, x0, nearest, distance.isfinite(), ball, 2.0**-bisections)
    return None
