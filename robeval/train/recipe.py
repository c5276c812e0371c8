"""How a network is trained, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from robeval.core.ball import Ball
from robeval.core.errors import UsageError, unknown
from robeval.train import augment
from robeval.train.schedules import schedule

OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Recipe:
    """Settings of the training loop.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        optimizer: ``sgd`` (plain momentum) or ``adam``.
        lr: Largest learning rate.
        momentum: Momentum of SGD.
        weight_decay: Coupled L2: adds this times the weights to the gradient, for both optimisers.
        schedule: ``constant``, ``cosine``, ``cyclic`` or ``milestones:60/120`` (see :mod:`robeval.train.schedules`).
        augment: ``none``, ``crop-flip``, ``crop-flip:pad=reflect``, ... (see :func:`robeval.train.augment.read`).
        select: ``best`` keeps the epoch that is best on the held-out images, ``last`` the last one.
        select_on: ``robust`` (PGD-20 accuracy), ``clean``, or ``auto``: robust for methods that claim robustness.
        norm: Norm of the threat model of the log, of the selection and of the guard.
        eps: Its radius in pixel units.
        seed: Seed of the order of images, of augmentation, of every random draw of the method.
        clip_gradient: Largest Euclidean norm of the whole parameter gradient of a step; 0 for no limit.
        awp: Radius gamma of adversarial weight perturbation, relative to each weight tensor's norm; 0 for none. Any
            method can be trained with it (see :mod:`robeval.train.awp`).
        awp_warmup: Epochs without it at the beginning.
        average: ``none``, ``swa`` (mean over epochs) or ``ema`` (exponential mean over steps) of the weights.
        average_start: Share of the epochs after which ``swa`` begins.
        average_decay: Weight of the past in ``ema``.
        select_from: ``held-out`` training images for log and selection, or ``test``, as papers did: the model file
            then says that its numbers are optimistic.
        channels_last: Train with the weights of convolutions in channels-last layout; only rounding differs.
        compile: Train with the network compiled by torch.compile, which no method can that differentiates twice.

    Raises:
        UsageError: a value that makes no sense.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    augment: str = "none"
    select: str = "best"
    select_on: str = "auto"
    norm: str = "linf"
    eps: float = 8 / 255
    seed: int = 0
    clip_gradient: float = 0.0
    awp: float = 0.0
    awp_warmup: int = 0
    average: str = "none"
    average_start: float = 0.5
    average_decay: float = 0.999
    select_from: str = "held-out"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}", code="A04")
        for name in ("momentum", "weight_decay", "clip_gradient", "awp", "awp_warmup"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be a number >= 0, got {getattr(self, name)}", code="A04")
        for name in ("average_start", "average_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must lie in [0, 1), got {getattr(self, name)}", code="A04")
        if not self.lr > 0:
            raise UsageError(f"lr must be a number > 0, got {self.lr}", code="A04")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("select", ("best", "last")),
            ("select_on", ("auto", "robust", "clean")),
            ("average", ("none", "swa", "ema")),
            ("select_from", ("held-out", "test")),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        augment.read(self.augment)
        schedule(self.schedule, 1, 1)
        Ball(self.norm, self.eps)


def make_optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over all parameters that ask for gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
