"""Input-gradient regularization by finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from robeval.core.ball import DUAL
from robeval.core.catalogue import trainer
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.gradients import penalty_points, unit_direction
from robeval.train.modes import bn_mode, differs_in_training, fp32_exact
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Finlay, Oberman 2021, Scaleable input gradient regularization for adversarial robustness, arXiv:1905.11468,"
    " algorithm 1",
    norms=("linf", "l2", "l1"),
    robust=True,
    aliases=("tulip", "tikhonov"),
    presets={
        "grad-l2": {"grad_norm": "l2"},
        "grad-l1": {"grad_norm": "l1"},
        "grad-linf": {"grad_norm": "linf"},
    },
)
def fd_grad(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    *,
    norm: Literal["linf", "l2", "l1"] = "l2",
    grad_norm: Literal["dual", "l2", "l1", "linf"] = "dual",
    weight: float = 0.1,
    squared: bool = True,
    order: int = 1,
    h: float = 0.01,
    l1_rescale: bool = False,
    loss: Literal["ce", "cw", "cw_prob"] = "ce",
    penalty_space: Literal["pixel", "normalised"] = "pixel",
    batchnorm: Literal["frozen", "train"] = "frozen",
) -> Iterator[Objective]:
    """The loss plus the norm of its input gradient, measured by one finite difference along the gradient.

    The gradient's own direction is a constant, so the change of the loss along it is its norm, and one ordinary
    backward pass through both evaluations trains the penalty without double differentiation.

    Args:
        norm: Norm of the threat model; the penalty takes the dual norm of the gradient.
        grad_norm: Norm of the gradient, when it should not follow from the threat model.
        weight: Strength lambda of the penalty (lambda / 2 times the square, or lambda times the norm).
        squared: Penalise the square of the norm.
        order: 1 for a forward difference, 2 for a central one.
        h: Step of the difference, in pixel units along a direction of unit Euclidean length.
        l1_rescale: Multiply the l1 difference by sqrt(N), so that it estimates the l1 norm itself and lambda means
            the same as for other norms.
        loss: Loss of both terms.
        penalty_space: Take the difference, h and the gradient in pixels, or behind the network's normalisation, as the
            authors' ImageNet code does.
        batchnorm: With BatchNorm or dropout: take the penalty in eval mode (one more forward pass), or in train mode.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        2 forward and 2 backward passes per step, 3 and 2 with order 2.
    Source:
        Finlay and Oberman 2021, arXiv:1905.11468, algorithm 1 and equation 8.
    Departs:
        lambda / 2 as in equation 8 and the authors' code, where algorithm 1 prints lambda. Without l1_rescale the l1
        penalty is ||g||_1^2 / N, as published. Where the authors' code takes the penalty with BatchNorm's batch
        statistics, the default here takes the running ones, so that images do not mix.
    Raises:
        UsageError: an order other than 1 and 2, or penalty_space=normalised with a network whose normalisation is not a
            part of its own.
    """
    if order not in (1, 2):
        raise UsageError(f"order of fd-grad must be 1 or 2, got {order}", code="A04")
    dual = DUAL[norm] if grad_norm == "dual" else grad_norm
    apart = batchnorm == "frozen" and differs_in_training(model)

    def objective() -> Loss:
        with fp32_exact(), torch.enable_grad():
            z_clean = model(x) if apart else None
            with bn_mode(model, "eval" if apart else "train"), penalty_points(model, x, penalty_space) as points:
                z = model(points)
                at = per_sample_loss(z, y, loss)
                (g,) = torch.autograd.grad(at.sum(), points, retain_graph=True)
                d = unit_direction(g, dual)
                ahead = per_sample_loss(model(points.detach() + h * d), y, loss)
                if order == 2:
                    change = (ahead - per_sample_loss(model(points.detach() - h * d), y, loss)) / (2 * h)
                else:
                    change = (ahead - at) / h
            # A sample with a zero gradient has d = 0; in floating point the two losses are then the same number.
            if dual == "l1" and l1_rescale:
                change = change * x[0].numel() ** 0.5
            penalty = change.square().mean() / 2 if squared else change.abs().mean()
            clean = at if z_clean is None else per_sample_loss(z_clean, y, loss)
            total = clean.mean() + weight * penalty
        return Loss(total, {"train_accuracy": accuracy(z, y), "penalty": weight * penalty.detach()})

    yield objective
