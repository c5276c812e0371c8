"""Gaussian noise."""

from __future__ import annotations

from torch import Tensor

from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Logits
from robeval.core.streams import Streams


@attack(
    source="Baseline of Rauber, Brendel, Bethge 2017, Foolbox: A Python toolbox to benchmark the robustness of machine"
    " learning models, arXiv:1707.04131",
    norms=("l2", "linf"),
    access="black-box",
)
def gaussian(x0: Tensor, goal: Goal, ball: Ball, rng: Streams, *, draws: int = 1) -> Attack:
    """White Gaussian noise of size eps, the worst of several draws.

    A baseline: in l2 every draw has length eps, in linf every pixel has standard deviation eps and is clipped to +-eps.

    Args:
        draws: Independent draws per image; the first ones are the same however many there are.

    Shapes:
        x0 (n, C, H, W) in [0, 1]; returns the same shape.
    Cost:
        ``draws`` forward passes per open image.
    Source:
        The additive noise attacks of Rauber et al. 2017, arXiv:1707.04131.
    Departs:
        In linf the noise is clipped, not rescaled: the largest of many pixels would leave the others far inside.
    """
    for draw in range(draws):
        d = rng.normal(*x0.shape[1:])
        if ball.norm == "l2":
            d = d / per_row(ball.norm_of(d), d)
        x = ball.project(x0, x0 + ball.eps * d)
        if draw + 1 < draws:
            yield Logits(x)
    return x
