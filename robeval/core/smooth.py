"""The twice differentiable ReLU, with hand-made first and second derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary


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
    if has_torch_function_unary(x):  # someone replaces torch's functions, and this is to be one of them
        return handle_torch_function(smooth_relu, (x,), x)
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
