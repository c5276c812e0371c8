"""Max-margin adversarial training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import trainer
from robeval.core.errors import UsageError
from robeval.core.goal import Goal
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.craft import crafted
from robeval.train.memory import Memory
from robeval.train.modes import bn_mode
from robeval.train.step import Loss, Objective, accuracy

#: What d_max and eps_min are when they are not given.
D_MAX = {"linf": 32 / 255, "l2": 3.0}
EPS_MIN = {"linf": 0.005, "l2": 0.5}


@dataclass
class RowBalls:
    """A ball of its own radius around each image: one ball of radius 1/2 around grey, scaled row by row.

    Args:
        norm: Norm of all balls.
        eps: (n, 1, 1, 1) radii above 0.
        x: Images of the right shape.
    """

    norm: str
    eps: Tensor
    x: Tensor
    half: Ball = field(init=False)
    grey: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.half, self.grey = Ball(self.norm, 0.5), torch.full_like(self.x, 0.5)

    def ascent(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        return self.half.ascent(g, x)

    def project(self, x0: Tensor, x: Tensor) -> Tensor:
        inside = self.half.project(self.grey, self.grey + (x - x0) / (2 * self.eps))
        return (x0 + (inside - self.grey) * (2 * self.eps)).clamp(0, 1)

    def sample(self, x0: Tensor, rng: Streams) -> Tensor:
        return (x0 + (self.half.sample(self.grey, rng) - self.grey) * (2 * self.eps)).clamp(0, 1)


def bisect(crossed: Callable[[Tensor], Tensor], start: Tensor, most: float, steps: int = 10) -> Tensor:
    """Where in [0, most] each row crosses over; ``most`` where it never does.

    Args:
        crossed: Distances to whether the row has crossed there, (n,) -> (n,) bool.
        start: (n,), the first distance to ask about.
        most: Largest distance.
        steps: Questions. The error is at most most / 2^steps, half of that from the middle.
    """
    low, high, e = torch.zeros_like(start), torch.full_like(start, most), start
    for _ in range(steps):
        over = crossed(e)
        low, high = torch.where(over, low, e), torch.where(over, e, high)
        e = (low + high) / 2
    return e


def estimates(memory: Memory, start: float, like: Tensor) -> Tensor:
    """The margin of every training image as it is known so far, ``start`` where it never was. -> (N,)."""
    held = memory.tensors.get("margins", like.new_zeros(0))
    count = int(memory.ids.max()) + 1 if memory.train is None else len(memory.train)
    return torch.cat([held, held.new_full((max(0, count - len(held)),), start)])


@trainer(
    source="Ding, Sharma, Lui, Huang 2020, MMA Training: Direct Input Space Margin Maximization through Adversarial"
    " Training, arXiv:1812.02637, algorithm 1",
    norms=("linf", "l2"),
    robust=True,
    presets={
        "omma": {"clean": 0.0},
        "mma-12": {"d_max": 12 / 255},
        "mma-20": {"d_max": 20 / 255},
        "mma-32": {"d_max": 32 / 255},
    },
)
def mma(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    norm: Literal["linf", "l2"] = "linf",
    d_max: float | None = None,
    eps_min: float | None = None,
    steps: int = 10,
    bisections: int = 10,
    clean: float = 1 / 3,
) -> Iterator[Objective]:
    """Cross-entropy on the decision boundary beside each image, which pushes the boundary away.

    Every image has its own radius, the margin found when it was last seen. PGD in that ball gives a direction, a
    bisection along it the boundary; there the image is trained on while its margin is below d_max. Images that are not
    recognised are trained on as they are.

    Args:
        norm: Norm of the margins.
        d_max: Margin beyond which an image adds nothing, in pixel units; none means 32/255, in l2 3. It should exceed
            the radius that one wants to resist.
        eps_min: Smallest radius of the attack, in pixel units; none means 0.005, in l2 0.5.
        steps: Gradient steps of the attack.
        bisections: Steps of the search for the boundary, between 0 and 1.05 d_max.
        clean: Weight of the clean images' cross-entropy against that on the boundary.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        ``steps`` + ``bisections`` + 3 forward and ``steps`` + 1 backward passes per step; one forward pass fewer with
        clean=0.
    Source:
        Ding et al. 2020, arXiv:1812.02637, algorithm 1 and section 3; constants from the authors' code.
    Departs:
        Attack and bisection run in eval mode without gradients of the weights; in the authors' code the bisection does
        not. The gradients of the two losses are mixed in one backward pass. All images of a mini-batch are attacked,
        those that are not recognised for nothing.
    Raises:
        UsageError: eps_min above 1.05 d_max, or clean outside [0, 1].
    """
    d_max, eps_min = d_max or D_MAX[norm], eps_min or EPS_MIN[norm]
    most = 1.05 * d_max
    if not 0 < eps_min <= most:
        raise UsageError(f"eps_min of mma must lie in (0, 1.05 d_max], got {eps_min} with d_max {d_max}", code="A04")
    if not 0 <= clean <= 1:
        raise UsageError(f"clean of mma must lie in [0, 1], got {clean}", code="A04")

    def soft_margin(goal: Goal, z: Tensor) -> Tensor:
        return per_sample_loss(z, y, "slm")

    margins = estimates(memory, eps_min, x)
    eps = margins[memory.ids].clamp_min(eps_min)
    balls = RowBalls(norm, per_row(eps, x), x)
    u = (crafted(model, x, y, rng, balls, steps=steps, loss=soft_margin) - x) / per_row(eps + 1e-12, x)

    def along(e: Tensor) -> Tensor:
        return (x + per_row(e, x) * u).clamp(0, 1)

    with bn_mode(model, "eval"), torch.no_grad():
        z_now = model(x)
        known = per_sample_loss(z_now, y, "slm") < 0
        e = bisect(lambda d: per_sample_loss(model(along(d)), y, "slm") >= 0, eps, most, bisections)
    e = torch.where(known, e, torch.zeros_like(e))
    boundary, counts = along(e), ~known | (e < d_max)
    margins[memory.ids] = e
    memory.tensors["margins"] = margins
    logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(z_now, y), "margin": e.mean()}

    def objective() -> Loss:
        total = (per_sample_loss(model(boundary), y, "ce") * counts).mean()
        if clean:
            total = clean * per_sample_loss(model(x), y, "ce").mean() + (1 - clean) * total
        return Loss(total, logs)

    yield objective
