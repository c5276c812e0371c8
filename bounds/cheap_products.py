"""Hessian products of a network for less than autograd's, and equal to them. Machinery of the bounds, no bound itself.

A Hessian product is a backward pass through the graph of a gradient, and Lanczos takes dozens through the same graph.
Autograd does work there that nobody asked for: at a convolution it also makes the gradient of the weights, and at an
activation it takes slope and bend anew each time. Here a convolution is a constant linear map, which is its own
derivative and whose gradient is its adjoint; so are poolings and batch normalisations; and activations keep their slope
and bend. On the networks of benchmarks/lanczos.py a product costs 0.46 to 0.80 of autograd's, the graph 1.2 to 1.7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from robeval.core.smooth import smooth_relu

Map = Callable[[Tensor], Tensor]

#: Affine in the first argument; weight and bias follow.
CONVOLUTIONS = {
    torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
#: Linear in the first argument, whatever follows.
POOLINGS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool2d}
#: Entry by entry, twice differentiable everywhere.
CURVES = {F.softplus, F.gelu, F.silu, F.mish, F.logsigmoid, torch.tanh, torch.sigmoid, smooth_relu}


class CheapProducts(TorchFunctionMode):
    """Inside, a network builds the cheaper graph wherever it calls one of the functions above.

    Everything else stays with autograd: weights that might depend on the images, batch statistics in training mode,
    in-place calls, reduced precision. Third derivatives are right too, and cost what they always did.

    Shapes:
        Those of the functions it stands in for.
    Source:
        Pearlmutter 1994, Fast exact multiplication by the Hessian.
    Departs:
        The product is the derivative of the gradient's graph, which is kept, not a forward pass of its own.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (args and isinstance(args[0], Tensor) and args[0].requires_grad and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        x, rest = args[0], args[1:]
        if kwargs.get("inplace") or torch.is_autocast_enabled(x.device.type):
            return func(*args, **kwargs)

        def function(u: Tensor) -> Any:
            return func(u, *rest, **kwargs)

        if func in CURVES:
            return _Curve.apply(x, function)
        if func is F.avg_pool2d and not kwargs and (k := _tile(x, *rest)):
            return _Affine.apply(x, function, lambda u: _gathered(u, k), lambda g: _spread(g, k))
        if func in POOLINGS:
            return _Affine.apply(x, function, function)
        if func in CONVOLUTIONS and rest and not kwargs and _constant(*rest[:2]):
            return _Affine.apply(x, function, lambda u: func(u, rest[0], None, *rest[2:]))
        if func is F.batch_norm and (scaling := _scaling(*rest, **kwargs)):
            return _Affine.apply(x, function, scaling)
        return func(*args, **kwargs)


def _constant(*weights: Tensor | None) -> bool:
    """Whether these cannot depend on the images; a weight that is computed might."""
    return all(w is None or not w.requires_grad or isinstance(w, nn.Parameter) for w in weights)


def _scaling(
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Map | None:
    """The linear part of a batch normalisation; none where the statistics are the batch's own."""
    if training or mean is None or not _constant(mean, variance, weight, bias):
        return None
    still = torch.zeros_like(mean)
    return lambda u: F.batch_norm(u, still, variance, weight, None, False, momentum, eps)


class _Affine(torch.autograd.Function):
    """An affine function; its derivative is its linear part, whose adjoint autograd knows where none is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Map, linear: Map, adjoint: Map | None = None) -> Tensor:
        with torch.enable_grad():
            u = x.detach().requires_grad_()
            value = function(u)
        ctx.linear = linear
        ctx.adjoint = adjoint or partial(_along, get_gradient_edge(value), get_gradient_edge(u))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _Adjoint.apply(g, ctx.linear, ctx.adjoint), None, None, None


def _along(end: GradientEdge, start: GradientEdge, g: Tensor) -> Tensor:
    return torch.autograd.grad(end, start, g, retain_graph=True)[0]


class _Adjoint(torch.autograd.Function):
    """The adjoint of a linear map; its derivative's adjoint is the map, and so on."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, linear: Map, adjoint: Map) -> Tensor:
        ctx.linear, ctx.adjoint = linear, adjoint
        return adjoint(g)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        return _Adjoint.apply(v, ctx.adjoint, ctx.linear), None, None


def _tile(
    x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, ceil: bool = False, inner: bool = True, by: Any = None
) -> int:
    """Side of the squares that a pooling cuts the image into, 0 unless they lie edge to edge and cover it."""
    k = kernel if isinstance(kernel, int) else kernel[0]
    alike = all(side in (k, (k, k), [k, k]) for side in (kernel, stride or kernel))
    whole = padding in (0, (0, 0), [0, 0]) and x.shape[-2] % k == x.shape[-1] % k == 0
    return k if alike and whole and by is None else 0


def _gathered(u: Tensor, k: int) -> Tensor:
    """Mean over k x k squares, in an eighth to a third of the time that ``avg_pool2d`` takes on a CPU."""
    rows = reduce(torch.add, [u[..., i::k, :] for i in range(k)])
    return reduce(torch.add, [rows[..., j::k] for j in range(k)]) / k**2


def _spread(g: Tensor, k: int) -> Tensor:
    """The adjoint of :func:`_gathered`: every entry on a k x k square, in equal shares."""
    wide = torch.stack([g / k**2] * k, -1).flatten(-2)
    return torch.stack([wide] * k, -2).flatten(-3, -2)


class _Curve(torch.autograd.Function):
    """A function applied entry by entry, with its slope and bend taken once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Map) -> Tensor:
        with torch.enable_grad():
            u = x.detach().requires_grad_()
            value = function(u)
            slope, bend = _derivatives(value, u)
        ctx.save_for_backward(x)
        ctx.function, ctx.slope, ctx.bend = function, slope.detach(), bend.detach()
        return value.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if not torch.is_grad_enabled():
            return g * ctx.slope, None
        out: Tensor = _Slope.apply(g, ctx.saved_tensors[0], ctx.function, ctx.slope, ctx.bend)
        return out, None


class _Slope(torch.autograd.Function):
    """g times the slope at x; in g its derivative is the slope, in x g times the bend. Later ones are autograd's."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, function: Map, slope: Tensor, bend: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.function, ctx.slope, ctx.bent = function, slope, g * bend
        return g * slope

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return v * ctx.slope, v * ctx.bent, None, None, None
        g, x = ctx.saved_tensors
        slope, bend = _derivatives(ctx.function(x), x)
        return v * slope, v * g * bend, None, None, None


def _derivatives(value: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of a function applied entry by entry, with a graph."""
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return slope, bend
