"""MART: adversarial training that looks at misclassified images more closely."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from robeval.core.ball import Ball
from robeval.core.catalogue import trainer
from robeval.core.goal import column, without
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.craft import NearBall, crafted, paced
from robeval.train.step import Loss, Objective, accuracy


def boosted(z_adv: Tensor, y: Tensor) -> Tensor:
    """Boosted cross-entropy: -log q_y - log(1.0001 - max over other classes of q). (n, K), (n,) -> (n,)."""
    rival = without(z_adv.softmax(1), y).amax(1)
    return per_sample_loss(z_adv, y, "ce") - (1.0001 - rival + 1e-12).log()


def weighted_divergence(z: Tensor, z_adv: Tensor, y: Tensor) -> Tensor:
    """(1 - p_y) KL(p || q), which counts where the clean image is not recognised. (n, K), (n, K), (n,) -> (n,)."""
    p, q = z.softmax(1), z_adv.softmax(1)
    return (1.0000001 - column(p, y)) * (p * (z.log_softmax(1) - (q + 1e-12).log())).sum(1)


@trainer(
    source="Wang, Zou, Yi, Bailey, Ma, Gu 2020, Improving Adversarial Robustness Requires Revisiting Misclassified"
    " Examples, ICLR 2020, equation 11 and algorithm 1",
    norms=("linf", "l2"),
    robust=True,
    presets={"mart-wrn": {"beta": 6.0}, "mart-soar": {"beta": 9.0}},
)
def mart(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    *,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 0.031,
    steps: int = 10,
    step_size: float | None = None,
    beta: float = 5.0,
) -> Iterator[Objective]:
    """Boosted cross-entropy on adversarial images, plus a divergence weighted by how wrong the clean image is.

    The attack ascends the cross-entropy. The boosted loss also pushes the best wrong class down; the divergence
    between clean and adversarial probabilities counts by 1 - p_y, through which the network is trained as well.

    Args:
        norm: Norm of the threat model.
        eps: Radius of the threat model in pixel units.
        steps: Gradient steps of the attack.
        step_size: Length of a step in pixel units; none means 0.007 at eps 0.031 and 10 steps, in proportion to both,
            and 2.5 eps / steps in l2.
        beta: Weight of the divergence.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        ``steps`` + 2 forward and ``steps`` + 1 backward passes per step.
    Source:
        Wang et al. 2020, equation 11 and algorithm 1; the constants inside the logarithms from the authors' code.
    Departs:
        The start, the image plus noise of standard deviation 0.001, is cut to ball and box. The authors' code has no
        attack for l2; here it is that of adversarial training, from a random point of the ball.
    """
    ball = Ball(norm, eps)
    around = NearBall(ball) if norm == "linf" else ball
    step_size = step_size or (paced(eps, steps) if norm == "linf" else None)
    x_adv = crafted(model, x, y, rng, around, steps=steps, step_size=step_size)

    def objective() -> Loss:
        z, z_adv = model(x), model(x_adv)
        penalty = beta * weighted_divergence(z, z_adv, y).mean()
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(z_adv, y), "penalty": penalty.detach()}
        return Loss(boosted(z_adv, y).mean() + penalty, logs)

    yield objective
