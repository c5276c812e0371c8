"""An attack of your own, in a file of your own.

Run it beside the built-in ones, through the same judge and into the same records:

    robeval attack model.pt --attack pgd --attack examples/own_attack.py:momentum:steps=20 --eps 1/16 --each

Copied to ``attacks/momentum.py`` it would be a built-in attack; nothing else needs an edit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Gradient
from robeval.core.streams import Streams


@attack(
    source="Dong, Liao, Pang, Su, Zhu, Hu, Li 2018, Boosting Adversarial Attacks with Momentum, arXiv:1710.06081",
    norms=("linf", "l2"),
)
def momentum(x0: Tensor, goal: Goal, ball: Ball, rng: Streams, *, steps: int = 10, decay: float = 1.0) -> Attack:
    """Gradient ascent along a running sum of normalised gradients, from the image itself.

    The sum remembers where earlier steps went, which steadies the direction. Every iterate is judged.

    Args:
        steps: Gradient steps, each of length eps / steps.
        decay: Weight of the running sum at each step.

    Shapes:
        x0 (n, C, H, W) in [0, 1]; returns the same shape.
    Cost:
        ``steps`` forward and backward passes and one more forward per open image.
    Source:
        Dong et al. 2018, arXiv:1710.06081, algorithm 1.
    Departs:
        Clipped to the box [0, 1] at every step.
    """
    x, total = x0, torch.zeros_like(x0)
    for _ in range(steps):
        at = yield Gradient(x, "ce")
        size = at.grad.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(x0.dtype).tiny)
        total = decay * total + at.grad / size
        x = ball.project(x0, x + ball.eps / steps * ball.ascent(total))
    return x
