"""Activations, and which layers break second derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robeval.core.errors import unknown


def smooth_relu(x: Tensor) -> Tensor:
    """Twice differentiable ReLU: 0 below -1/2, t^3 - t^4/2 with t = x + 1/2 in between, x from 1/2 on.

    The first two derivatives are continuous (3t^2 - 2t^3 and 6t(1 - t)), convex, and at most 1 and 3/2.

    Shapes:
        any shape, same shape back.
    Source:
        Finlay and Oberman 2021, Scaleable input gradient regularization for adversarial robustness, Remark 2.2.
    Departs:
        The equal form max(t^3 - t^4/2, relu(x)) picks the wrong piece, and so the wrong second derivative, where both
        round to the same number; the pieces are therefore told apart by x. t is clamped, so float16 cannot overflow.
    """
    out: Tensor = _SmoothReLU.apply(x)
    return out


class _SmoothReLU(torch.autograd.Function):
    """The value, with its slope as the derivative: one pass over the data where autograd would take eight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        t = (x + 0.5).clamp(0, 1)
        return torch.where(x < 0.5, t * t * t * (1 - t / 2), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        slope: Tensor = _Slope.apply(x)
        return grad * slope

    jvp = backward  # the derivative of an elementwise function is the same both ways


class _Slope(torch.autograd.Function):
    """3t^2 - 2t^3, with 6t(1 - t) as its derivative; further derivatives are autograd's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        t = (x + 0.5).clamp(0, 1)
        return t * t * (3 - 2 * t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        t = (x + 0.5).clamp(0, 1)
        bend: Tensor = grad * (6 * t * (1 - t))
        return bend

    jvp = backward


class SmoothReLU(nn.Module):
    """`smooth_relu` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return smooth_relu(x)


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
