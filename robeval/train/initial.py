"""Starting weights that depend on a seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from robeval.core.errors import unknown

KINDS = ("he", "torch", "ibp")
#: Entries of the images that the data's mean and standard deviation are taken of.
ALL = 1 << 30
M = TypeVar("M", bound=nn.Module)


def seeded(build: Callable[[], M], seed: int, kind: str = "he") -> M:
    """Build a network with weights from a seed; the global generator is put back.

    Args:
        build: Makes the network.
        seed: Seed of the weights.
        kind: ``he`` draws convolutions and dense layers as He et al. 2015 (fan-in, gain of ReLU, zero biases), which
            lets deep networks with smooth activations start to learn; ``torch`` leaves what the architecture itself
            drew, as the published wide residual networks and resnext34 want it; ``ibp`` draws them so small that
            intervals do not grow from layer to layer, N(0, 2 pi / fan-in^2) (Shi et al. 2021, arXiv:2103.17268,
            section 3.2), zero biases.

    Raises:
        UsageError: unknown kind.
    """
    if kind not in KINDS:
        raise unknown("initial weights", kind, KINDS)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        module = build()
        if kind != "torch":
            for layer in module.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    if kind == "ibp":
                        nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
                    else:
                        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
    return module


def data_normalisation(x: torch.Tensor) -> dict[str, Any]:
    """Mean and standard deviation of each channel, rounded to four digits. Shapes: x (N, C, H, W)."""
    if x.numel() > ALL:  # streamed images: as many as fit, evenly spaced
        x = x[torch.linspace(0, len(x) - 1, max(1, ALL * len(x) // x.numel())).round().long()]
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3)).clamp_min(1e-3)
    return {"mean": [round(float(m), 4) for m in mean], "std": [round(float(s), 4) for s in std]}
