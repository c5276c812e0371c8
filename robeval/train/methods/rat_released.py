"""Randomized adversarial training as the authors' repository computes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from robeval.core.catalogue import trainer
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.losses import kl, per_sample_loss
from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.noise import Shifted, gaussian, most_divergent
from robeval.train.step import Loss, Objective, accuracy

#: Weight of the pair of second-order targets, as a share of that of the first-order pair, by the authors' scripts.
SECOND = {"wrn": 0.5, "preactresnet18": 0.4}


def convolutions(model: nn.Module) -> set[str]:
    """Parameters whose name says "conv", as in the authors' code; those of convolutions where no name does."""
    return {name for name, _ in model.named_parameters() if "conv" in name} or {
        f"{prefix}.{name}"
        for prefix, layer in model.named_modules()
        if isinstance(layer, _ConvNd)
        for name, _ in layer.named_parameters(recurse=False)
    }


@contextmanager
def linear_layers(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of the linear layers, in the order in which they were asked inside."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append((inputs[0], output))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def row_sums(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the row sums of the gradient of the mean cross-entropy in the last linear layer's weight.

    With features h_i and probabilities p_i the row sum is mean_i (p_ik - [y_i = k]) sum_f h_if: no backward pass.

    Shapes:
        (n, C, H, W), (n,) -> (n, K) with its graph, (K,) without.
    Raises:
        ContractBroken: the logits are not the output of an ``nn.Linear``.
    """
    with linear_layers(model) as seen:
        z = model(x)
    features = [h for h, out in seen if out.shape == z.shape and torch.equal(out, z)]
    if not features:
        raise ContractBroken(
            "rat-released needs a network whose logits are the output of an nn.Linear layer",
            code="L02",
            do="another network, or the method rat, which takes any",
        )
    with torch.no_grad():
        wrong = z.softmax(1).scatter_add(1, y[:, None], -torch.ones_like(z[:, :1]))
        return z, (wrong * features[-1].sum(1, keepdim=True)).mean(0)


def soft_labels(t: Tensor, cc: float) -> Tensor:
    """Row j is the target of class j: 1 - cc on j, and cc over the others in proportion to t above its minimum.

    Where the others have nothing to share by, they share alike. Shapes: (K,) -> (K, K).
    """
    others = 1 - torch.eye(len(t), dtype=t.dtype, device=t.device)
    mass = (t - t.min()) * others
    total = mass.sum(1, keepdim=True)
    share = torch.where(total > 0, mass / torch.where(total > 0, total, 1), others / others.sum(1, keepdim=True))
    return cc * share + (1 - cc) * (1 - others)


def towards(label: Tensor, z: Tensor) -> Tensor:
    """Mean of KL(label || softmax z) for constant labels. Shapes: (n, K), (n, K) -> scalar."""
    return (torch.xlogy(label, label) - label * z.log_softmax(1)).sum(1).mean()


@trainer(
    source="Jin, Yi, Wu, Mu, Huang 2023, Randomized Adversarial Training via Taylor Expansion, arXiv:2303.10653, the"
    " authors' code",
    norms=("linf", "l2"),
    robust=True,
)
def rat_released(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    beta: float = 6.0,
    alpha: float = 0.2,
    cc: float | None = None,
    sigma: float = 0.0001,
    script: Literal["wrn", "preactresnet18"] = "wrn",
    fix_bug: bool = False,
) -> Iterator[Objective]:
    """TRADES with soft labels whose mass on wrong classes follows the last layer's gradient, clean and attacked.

    For each class the gradient of the mean loss in its row of the last linear layer is summed, once on the clean batch
    and once on the attacked one; how absolute values and squares differ gives four targets of each class. No
    derivative in weight space and no noise enters the loss, so compare it with label smoothing too.

    Args:
        norm: Norm of the threat model.
        eps: Radius of the threat model in pixel units.
        steps: Gradient steps of the attack.
        step_size: Length of a step in pixel units; none means 2/255 at eps 8/255 and 10 steps, in proportion to both,
            and 2 eps / steps in l2.
        beta: Weight of TRADES's divergence.
        alpha: Share of the loss on clean images that soft labels take over.
        cc: Mass of a soft label off the true class; none means 1 - 2 / K for K classes, the authors' 0.8 for 10 and
            0.98 for 100.
        sigma: Standard deviation of the noise on the convolutions of the attacked network; the authors' scripts with
            AWP have none.
        script: Which of the authors' scripts gives the weight of the second-order pair: alpha / 4 (wrn) or alpha / 5.
        fix_bug: Let the first second-order target be that of clean minus attacked squares, as the first-order one is.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        ``steps`` + 3 forward and ``steps`` + 1 backward passes per step.
    Source:
        The authors' code for Jin et al. 2023, arXiv:2303.10653.
    Departs:
        The row sums are computed from the last layer's inputs, which gives the same numbers without a backward pass,
        and each image passes once where a script of theirs passes it up to four times (moving BatchNorm's statistics
        as often). Where a target has nothing to share its mass by, theirs is NaN and this one uniform. A network
        without "conv" in its parameters' names gets the noise on all convolutions. With the loop's awp the weights are
        perturbed by the gradient of this loss, theirs by TRADES's.
    Raises:
        ContractBroken: the network's logits are not the output of an ``nn.Linear`` (L02).
        UsageError: alpha or cc outside [0, 1], or a negative sigma.
    """
    for name, value in (("alpha", alpha), ("cc", 0.0 if cc is None else cc)):
        if not 0 <= value <= 1:
            raise UsageError(f"{name} of rat-released must lie in [0, 1], got {value}", code="A04")
    if not sigma >= 0:
        raise UsageError(f"sigma of rat-released must be a number >= 0, got {sigma}", code="A04")
    u = gaussian(model, sigma, memory.generator(x.device), convolutions(model).__contains__)
    step_size = step_size or (2.5 if norm == "linf" else 2) * eps / steps
    x_adv = most_divergent(Shifted(model, u), x, y, rng, norm=norm, eps=eps, steps=steps, step_size=step_size)

    def objective() -> Loss:
        (z, a), (z_adv, b) = row_sums(model, x, y), row_sums(model, x_adv, y)
        mass = 1 - 2 / z.shape[1] if cc is None else cc
        first, second = a.abs() - b.abs(), a.square() - b.square()

        def pair(t_adv: Tensor, t: Tensor) -> Tensor:
            return towards(soft_labels(t_adv, mass)[y], z_adv) + towards(soft_labels(t, mass)[y], z)

        soft = pair(first, -first) + SECOND[script] * pair(second if fix_bug else -second, -second)
        penalty = alpha / 2 * soft + beta * kl(z, z_adv).mean()
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(z_adv, y), "penalty": penalty.detach()}
        return Loss((1 - alpha) * per_sample_loss(z, y, "ce").mean() + penalty, logs)

    yield objective
