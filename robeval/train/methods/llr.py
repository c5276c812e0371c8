"""Local linearity regularization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robeval.attacks.pgd import pgd
from robeval.core.ball import Ball
from robeval.core.catalogue import trainer
from robeval.core.classifier import fixed_parameters
from robeval.core.goal import Goal, Untargeted
from robeval.core.losses import per_sample_loss
from robeval.core.questions import Attack, Gradient
from robeval.core.streams import Streams
from robeval.engine.drive import drive
from robeval.train.gradients import inner, reusing
from robeval.train.memory import Memory
from robeval.train.modes import bn_mode, differs_in_training, fp32_exact
from robeval.train.step import Loss, Objective, accuracy

#: Mean and variance that each layer normalises with.
Statistics = dict[_BatchNorm, tuple[Tensor, Tensor]]


@dataclass
class Tangent:
    """What is known at the clean images, with its graph.

    Args:
        z: (n, K) logits of the loss that is descended.
        at: (n,) loss that the expansion starts from.
        g: (n, C, H, W) its gradient.
        statistics: Those of the clean batch, where perturbed points are to use them.
    """

    z: Tensor
    at: Tensor
    g: Tensor
    statistics: Statistics


@contextmanager
def clean_statistics(model: nn.Module) -> Iterator[Statistics]:
    """BatchNorm uses, updates and notes the batch's statistics inside; the rest of the network is in eval mode."""
    layers, noted = [m for m in model.modules() if isinstance(m, _BatchNorm)], Statistics()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        t = inputs[0].detach()
        variance, mean = torch.var_mean(t, dim=[d for d in range(t.dim()) if d != 1], correction=0)
        noted[cast(_BatchNorm, layer)] = (mean, variance)

    handles = [m.register_forward_pre_hook(note) for m in layers]
    try:
        with bn_mode(model, "eval"):
            for m in layers:
                m.train()
            yield noted
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def normalising_with(model: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Eval mode, with these statistics in place of the running ones."""
    was = [(m, m.running_mean, m.running_var) for m in statistics]
    for m, (mean, variance) in statistics.items():
        m.running_mean, m.running_var = mean, variance
    try:
        with bn_mode(model, "eval"):
            yield
    finally:
        for m, running_mean, running_var in was:
            m.running_mean, m.running_var = running_mean, running_var


def value(goal: Goal, z: Tensor) -> Tensor:
    """The only column of what the model answered. (n, 1) -> (n,)."""
    return z[:, 0]


def adam_ascent(x0: Tensor, ball: Ball, rng: Streams, *, steps: int, rate: float) -> Attack:
    """Projected ascent on :func:`value` from a random point, with the steps of Adam."""
    x, first, second = ball.sample(x0, rng), torch.zeros_like(x0), torch.zeros_like(x0)
    for step in range(1, steps + 1):
        at = yield Gradient(x, value)
        first, second = 0.9 * first + 0.1 * at.grad, 0.999 * second + 0.001 * at.grad.square()
        length = (second / (1 - 0.999**step)).sqrt() + 1e-9
        x = ball.project(x0, x + rate * first / (1 - 0.9**step) / length)
    return x


@trainer(
    source="Qin, Martens, Gowal, Krishnan, Dvijotham, Fawzi, De, Stanforth, Kohli 2019, Adversarial Robustness through"
    " Local Linearization, arXiv:1907.02610, section 4",
    norms=("linf", "l2"),
    robust=True,
    presets={
        "llr-paper": {"clean": 1.0, "linearity": 4.0, "slope": 3.0, "steps": 2, "ascent": "sign"},
        "llr-official": {
            "clean": 2.0,
            "linearity": 4.0,
            "slope": 1.2,
            "steps": 10,
            "ascent": "adam",
            "ramp": 500,
            "batchnorm": "clean",
        },
    },
)
def llr(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 8 / 255,
    clean: float = 1.0,
    linearity: float = 4.0,
    slope: float = 3.0,
    steps: int = 2,
    ascent: Literal["sign", "adam"] = "sign",
    step_size: float | None = None,
    ramp: int = 0,
    batchnorm: Literal["frozen", "clean"] = "frozen",
) -> Iterator[Objective]:
    """The loss, how far it strays from its tangent in the ball, and how steep the tangent is there.

    An attack looks for the point of the ball where the loss differs most from its first-order expansion, with the
    expansion held fixed. The difference at that point and the expansion's own change are descended with the loss, and
    the gradient in both is differentiated again.

    Args:
        norm: Norm of the threat model.
        eps: Radius of the threat model in pixel units.
        clean: Weight a of the loss.
        linearity: Weight lambda of the difference from the tangent.
        slope: Weight mu of the tangent's change, |<delta, gradient>|.
        steps: Steps of the attack, from a random point of the ball.
        ascent: Steps along the steepest direction of the norm, or of Adam.
        step_size: Length of a step in pixel units, or Adam's rate; none means eps / 2, and 0.1 with Adam.
        ramp: Mini-batches over which eps grows from 0 to its full size.
        batchnorm: With BatchNorm or dropout: take the penalty in eval mode (one more forward pass), or with the
            statistics of the clean batch, also at the perturbed points, and without dropout.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        ``steps`` + 2 forward and backward passes per step, with double backpropagation.
    Source:
        Qin et al. 2019, arXiv:1907.02610, section 4.
    Departs:
        Weights and steps of paper and authors' code differ; the presets llr-paper (the defaults) and llr-official hold
        both. With batchnorm=clean the statistics are constants at the perturbed points, where the authors' code
        differentiates through them, and one clean pass serves loss and penalty, where it makes two. The default takes
        the running statistics, so that images do not mix. The paper's threat model is linf; l2 steps follow the
        house's ball. A published port to PyTorch trains on the cross-entropy alone, since it zeroes its gradient
        before using it; this file has nothing of it.
    """
    ball = Ball(norm, eps * min(1.0, memory.step / ramp) if ramp > 0 else eps)
    apart = batchnorm == "frozen" and differs_in_training(model)

    def at_clean() -> Tangent:
        with fp32_exact(), torch.enable_grad():
            z_clean = model(x) if apart else None
            with clean_statistics(model) if batchnorm == "clean" else bn_mode(model, "eval") as statistics:
                points = x.detach().requires_grad_()
                z = model(points)
                at = per_sample_loss(z, y, "ce")
                (g,) = torch.autograd.grad(at.sum(), points, create_graph=True)
            return Tangent(z if z_clean is None else z_clean, at, g, statistics or {})

    def strays(points: Tensor, tangent: Tangent) -> Tensor:
        """|loss(points) - loss(x) - <points - x, gradient>|, gamma in the paper. -> (n,)."""
        with fp32_exact(), torch.enable_grad(), normalising_with(model, tangent.statistics):
            return (per_sample_loss(model(points), y, "ce") - tangent.at - inner(points - x, tangent.g)).abs()

    now = at_clean()
    fixed, goal = Tangent(now.z.detach(), now.at.detach(), now.g.detach(), now.statistics), Untargeted(y)
    if ascent == "adam":
        attack = adam_ascent(x, ball, rng, steps=steps, rate=step_size or 0.1)
    else:
        attack = pgd(x, goal, ball, rng, steps=steps, step_size=step_size or ball.eps / 2, loss=cast(Any, value))
    with fp32_exact(), fixed_parameters(model):
        found = drive(attack, lambda points: strays(points, fixed)[:, None], goal)
    tangent_at = reusing(now, at_clean, model)  # the attack's clean pass serves the first evaluation as well

    def objective() -> Loss:
        tangent = tangent_at()
        gamma = strays(found, tangent)
        rise = inner(found - x, tangent.g).abs()
        penalty = (linearity * gamma + slope * rise).mean()
        total = clean * per_sample_loss(tangent.z, y, "ce").mean() + penalty
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(tangent.z, y), "penalty": penalty.detach()}
        logs["gamma"] = gamma.detach().mean()
        return Loss(total, logs)

    yield objective
