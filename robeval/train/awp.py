"""Adversarial weight perturbation: the step is taken with the gradient at weights that a small step made worse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robeval.train.step import Objective, fill_gradients


@contextmanager
def perturbed_weights(module: nn.Module, objective: Objective, gamma: float, where: str = "") -> Iterator[Objective]:
    """The objective, to be descended inside at weights w + v; v is taken away again at the end.

    v is one normalised ascent step from w: v_l = gamma ||w_l|| g_l / ||g_l|| for each weight l with at least two
    dimensions (so biases and BatchNorm stay), where g is the gradient at w of all that the optimiser would descend.
    The evaluation at w leaves buffers and ``.grad`` as they were; the one inside moves BatchNorm's statistics.

    Args:
        module: The network.
        objective: What is descended; points that were crafted at w are constants in it.
        gamma: Length of v relative to each weight tensor.
        where: Place in the training for the message of a loss that is NaN.

    Cost:
        One forward pass and one backward pass of the objective.
    Source:
        Wu, Xia, Wang 2020, Adversarial Weight Perturbation Helps Robust Generalization, arXiv:2004.05884, equations
        8 and 10, algorithm 1.
    Raises:
        ContractBroken: the loss is NaN or infinite at w.
    """
    steps = ascent(module, objective, gamma, where)
    with torch.no_grad():
        for p, v in steps:
            p.add_(v)
    try:
        yield objective
    finally:
        with torch.no_grad():
            for p, v in steps:
                p.sub_(v)


def ascent(module: nn.Module, objective: Objective, gamma: float, where: str = "") -> list[tuple[nn.Parameter, Tensor]]:
    """Each perturbed parameter with its v; see :func:`perturbed_weights`."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    filled = [p.grad for p in parameters]
    buffers = [(b, b.clone()) for b in module.buffers()]
    steps = []
    try:
        fill_gradients(parameters, objective, where)
        for name, p in module.named_parameters():
            if p.dim() >= 2 and "weight" in name and p.grad is not None:
                steps.append((p, p.grad * (gamma * p.detach().norm() / (p.grad.norm() + 1e-20))))
    finally:
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(was)
        for p, grad in zip(parameters, filled, strict=True):
            p.grad = grad
    return steps
