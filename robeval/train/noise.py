"""Networks at noisy weights, and what TRADES's attack finds on a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from robeval.core.ball import Ball
from robeval.core.streams import Streams
from robeval.train.craft import NearBall, crafted

#: Noise by the name of the parameter that it is for.
Noise = Mapping[str, Tensor]


def gaussian(
    model: nn.Module, sigma: float, generator: torch.Generator, chosen: Callable[[str], bool] = lambda name: True
) -> Noise:
    """Noise of standard deviation sigma for the trained parameters whose name is chosen."""
    return {
        name: sigma * torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        for name, p in model.named_parameters()
        if p.requires_grad and chosen(name)
    }


class Shifted(nn.Module):
    """The network at the weights w + scale u; w stays as it is, and is what gradients are taken for.

    Args:
        model: The network, whose modes, buffers and hooks take part.
        u: Shift of each parameter; those without one stay.
        scale: Multiplier of the shift.
    """

    def __init__(self, model: nn.Module, u: Noise, scale: float = 1.0):
        super().__init__()
        self.model, self.u, self.scale = model, u, scale

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(self.model.named_parameters())
        z: Tensor = functional_call(self.model, {n: weights[n] + self.scale * u for n, u in self.u.items()}, (x,))
        return z


def most_divergent(
    model: nn.Module, x: Tensor, y: Tensor, rng: Streams, *, norm: str, eps: float, steps: int, step_size: float
) -> Tensor:
    """The point in the ball where the attack of TRADES ends, which ascends KL(p(x) || p(x')). -> (n, C, H, W)."""
    ball = Ball(norm, eps)
    around = NearBall(ball, ball.ascent(rng.normal(*x.shape[1:])) if norm == "l2" else None)
    return crafted(model, x, y, rng, around, steps=steps, step_size=step_size, loss="kl")


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout is off inside: differences of passes must see the same network."""
    layers = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


@contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm's buffers stay as they are inside; every layer keeps its mode."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
