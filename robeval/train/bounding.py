"""Bounds of the network that is being trained, and how their radius and their weight in the loss grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robeval.bounds.graph import Graph, live_graph
from robeval.bounds.proof import against
from robeval.bounds.region import Region
from robeval.bounds.steps import Statistics
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.train.memory import Memory
from robeval.train.passes import also_passed
from robeval.train.step import Loss, accuracy

#: Lower bounds of f_y - f_j over the regions: (n, K), and the forward passes that they cost.
Lower = Callable[[Graph, Region, Tensor], tuple[Tensor, int]]


def ramped(memory: Memory, warmup: float, ramp: float, **shares: float) -> float:
    """How far the ramp has come, in [0, 1]: 0 during the warm-up, then linear.

    Args:
        memory: Where the training stands.
        warmup: Share of the training before the ramp.
        ramp: Share of the training that it takes.
        shares: Other settings that must lie in [0, 1].

    Raises:
        UsageError: a share outside [0, 1], or a ramp that does not end with the training.
    """
    if not all(0 <= share <= 1 for share in (warmup, ramp, warmup + ramp, *shares.values())):
        told = ", ".join(f"{k}={v}" for k, v in {"warmup": warmup, "ramp": ramp, **shares}.items())
        raise UsageError(f"warmup + ramp and every other share must lie in [0, 1], got {told}", code="A04")
    past = memory.step / (memory.batches * memory.epochs) - warmup
    return float(past >= 0) if ramp == 0 else min(1.0, max(0.0, past / ramp))


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[dict[nn.Module, Statistics]]:
    """Mean and variance of what enters each BatchNorm layer in train mode, from the pass that is made inside."""
    found: dict[nn.Module, Statistics] = {}

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        axes = [0, *range(2, inputs[0].dim())]
        found[layer] = inputs[0].mean(axes), inputs[0].var(axes, unbiased=False)

    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    handles = [m.register_forward_pre_hook(look) for m in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def mixed(model: nn.Module, x: Tensor, y: Tensor, radius: float, kappa: float, lower: Lower) -> Loss:
    """kappa CE(f(x), y) + (1 - kappa) CE(worst logits, y), means over the batch; bounds only where they count.

    The worst logits are taken against each rival on its own: minus the bound of its margin, and 0 for the class itself.
    BatchNorm layers in train mode treat the bounds with the statistics of the clean images.

    Args:
        model: The network.
        x: (n, C, H, W) in [0, 1].
        y: (n,) labels.
        radius: Radius of the bounds in linf, in pixel units.
        kappa: Weight of the clean loss.
        lower: The bounds.
    """
    with batch_statistics(model) as statistics:
        z = model(x)
    total = per_sample_loss(z, y, "ce").mean()
    right = accuracy(z, y)
    logs: dict[str, Tensor | float] = {"train_accuracy": right, "bounded_accuracy": right, "bound_radius": radius}
    if kappa < 1:
        graph = live_graph(model, tuple(x.shape[1:]), statistics)
        worst, passes = lower(graph, Region(x, "linf", x.new_full((len(x),), radius)), y)
        also_passed(passes * len(x))
        total = kappa * total + (1 - kappa) * per_sample_loss(-worst, y, "ce").mean()
        logs["bounded_accuracy"] = (against(worst.detach(), y) > 0).all(1).to(z).mean()
    return Loss(total, logs)
