"""Adversarial training with one gradient step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from robeval.core.ball import Ball
from robeval.core.catalogue import trainer
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.craft import crafted
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Wong, Rice, Kolter 2020, Fast is better than free: Revisiting adversarial training, arXiv:2001.03994,"
    " algorithm 3",
    norms=("linf",),
    robust=True,
    aliases=("fast-at",),
    presets={"fgsm-at-zero": {"init": "zero"}},
    passes={"forward": 2, "backward": 2},
    warns={"init=zero": "a zero start overfits to one step sooner than a random one"},
)
def fgsm_at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    *,
    eps: float = 8 / 255,
    step_size: float | None = None,
    init: Literal["random", "zero"] = "random",
    craft: Literal["eval", "train", "train_noupdate"] = "eval",
) -> Iterator[Objective]:
    """Cross-entropy on images that one signed gradient step from a random start made.

    The step is longer than eps and is cut back to the ball, so most pixels end on its surface and some inside. Such
    training can collapse within an epoch (robust against one step, against nothing else); the loop's guard then stops
    it and goes back to the epoch before.

    Args:
        eps: Radius of the threat model in pixel units.
        step_size: Length of the step in pixel units; none means 1.25 eps from a random start and eps from the image.
        init: Start at a uniformly random point of the ball, or at the image (FGSM).
        craft: Mode of the network during the attack; train updates BatchNorm's statistics, as the authors' script does.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        2 forward and backward passes per step.
    Source:
        Wong et al. 2020, arXiv:2001.03994, algorithm 3; with init=zero Goodfellow et al. 2015, arXiv:1412.6572, as in
        Roth et al. 2018.
    Departs:
        The attack runs in eval mode by default.
    """
    if step_size is None:
        step_size = 1.25 * eps if init == "random" else eps
    x_adv = crafted(
        model, x, y, rng, Ball("linf", eps), steps=1, step_size=step_size, random_start=init == "random", mode=craft
    )

    def objective() -> Loss:
        z = model(x_adv)
        return Loss(per_sample_loss(z, y, "ce").mean(), {"train_accuracy": accuracy(z, y)})

    yield objective
