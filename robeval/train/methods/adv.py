"""Adversarial training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from robeval.core.ball import Ball
from robeval.core.catalogue import trainer
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.craft import crafted
from robeval.train.starts import starting
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Madry, Makelov, Schmidt, Tsipras, Vladu 2018, Towards Deep Learning Models Resistant to Adversarial"
    " Attacks, arXiv:1706.06083, section 2",
    norms=("linf", "l2"),
    robust=True,
    aliases=("pgd-at", "madry"),
)
def adv(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    *,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    start: Literal["random", "zero"] = "random",
    l2_init: Literal["ball", "radius", "sphere", "image", "cube"] = "ball",
    craft: Literal["eval", "train", "train_noupdate"] = "eval",
) -> Iterator[Objective]:
    """Cross-entropy on images that projected gradient ascent made, and on those only.

    Every mini-batch is attacked with the house's own PGD for the given number of steps; the point where it ends is
    trained on. The adversarial images are constants of the optimiser step.

    Args:
        norm: Norm of the threat model.
        eps: Radius of the threat model in pixel units.
        steps: Gradient steps of the attack.
        step_size: Length of a step in pixel units; none means 2.5 eps / steps, which is 2/255 at the defaults.
        start: Start at a random point of the ball, or at the image.
        l2_init: How the random start is drawn in l2: uniform in the ball; a direction times a uniform radius (AWP's
            code); on the sphere (robustness library); a random image projected (AdverTorch, SOAR's tables); a cube
            vector scaled to eps.
        craft: Mode of the network during the attack; train updates BatchNorm's statistics, as AWP's script does.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        ``steps`` + 1 forward and backward passes per step.
    Source:
        Madry et al. 2018, arXiv:1706.06083, section 2, equation 2.1.
    Departs:
        The projection on the box is always on; Finlay and Oberman's code leaves it out.
    """
    ball = starting(Ball(norm, eps), l2_init)
    x_adv = crafted(
        model, x, y, rng, ball, steps=steps, step_size=step_size, random_start=start == "random", mode=craft
    )

    def objective() -> Loss:
        z = model(x_adv)
        return Loss(per_sample_loss(z, y, "ce").mean(), {"train_accuracy": accuracy(z, y)})

    yield objective
