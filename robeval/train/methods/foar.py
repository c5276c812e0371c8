"""First-order adversarial regularization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from robeval.core.ball import DUAL
from robeval.core.catalogue import trainer
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.gradients import penalty_norm
from robeval.train.modes import bn_mode, fp32_exact
from robeval.train.starts import radius_left, soar_start
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order Adversarial Regularization, arXiv:2004.01832",
    norms=("linf", "l2", "l1"),
    robust=True,
    batchnorm="warned",
    start="standard",
)
def foar(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    *,
    norm: Literal["linf", "l2", "l1"] = "linf",
    eps: float = 8 / 255,
    init: Literal["pgd1", "rand", "zero"] = "pgd1",
    split: bool = True,
    batchnorm: Literal["frozen", "train", "refuse"] = "frozen",
) -> Iterator[Objective]:
    """The worst case of the loss's first-order expansion around a start in the ball.

    To first order the loss rises within radius r by r times the dual norm of its gradient. That norm, times what the
    start has left of the radius, is added to the loss at the start and differentiated exactly.

    Args:
        norm: Norm of the threat model; the penalty takes the dual norm of the gradient.
        eps: Radius of the threat model in pixel units.
        init: Start x': one gradient step of eps / 2 from a random point of the half ball, a random point of it, or the
            image.
        split: With pgd1 and rand, expand within eps / 2, since the start has spent the other half; no expands within
            eps.
        batchnorm: With BatchNorm layers: use their running statistics, the batch's, or refuse.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        1 forward and 2 backward passes per step, one more of each with pgd1, with double backpropagation.
    Source:
        Ma et al. 2020, arXiv:2004.01832, the first-order regularizer (FOAR) that the paper compares SOAR with; pgd1 is
        the best of its starts.
    Departs:
        The paper gives no settings of its own for FOAR; start, split and the rest are those of SOAR. The start is
        clamped to the box. Dropout is off, as in SOAR.
    """
    start = soar_start(model, x, y, rng, init=init, norm=norm, eps=eps).detach().requires_grad_()
    radius = radius_left(init, eps, split)

    def objective() -> Loss:
        with fp32_exact(), bn_mode(model, "train" if batchnorm == "train" else "eval"), torch.enable_grad():
            z = model(start)
            loss = per_sample_loss(z, y, "ce")
            (g,) = torch.autograd.grad(loss.sum(), start, create_graph=True)
            penalty = radius * penalty_norm(g, DUAL[norm]).mean()
        return Loss(loss.mean() + penalty, {"train_accuracy": accuracy(z, y), "penalty": penalty.detach()})

    yield objective
