"""What attacks do to a mini-batch, for trainers that learn from the perturbations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robeval.attacks.deepfool import deepfool
from robeval.attacks.fgsm import fgsm
from robeval.attacks.pgd import pgd
from robeval.core.ball import Ball
from robeval.core.classifier import fixed_parameters
from robeval.core.goal import Goal, Untargeted
from robeval.core.questions import Attack
from robeval.core.streams import Streams
from robeval.engine.drive import drive
from robeval.train.modes import bn_mode


def away_from_prediction(attack: Callable[[Goal], Attack], model: nn.Module, x: Tensor) -> Tensor:
    """Drive an attack that leaves the class which the model itself gives the images; crafted in eval mode.

    The attack's first question must be about ``x``: its logits are the prediction, so that it costs no pass of its own.

    Args:
        attack: Makes the attack for a goal.
        model: The network.
        x: (n, C, H, W) in [0, 1].

    Shapes:
        Returns (n, C, H, W).
    """
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    unseen = [True]

    def logits(points: Tensor) -> Tensor:
        z: Tensor = model(points)
        if unseen:
            unseen.clear()
            labels.copy_(z.detach().argmax(1))  # the goal sees the new labels before it looks at z
        return z

    goal = Untargeted(labels)
    with bn_mode(model, "eval"), fixed_parameters(model):
        return drive(attack(goal), logits, goal)


def perturbation(
    kind: str, model: nn.Module, x: Tensor, rng: Streams, *, eps: float = 8 / 255, steps: int = 10
) -> Tensor:
    """x_adv - x of an attack on the predicted labels, started at the image itself and clipped to the box.

    Args:
        kind: ``fgsm``, ``pgd`` with steps of eps / 5, or ``deepfool`` with at most 100 steps and overshoot 0.02.
        model: The network.
        x: (n, C, H, W) in [0, 1].
        rng: One stream per image.
        eps: Radius of the first two, linf.
        steps: Steps of pgd.

    Shapes:
        Returns (n, C, H, W).
    Cost:
        1 forward and backward pass for fgsm, ``steps`` for pgd, 2 + steps forward and (K - 1) * steps backward at most
        for deepfool, whose slowest image decides.
    """
    ball = Ball("linf", eps)
    attacks: dict[str, Callable[[Goal], Attack]] = {
        "fgsm": lambda goal: fgsm(x, goal, ball, rng),
        "pgd": lambda goal: pgd(x, goal, ball, rng, steps=steps, relative_step=1 / 5, random_start=False),
        "deepfool": lambda goal: deepfool(x, goal, Ball("l2", math.inf), rng, steps=100, overshoot=0.02),
    }
    return away_from_prediction(attacks[kind], model, x) - x
