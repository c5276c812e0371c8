"""Adversarial training for free."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robeval.core.ball import Ball
from robeval.core.catalogue import trainer
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor, Goldstein 2019, Adversarial Training for"
    " Free!, arXiv:1904.12843, algorithm 1",
    norms=("linf",),
    robust=True,
)
def free_at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    eps: float = 8 / 255,
    step_size: float | None = None,
    replays: int = 8,
) -> Iterator[Objective]:
    """Cross-entropy on images whose perturbation moves along the gradients that the weights are trained with.

    Each mini-batch is trained on several times in a row; the backward pass of each time serves both the weights and
    the perturbation of the images, which the next mini-batch starts from. Divide the number of epochs by the replays.

    Args:
        eps: Radius of the threat model in pixel units.
        step_size: Length of a step of the perturbation in pixel units; none means eps.
        replays: Optimiser steps per mini-batch.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        ``replays`` forward and backward passes for as many optimiser steps.
    Source:
        Shafahi et al. 2019, arXiv:1904.12843, algorithm 1.
    Departs:
        The perturbation is cut to the box of the new images before it is first used on them. It is zero before the
        first mini-batch.
    Raises:
        UsageError: fewer than one replay.
    """
    if replays < 1:
        raise UsageError(f"replays of free-at must be at least 1, got {replays}", code="A04")
    ball = Ball("linf", eps)
    held = memory.tensors.get("delta", torch.zeros_like(x))  # the last mini-batch of an epoch may be smaller
    points = ball.project(x, x + held[: len(x)])
    for _ in range(replays):

        def objective() -> Loss:
            nonlocal points
            points = points.detach().requires_grad_()
            z = model(points)
            return Loss(per_sample_loss(z, y, "ce").mean(), {"train_accuracy": accuracy(z, y)})

        yield objective
        assert points.grad is not None  # the optimiser step has just been backward through the objective
        points = ball.project(x, points.detach() + (eps if step_size is None else step_size) * points.grad.sign())
        memory.tensors["delta"] = torch.cat([points - x, held[len(x) :]])
