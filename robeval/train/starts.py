"""Where an inner loop begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from robeval.attacks.pgd import pgd
from robeval.core.ball import Ball, per_row, vector_norm
from robeval.core.classifier import fixed_parameters
from robeval.core.goal import Untargeted
from robeval.core.streams import Streams
from robeval.engine.drive import drive
from robeval.train.modes import bn_mode


def l2_ball(ball: Ball, x0: Tensor, rng: Streams) -> Tensor:
    """Uniform in the ball: a Gaussian direction times eps u^(1/d)."""
    return ball.sample(x0, rng)


def l2_radius(ball: Ball, x0: Tensor, rng: Streams) -> Tensor:
    """A Gaussian direction times r eps, r uniform: denser at the centre (the AWP code)."""
    d = rng.normal(*x0.shape[1:])
    return ball.project(x0, x0 + d * per_row(ball.eps * rng.uniform() / vector_norm(d, "l2"), d))


def l2_sphere(ball: Ball, x0: Tensor, rng: Streams) -> Tensor:
    """A Gaussian direction of length eps (the robustness library)."""
    d = rng.normal(*x0.shape[1:])
    return ball.project(x0, x0 + d * per_row(ball.eps / vector_norm(d, "l2"), d))


def l2_image(ball: Ball, x0: Tensor, rng: Streams) -> Tensor:
    """A uniformly random image, projected on the ball (AdverTorch)."""
    return ball.project(x0, rng.uniform(*x0.shape[1:]))


def l2_cube(ball: Ball, x0: Tensor, rng: Streams) -> Tensor:
    """A vector uniform in a cube, scaled to length eps (the code of SOAR's first author)."""
    d = 2 * rng.uniform(*x0.shape[1:]) - 1
    return ball.project(x0, x0 + d * per_row(ball.eps / vector_norm(d, "l2"), d))


L2_STARTS: dict[str, Callable[[Ball, Tensor, Streams], Tensor]] = {
    "ball": l2_ball,
    "radius": l2_radius,
    "sphere": l2_sphere,
    "image": l2_image,
    "cube": l2_cube,
}


@dataclass
class StartingBall:
    """A ball whose random point is drawn in another way; everything else is asked of the ball itself."""

    ball: Ball
    start: Callable[[Ball, Tensor, Streams], Tensor]

    @property
    def eps(self) -> float:
        return self.ball.eps

    def ascent(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        return self.ball.ascent(g, x)

    def project(self, x0: Tensor, x: Tensor) -> Tensor:
        return self.ball.project(x0, x)

    def sample(self, x0: Tensor, rng: Streams) -> Tensor:
        return self.start(self.ball, x0, rng)


def starting(ball: Ball, l2_init: str) -> Ball:
    """The ball with the named way to draw a start; only l2 knows more than one."""
    if ball.norm != "l2" or l2_init == "ball":
        return ball
    return cast(Ball, StartingBall(ball, L2_STARTS[l2_init]))


#: What the start has left of the radius for the penalty around it; 1 where it spends none, or does not count it.
LEFT = {"zero": 1.0, "rand": 0.5, "pgd1": 0.5, "pgd1_author": 1.0}


def radius_left(init: str, eps: float, split: bool) -> float:
    """Radius eps_R of the expansion around :func:`soar_start`: what the start has not spent, or all of it unsplit."""
    return eps * LEFT[init] if split else eps


def soar_start(model: nn.Module, x: Tensor, y: Tensor, rng: Streams, *, init: str, norm: str, eps: float) -> Tensor:
    """The point x' around which SOAR and FOAR expand the loss, detached and inside the box.

    Args:
        model: The network; crafting runs in eval mode and asks for no parameter gradient.
        x: (n, C, H, W) in [0, 1].
        y: (n,) labels.
        rng: One stream per image.
        init: ``zero`` the image itself, ``rand`` uniform in the ball of radius eps / 2, ``pgd1`` one step of length
            eps / 2 from there, projected on the same ball, ``pgd1_author`` one step of eps / 4 from a random point of
            the whole ball.
        norm: Norm of the threat model.
        eps: Radius of the threat model.
    """
    if init == "zero":
        return x.detach()
    whole = init == "pgd1_author"
    ball, step_size = Ball(norm, eps if whole else eps / 2), eps / 4 if whole else eps / 2
    if init == "rand":
        return ball.sample(x, rng).detach()
    goal = Untargeted(y)
    with bn_mode(model, "eval"), fixed_parameters(model), torch.enable_grad():
        return drive(pgd(x, goal, ball, rng, steps=1, step_size=step_size), model, goal)
