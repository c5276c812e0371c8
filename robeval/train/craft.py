"""Inner maximisation: where an attack ends on the network that is being trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from robeval.attacks.pgd import pgd
from robeval.core.ball import Ball, per_row, vector_norm
from robeval.core.classifier import fixed_parameters
from robeval.core.goal import Goal, Loss, Untargeted
from robeval.core.streams import Streams
from robeval.engine.drive import drive
from robeval.train.modes import BnMode, bn_mode


def crafted(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    ball: Any,
    *,
    steps: int,
    step_size: float | None = None,
    loss: str | Loss = "ce",
    random_start: bool = True,
    mode: BnMode = "eval",
) -> Tensor:
    """The point where projected gradient ascent ends, a constant; network and ``.grad`` stay as they were.

    Args:
        model: The network.
        x: (n, C, H, W) in [0, 1].
        y: (n,) labels.
        rng: One stream per image.
        ball: A :class:`~robeval.core.ball.Ball`, or anything with its ``eps``, ``sample``, ``ascent`` and ``project``.
        steps: Gradient steps.
        step_size: Length of a step in pixel units; none means 2.5 eps / steps.
        loss: What is ascended: a loss of :func:`robeval.attacks.pgd.pgd`, or a function ``(goal, logits) -> (n,)``.
        random_start: Start at ``ball.sample``; otherwise at the image.
        mode: Mode of the network meanwhile.

    Shapes:
        (n, C, H, W) -> (n, C, H, W).
    Cost:
        ``steps`` forward and backward passes; one more forward pass with the loss ``kl``.
    """
    goal = Untargeted(y)
    with bn_mode(model, mode), fixed_parameters(model):
        attack = pgd(
            x, goal, ball, rng, steps=steps, step_size=step_size, loss=cast(Any, loss), random_start=random_start
        )
        return drive(attack, model, goal)


def predicted_class() -> Loss:
    """Cross-entropy of the class that the network sees at the first point that it is asked about; needs no label."""
    seen: list[Tensor] = []

    def loss(goal: Goal, z: Tensor) -> Tensor:
        if not seen:
            seen.append(z.detach().argmax(1))
        return Untargeted(seen[0]).cross_entropy(z)

    return loss


@dataclass
class NearBall:
    """A ball whose random point lies beside the image, as TRADES and MART start; the rest is asked of the ball itself.

    Args:
        ball: The threat model.
        sideways: (n, C, H, W), unit direction of each row where its gradient is zero; None to stay there.
    """

    ball: Ball
    sideways: Tensor | None = None

    @property
    def eps(self) -> float:
        return self.ball.eps

    def sample(self, x0: Tensor, rng: Streams) -> Tensor:
        """The image plus Gaussian noise of standard deviation 0.001."""
        return self.ball.project(x0, x0 + 0.001 * rng.normal(*x0.shape[1:]))

    def ascent(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        up = self.ball.ascent(g, x)
        if self.sideways is None:
            return up
        return torch.where(per_row(vector_norm(g, "linf"), g) > 0, up, self.sideways)

    def project(self, x0: Tensor, x: Tensor) -> Tensor:
        return self.ball.project(x0, x)


def paced(eps: float, steps: int) -> float:
    """The linf step of TRADES and MART, 0.007 for 10 steps at eps 0.031, in proportion to both."""
    return 0.07 / 0.031 * eps / steps
