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


def soar_start(model: nn.Module, x: Tensor, y: Tensor, rng: Streams, *, init: str, norm: str, eps: float) -> Tensor:
    """The point x' around which SOAR expands the loss, detached, inside the box and within eps / 2.

    Args:
        model: The network; crafting runs in eval mode and asks for no parameter gradient.
        x: (n, C, H, W) in [0, 1].
        y: (n,) labels.
        rng: One stream per image.
        init: ``zero`` the image itself, ``rand`` uniform in the ball of radius eps / 2, ``pgd1`` one step of length
            eps / 2 from there, projected on the same ball.
        norm: ``linf`` or ``l2``.
        eps: Radius of the threat model; half of it is used here.
    """
    if init == "zero":
        return x.detach()
    half = Ball(norm, eps / 2)
    if init == "rand":
        return half.sample(x, rng).detach()
    goal = Untargeted(y)
    with bn_mode(model, "eval"), fixed_parameters(model), torch.enable_grad():
        return drive(pgd(x, goal, half, rng, steps=1, step_size=eps / 2), model, goal)
