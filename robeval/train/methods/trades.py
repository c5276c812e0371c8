"""TRADES: cross-entropy on the image, divergence on its neighbourhood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from robeval.core.ball import Ball
from robeval.core.catalogue import trainer
from robeval.core.losses import kl, per_sample_loss
from robeval.core.streams import Streams
from robeval.train.craft import NearBall, crafted, paced
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan 2019, Theoretically Principled Trade-off between Robustness and"
    " Accuracy, arXiv:1901.08573, equation 5 and algorithm 1",
    norms=("linf", "l2"),
    robust=True,
    presets={"trades-soar": {"beta": 9.0}},
)
def trades(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    *,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 0.031,
    steps: int = 10,
    step_size: float | None = None,
    beta: float = 6.0,
) -> Iterator[Objective]:
    """Cross-entropy on the image, plus how far the probabilities can be moved inside the ball.

    The attack ascends the divergence KL(p(x) || p(x')) and needs no label. Both terms train the network through p(x)
    and p(x'); the clean probabilities are constants only while crafting.

    Args:
        norm: Norm of the threat model.
        eps: Radius of the threat model in pixel units.
        steps: Gradient steps of the attack.
        step_size: Length of a step in pixel units; none means 0.007 at eps 0.031 and 10 steps, in proportion to both,
            and 2 eps / steps in l2.
        beta: Weight of the divergence, 1 / lambda in the paper.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        ``steps`` + 3 forward and ``steps`` + 1 backward passes per step.
    Source:
        Zhang et al. 2019, arXiv:1901.08573, equation 5 and algorithm 1; start, step sizes and the l2 attack from the
        authors' code.
    Departs:
        The clean probabilities of the attack are computed once, not at every step. The start, the image plus noise of
        standard deviation 0.001, is cut to ball and box. Where the gradient vanishes in l2, the random direction has
        unit length and is drawn once per image.
    """
    ball = Ball(norm, eps)
    if norm == "l2":
        around = NearBall(ball, ball.ascent(rng.normal(*x.shape[1:])))
    else:
        around = NearBall(ball)
    step_size = step_size or (paced(eps, steps) if norm == "linf" else 2 * eps / steps)
    x_adv = crafted(model, x, y, rng, around, steps=steps, step_size=step_size, loss="kl")

    def objective() -> Loss:
        z, z_adv = model(x), model(x_adv)
        penalty = beta * kl(z, z_adv).mean()
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(z_adv, y), "penalty": penalty.detach()}
        return Loss(per_sample_loss(z, y, "ce").mean() + penalty, logs)

    yield objective
