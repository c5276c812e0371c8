"""Activations, and which layers break second derivatives."""

from __future__ import annotations

from typing import Any

from torch import nn

from robeval.core.errors import unknown
from robeval.core.smooth import SmoothReLU

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "smooth": SmoothReLU, "softplus": nn.Softplus}

# Layers whose second derivative does not exist somewhere on the line; ELU and its kin have a jump in it at 0.
NONSMOOTH = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink,
    nn.Softshrink, nn.Threshold, nn.ELU, nn.CELU, nn.SELU, nn.Softsign,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
)  # fmt: skip


def activation(name: str) -> nn.Module:
    """A fresh layer: ``relu``, ``smooth`` or ``softplus``.

    Raises:
        UsageError: another name.
    """
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def pooling(name: str, act: str, size: int = 2, **options: Any) -> nn.Module:
    """A fresh pooling layer: ``max``, ``avg``, or ``auto``: max beside ReLU, avg beside smooth activations.

    Args:
        name: Which of the three.
        act: Name of the activation beside it.
        size: Height and width of a window in pixels.
        options: ``stride``, ``padding``, ``ceil_mode`` as torch means them; an average leaves padding out.

    Raises:
        UsageError: another name.
    """
    if name not in ("auto", "max", "avg"):
        raise unknown("pooling", name, ("auto", "max", "avg"))
    if name == "auto":
        name = "max" if act == "relu" else "avg"
    return nn.MaxPool2d(size, **options) if name == "max" else nn.AvgPool2d(size, count_include_pad=False, **options)


def nonsmooth_layers(module: nn.Module) -> list[str]:
    """Layers that are not twice differentiable, as ``path (Class)``; empty for a smooth network.

    Only layers can be seen: a ReLU called as a function inside ``forward`` is not found.
    """
    found = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, NONSMOOTH)]
    return [f"{path or 'the module itself'} ({type(layer).__name__})" for path, layer in found]
