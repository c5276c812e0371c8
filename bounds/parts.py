"""Operators from the arguments of torch's layers and functions. Machinery of the proofs, no bound itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robeval.bounds.convex import Convex, relu, smooth, softplus
from robeval.bounds.operators import Average, Convolution, Dense, Input, Maximum, Operator, Reshape, Scale, Sum


class Refused(Exception):
    """A step that proofs do not know."""

    def __init__(self, what: str, why: str = ""):
        super().__init__(what)
        self.why = why


class Ref(int):
    """Number of a node, as a value of the trace."""


class Batch:
    """The number of images, wherever a trace mentions it."""


def pair(value: Any) -> tuple[int, int]:
    """2 -> (2, 2)."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


class Parts:
    """Collects ``(operator, inputs, shape, path)``; each method takes a node and the arguments of torch's function.

    Args:
        module: The network, for its device and precision.
    """

    def __init__(self, module: nn.Module):
        self.like = next(module.parameters(), torch.empty(0, dtype=torch.float64))
        self.nodes: list[tuple[Operator, tuple[int, ...], tuple[int, ...], str]] = []
        self.path = ""

    def add(self, op: Operator, inputs: tuple[int, ...], shape: tuple[int, ...] | None = None) -> Ref:
        """A new node; its shape is found by evaluation where none is given."""
        if shape is None:
            assert not isinstance(op, Input | Sum | Convex)
            with torch.no_grad():
                shape = tuple(op.forward(self.blank(inputs[0])).shape[1:])
        self.nodes.append((op, inputs, tuple(shape), self.path))
        return Ref(len(self.nodes) - 1)

    def blank(self, ref: int) -> Tensor:
        """Two rows of zeros of a node's shape."""
        return torch.zeros(2, *self.nodes[ref][2], dtype=self.like.dtype, device=self.like.device)

    def curve(self, op: Convex, ref: Ref) -> Ref:
        return self.add(op, (ref,), self.nodes[ref][2])

    def smooth(self, ref: Ref) -> Ref:
        return self.curve(smooth(), ref)

    def relu(self, ref: Ref, inplace: bool = False) -> Ref:
        return self.curve(relu(), ref)

    def leaky_relu(self, ref: Ref, negative_slope: float = 0.01, inplace: bool = False) -> Ref:
        if not 0 <= negative_slope <= 1:
            raise Refused(f"LeakyReLU at {self.path} with slope {negative_slope}", "it is not convex and rising")
        return self.curve(relu(negative_slope), ref)

    def softplus(self, ref: Ref, beta: float = 1.0, threshold: float = 20.0) -> Ref:
        return self.curve(softplus(float(beta), float(threshold)), ref)

    def dense(self, ref: Ref, weight: Tensor, bias: Tensor | None = None) -> Ref:
        return self.add(Dense(weight, bias, weight.shape[1]), (ref,))

    def conv2d(
        self, ref: Ref, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Ref:  # fmt: skip
        options = {"stride": pair(stride), "padding": pair(padding), "dilation": pair(dilation), "groups": groups}
        b = None if bias is None else bias[:, None, None]
        return self.add(Convolution(weight, b, weight[0].numel(), options, self.nodes[ref][2]), (ref,))

    def max_pool2d(
        self, ref: Ref, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Ref:  # fmt: skip
        if return_indices:
            raise Refused(f"MaxPool2d at {self.path} that returns places")
        options = {
            "kernel_size": pair(kernel_size), "stride": pair(stride or kernel_size), "padding": pair(padding),
            "dilation": pair(dilation), "ceil_mode": ceil_mode,
        }  # fmt: skip
        return self.add(Maximum(options, self.nodes[ref][2]), (ref,))

    def avg_pool2d(
        self, ref: Ref, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Ref:  # fmt: skip
        if divisor_override is not None and divisor_override <= 0:
            raise Refused(f"AvgPool2d at {self.path} with divisor {divisor_override}")
        into = self.nodes[ref][2]
        k = pair(kernel_size)
        if not ceil_mode and (count_include_pad or pair(padding) == (0, 0)) and divisor_override is None:
            # The same mean in every place: a convolution of each channel with itself.
            weight = torch.full((into[0], 1, *k), 1 / math.prod(k), dtype=self.like.dtype, device=self.like.device)
            return self.conv2d(ref, weight, None, stride or kernel_size, padding, 1, into[0])

        def average(h: Tensor) -> Tensor:
            return functional.avg_pool2d(
                h, k, pair(stride or kernel_size), pair(padding), ceil_mode, count_include_pad,
                divisor_override,
            )  # fmt: skip

        return self.add(Average(average, into, math.prod(k)), (ref,))

    def adaptive_avg_pool2d(self, ref: Ref, output_size: Any) -> Ref:
        into, size = self.nodes[ref][2], pair(output_size)
        return self.add(Average(lambda h: functional.adaptive_avg_pool2d(h, size), into, into[1] * into[2]), (ref,))

    def mean(self, ref: Ref, dim: Any = None, keepdim: bool = False) -> Ref:
        into = self.nodes[ref][2]
        axes = (dim,) if isinstance(dim, int) else tuple(dim or ())
        axes = tuple(d % (len(into) + 1) for d in axes)
        if not axes or 0 in axes:
            raise Refused(f"a mean over images at {self.path}")
        return self.add(
            Average(lambda h: h.mean(axes, keepdim=keepdim), into, math.prod(into[d - 1] for d in axes)), (ref,)
        )

    def flatten(self, ref: Ref, start_dim: int = 0, end_dim: int = -1) -> Ref:
        if start_dim < 1:
            raise Refused(f"flatten at {self.path} over the images")
        return self.reshaped(ref, self.blank(ref).flatten(start_dim, end_dim).shape)

    def unflatten(self, ref: Ref, dim: int, sizes: Any) -> Ref:
        if dim == 0:
            raise Refused(f"unflatten at {self.path} over the images")
        return self.reshaped(ref, self.blank(ref).unflatten(dim, sizes).shape)

    def reshape(self, ref: Ref, wanted: tuple[Any, ...]) -> Ref:
        """Only the images may stand first, as their number or as -1 with all the rest written out."""
        first, rest = wanted[0], wanted[1:]
        size = math.prod(self.nodes[ref][2])
        if not (isinstance(first, Batch) or (first == -1 and -1 not in rest and math.prod(rest) == size)):
            raise Refused(f"a reshape to {wanted} at {self.path}", "the number of images must stay first")
        return self.reshaped(ref, self.blank(ref).reshape(2, *rest).shape)

    def reshaped(self, ref: Ref, shape: Any) -> Ref:
        out = tuple(shape[1:])
        return ref if out == self.nodes[ref][2] else self.add(Reshape(self.nodes[ref][2], out), (ref,), out)

    def sum(self, a: Any, b: Any, *, sign: float, alpha: float = 1) -> Ref:
        sign = sign * alpha
        if isinstance(a, Ref) and isinstance(b, Ref):
            if self.nodes[a][2] != self.nodes[b][2]:
                raise Refused(f"a sum of activations of different shapes at {self.path}")
            return self.add(Sum(sign), (a, b), self.nodes[a][2])
        ref, constant = (a, b) if isinstance(a, Ref) else (b, a)
        shape = self.nodes[ref][2]
        one = torch.ones((), dtype=self.like.dtype, device=self.like.device)
        # c - h turns h round; h - c moves it down.
        moved = self.constant(constant, shape)
        scale, shift = (one, sign * moved) if ref is a else (sign * one, moved)
        return self.add(Scale(scale, shift, shift.abs()), (ref,), shape)

    def product(self, a: Any, b: Any) -> Ref:
        ref, constant = (a, b) if isinstance(a, Ref) else (b, a)
        if isinstance(constant, Ref):
            raise Refused(f"a product of activations at {self.path}")
        shape = self.nodes[ref][2]
        scale = self.constant(constant, shape)
        return self.add(Scale(scale, None, None, fan=2), (ref,), shape)

    def constant(self, value: Any, shape: tuple[int, ...]) -> Tensor:
        """A number or a tensor that broadcasts against one image, without its axis of images."""
        t = torch.as_tensor(value, dtype=self.like.dtype, device=self.like.device)
        if t.dim() > len(shape):
            if t.shape[0] != 1:
                raise Refused(f"a constant of shape {tuple(t.shape)} against activations of shape {shape}")
            t = t[0]
        if torch.broadcast_shapes(t.shape, shape) != torch.Size(shape):
            raise Refused(f"a constant of shape {tuple(t.shape)} against activations of shape {shape}")
        return t


def aligned(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One number per channel, ready to multiply one image's activations."""
    return t.reshape(-1, *[1] * (len(shape) - 1)) if t.dim() else t
