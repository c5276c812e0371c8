"""Gradient-norm regularization by double backpropagation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from robeval.core.catalogue import trainer
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.gradients import penalty_norm
from robeval.train.memory import Memory
from robeval.train.modes import bn_mode, differs_in_training, fp32_exact
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Ross, Doshi-Velez 2018, Improving the Adversarial Robustness and Interpretability of Deep Neural Networks"
    " by Regularizing Their Input Gradients, arXiv:1711.09404, section 3",
    norms=("linf", "l2", "l1"),
    robust=True,
    aliases=("double-backprop", "ross-doshi"),
)
def gn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    weight: float = 0.05,
    grad_norm: Literal["l2", "l1", "linf"] = "l2",
    power: float = 2.0,
    gn_scale: Literal["1", "c"] = "1",
    batchnorm: Literal["frozen", "train"] = "frozen",
) -> Iterator[Objective]:
    """The loss plus the squared length of its input gradient, differentiated exactly.

    The gradient with respect to the image keeps its graph, so the parameters are trained through it; nothing is
    approximated. It is structured gradient regularization with the identity as covariance.

    Args:
        weight: Strength lambda of lambda / power times the norm to the power: lambda / 2 ||g||^2, or lambda ||g||.
        grad_norm: Norm of the gradient; the dual of a threat model's norm (l1 for linf) bounds the loss to first order.
        power: Power of the norm, at least 1.
        gn_scale: Multiply the penalty by 1, or by c, the variance of a pixel over the training images averaged over
            pixels, as structured gradient regularization scales its covariances.
        batchnorm: With BatchNorm or dropout: take the penalty in eval mode (one more forward pass), or in train mode.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        1 forward and 2 backward passes per step, with double backpropagation.
    Source:
        Ross and Doshi-Velez 2018, arXiv:1711.09404, section 3; the default strength is that of Roth et al. 2018,
        arXiv:1805.08736, table 4 (0.075 in table 3, 0.1 beside long-range noise, 5 on MNIST).
    Departs:
        Mean over the batch and factor 1 / power, the 1/2 of Roth et al. Whether they multiplied this penalty by c as
        they did their own is not said, so it is a setting. BatchNorm uses its running statistics in the penalty, so
        that images do not mix.
    Raises:
        UsageError: a power below 1, or gn_scale=c where there are no training images to take it from.
    """
    if power < 1:
        raise UsageError(f"power of gn must be at least 1, got {power}", code="A04")
    strength = weight / power * (1.0 if gn_scale == "1" else pixel_variance(memory))
    apart = batchnorm == "frozen" and differs_in_training(model)

    def objective() -> Loss:
        with fp32_exact(), torch.enable_grad():
            z_clean = model(x) if apart else None
            with bn_mode(model, "eval" if apart else "train"):
                points = x.detach().requires_grad_()
                z = model(points)
                at = per_sample_loss(z, y, "ce")
                (g,) = torch.autograd.grad(at.sum(), points, create_graph=True)
            penalty = strength * penalty_norm(g, grad_norm).pow(power).mean()
            clean = at if z_clean is None else per_sample_loss(z_clean, y, "ce")
        return Loss(clean.mean() + penalty, {"train_accuracy": accuracy(z, y), "penalty": penalty.detach()})

    yield objective


def pixel_variance(memory: Memory) -> float:
    """Variance of a pixel over the training images, averaged over pixels; computed once and remembered."""
    if "c" not in memory.tensors:
        if memory.train is None:
            raise UsageError("gn_scale=c of gn needs the training images, which only the training loop has", code="A04")
        memory.tensors["c"] = memory.train.x.var(0, correction=0).mean()
    return float(memory.tensors["c"])
