"""Fast gradient method."""

from __future__ import annotations

from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Gradient
from robeval.core.streams import Streams


@attack(
    source="Goodfellow, Shlens, Szegedy 2015, Explaining and Harnessing Adversarial Examples, arXiv:1412.6572",
    norms=("l2",),
)
def fgm(x0: Tensor, goal: Goal, ball: Ball, rng: Streams) -> Attack:
    """One gradient step of length eps along the gradient.

    The cheapest white-box attack, x + eps g / ||g||_2, with g the gradient of the cross-entropy at the image.
    Weak: use it to spot label leaking and masked gradients, never as evidence of robustness.

    Shapes:
        x0 (n, C, H, W) in [0, 1]; returns the same shape.
    Cost:
        1 forward and 1 backward pass, and 1 forward for the result, per open image.
    Source:
        Goodfellow et al. 2015, arXiv:1412.6572, section 4.
    Departs:
        The paper has the linf form; this is its l2 counterpart. An image with zero gradient stays where it is.
    """
    at = yield Gradient(x0, "ce")
    return ball.project(x0, x0 + ball.eps * ball.ascent(at.grad))
