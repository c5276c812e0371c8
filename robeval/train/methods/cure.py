"""Curvature regularization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from robeval.core.catalogue import trainer
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.numbers import number
from robeval.core.streams import Streams
from robeval.train.gradients import input_grad, penalty_points, safe_l2, unit_direction
from robeval.train.memory import Memory
from robeval.train.modes import bn_mode, differs_in_training, fp32_exact
from robeval.train.step import Loss, Objective, accuracy


def at_epoch(text: str, epoch: int) -> float:
    """The entry of ``0.1/0.4/0.8`` for an epoch counted from 0; the last entry stays.

    Raises:
        UsageError: an entry that is not a number above 0.
    """
    values = [number(part, name="h of cure", code="A04") for part in str(text).split("/")]
    if not all(v > 0 for v in values):
        raise UsageError(f"h of cure must be numbers above 0, one per epoch, got {text}", code="A04")
    return values[min(epoch, len(values) - 1)]


@trainer(
    source="Moosavi-Dezfooli, Fawzi, Uesato, Frossard 2019, Robustness via curvature regularization, and vice versa,"
    " arXiv:1811.09716, section 4",
    norms=("linf", "l2"),
    robust=True,
    start="standard",
    reproduction="contested",
    presets={
        "cure-paper": {"gamma": 4.0, "square": True, "h": "0.3/0.6/0.9/1.2/1.5"},
        "cure-code": {"gamma": 4.0, "square": False, "h": "0.1/0.4/0.8/1.8/3", "penalty_space": "normalised"},
    },
)
def cure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    norm: Literal["linf", "l2"] = "linf",
    gamma: float = 4.0,
    h: str = "0.3/0.6/0.9/1.2/1.5",
    square: bool = True,
    penalty_space: Literal["pixel", "normalised"] = "pixel",
    batchnorm: Literal["frozen", "train"] = "frozen",
) -> Iterator[Objective]:
    """The loss plus the change of its input gradient over a step along the gradient's sign.

    That change is the step times the curvature in the direction where curvature is known to be large. Both gradients
    are differentiated again, so a smaller change is learnt; the direction is a constant.

    Args:
        norm: Norm of the threat model; the step goes along the sign of the gradient in linf, along it in l2.
        gamma: Strength of the penalty.
        h: Length of the step, Euclidean, one number per epoch with / between them; the last one stays.
        square: Penalise the square of the change's length, as the paper prints it, or the length, as its code does.
        penalty_space: Take step and gradients in pixels, or behind the network's normalisation, as the code does.
        batchnorm: With BatchNorm or dropout: take the penalty in eval mode (one more forward pass), or in train mode.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        2 forward and 3 backward passes per step, with double backpropagation.
    Source:
        Moosavi-Dezfooli et al. 2019, arXiv:1811.09716, section 4.
    Departs:
        reproduction: contested. Ma et al. 2020, appendix E.1, could not obtain the published numbers. Paper and code
        differ in the square, in h and in the space; the presets cure-paper and cure-code hold both. The steps in
        which the paper's h rises to 1.5 within 5 epochs are ours. The gradient is that of each image's own loss, where
        the code multiplies one scalar by a vector of ones. The step keeps no guard of 1e-7: a zero gradient gives a
        zero step. The point x + h v is not clamped to the box, as in the paper.
    Raises:
        UsageError: an h that is not positive, or penalty_space=normalised with a network whose normalisation is not a
            part of its own.
    """
    length = at_epoch(h, memory.epoch)
    apart = batchnorm == "frozen" and differs_in_training(model)

    def objective() -> Loss:
        with fp32_exact(), torch.enable_grad():
            z_clean = model(x) if apart else None
            with bn_mode(model, "eval" if apart else "train"), penalty_points(model, x, penalty_space) as points:
                z = model(points)
                at = per_sample_loss(z, y, "ce")
                (g,) = torch.autograd.grad(at.sum(), points, create_graph=True)
                v = unit_direction(g.sign() if norm == "linf" else g, "l2")
                _, ahead = input_grad(model, points.detach() + length * v, y, create_graph=True)
            change = safe_l2(ahead - g)
            penalty = gamma * (change.square() if square else change).mean()
            clean = at if z_clean is None else per_sample_loss(z_clean, y, "ce")
        return Loss(clean.mean() + penalty, {"train_accuracy": accuracy(z, y), "penalty": penalty.detach()})

    yield objective
