"""Random noise."""

from __future__ import annotations

from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Logits
from robeval.core.streams import Streams


@attack(
    source="Baseline of Finlay and Oberman 2019, Scaleable input gradient regularization for adversarial robustness,"
    " arXiv:1905.11468",
    norms=("linf", "l2", "l1"),
    access="black-box",
    aliases=("rand",),
)
def noise(x0: Tensor, goal: Goal, ball: Ball, rng: Streams, *, draws: int = 1) -> Attack:
    """Uniform noise in the ball, the worst of several draws.

    A baseline: a model that random noise breaks needs no attack, and a robust one must survive it.

    Args:
        draws: Independent draws per image.

    Shapes:
        x0 (n, C, H, W) in [0, 1]; returns the same shape.
    Cost:
        ``draws`` forward passes per open image.
    Source:
        The random baseline of Finlay and Oberman 2019, arXiv:1905.11468.
    Departs:
        Uniform over the ball before the box is applied, in every norm.
    """
    for _ in range(draws - 1):
        yield Logits(ball.sample(x0, rng))
    return ball.sample(x0, rng)
