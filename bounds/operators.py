"""The operators that proofs know, each with what a proof asks of it. Machinery of the proofs, no bound itself.

Affine ones (forward, backward, and both with changed weights such as their sizes), convex activations
(:mod:`robeval.bounds.convex`) and maxima over windows. Shapes are without the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from robeval.bounds.convex import Convex

Shape = tuple[int, ...]
How = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Input:
    """The image."""


@dataclass(frozen=True)
class Sum:
    """a + sign * b of two nodes."""

    sign: float = 1.0


@dataclass(frozen=True)
class Dense:
    """Rows of a matrix against the last axis; weight (out, in)."""

    weight: Tensor
    bias: Tensor | None
    fan: int

    def forward(self, h: Tensor, how: How | None = None) -> Tensor:
        return functional.linear(h, self.weight if how is None else how(self.weight))

    def transpose(self, a: Tensor, how: How | None = None) -> Tensor:
        return a @ (self.weight if how is None else how(self.weight))

    def largest(self, s: Tensor) -> Tensor:
        """Per output, the largest |w_ij| s_j."""
        return (self.weight.abs() * s).amax(1)


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution with zero padding; weight (out, in / groups, k, k)."""

    weight: Tensor
    bias: Tensor | None
    fan: int
    options: dict[str, Any]
    into: Shape

    def forward(self, h: Tensor, how: How | None = None) -> Tensor:
        return functional.conv2d(h, self.weight if how is None else how(self.weight), **self.options)

    def transpose(self, a: Tensor, how: How | None = None) -> Tensor:
        """What a row of coefficients on the output is on the input; (P, *out) -> (P, *in)."""
        o, k = self.options, self.weight.shape[2:]
        left = [
            self.into[1 + i]
            - ((a.shape[2 + i] - 1) * o["stride"][i] - 2 * o["padding"][i] + o["dilation"][i] * (k[i] - 1) + 1)
            for i in (0, 1)
        ]
        w = self.weight if how is None else how(self.weight)
        return functional.conv_transpose2d(a, w, output_padding=left, **o)

    def largest(self, s: Tensor) -> Tensor:
        """Per output channel, the largest |w| times the largest s, for every place; (in, H, W) -> broadcastable."""
        return (self.weight.abs().amax((1, 2, 3)) * s.max())[:, None, None]


@dataclass(frozen=True)
class Scale:
    """h * weight + bias, entry by entry: BatchNorm in eval mode, normalisation, arithmetic with constants.

    ``terms`` is the size of what the bias was summed from, which its rounding goes with.
    """

    weight: Tensor
    bias: Tensor | None
    terms: Tensor | None
    fan: int = 1

    def forward(self, h: Tensor, how: How | None = None) -> Tensor:
        return h * (self.weight if how is None else how(self.weight))

    transpose = forward


@dataclass(frozen=True)
class Average:
    """A mean of entries, with weights that are not negative: average pools, means over axes, reshapes.

    Args:
        function: (n, *into) -> (n, *out), linear.
        into: Shape of one input.
        fan: Most entries in one mean.
    """

    function: How
    into: Shape
    fan: int
    weight = None
    bias = None

    def forward(self, h: Tensor, how: How | None = None) -> Tensor:
        return self.function(h)

    def transpose(self, a: Tensor, how: How | None = None) -> Tensor:
        back: Any = torch.func.vjp(self.function, a.new_zeros(len(a), *self.into))[1]
        moved: Tensor = back(a)[0]
        return moved


@dataclass(frozen=True)
class Reshape:
    """The same entries in another shape."""

    into: Shape
    out: Shape
    weight = None
    bias = None
    fan: int = 0

    def forward(self, h: Tensor, how: How | None = None) -> Tensor:
        return h.reshape(-1, *self.out)

    def transpose(self, a: Tensor, how: How | None = None) -> Tensor:
        return a.reshape(-1, *self.into)


Affine = Dense | Convolution | Scale | Average | Reshape


@dataclass(frozen=True)
class Maximum:
    """The largest entry of each window.

    Args:
        options: kernel_size, stride, padding, dilation, ceil_mode as torch means them.
        into: Shape of one input.
    """

    options: dict[str, Any]
    into: Shape

    def forward(self, h: Tensor) -> Tensor:
        most: Tensor = functional.max_pool2d(h, **self.options)
        return most

    def where(self, h: Tensor) -> Tensor:
        """Flat place, within its channel, of the largest entry of each window."""
        place: Tensor = functional.max_pool2d(h, return_indices=True, **self.options)[1]
        return place

    def second(self, h: Tensor, place: Tensor) -> Tensor:
        """Largest entry of each window but for the one at its own place; windows may overlap."""
        windows = self.windows(h, -torch.inf)
        own = self.windows(torch.arange(h[0, 0].numel(), device=h.device).to(h).view(1, 1, *h.shape[2:]), -1.0)
        return windows.masked_fill(own == place[:, :, None], -torch.inf).amax(2)

    def windows(self, h: Tensor, fill: float) -> Tensor:
        """Entries of each window: (n, C, H, W) -> (n, C, k, H', W')."""
        o = self.options
        (k1, k2), (p1, p2) = o["kernel_size"], o["padding"]
        n, c = h.shape[:2]
        out = functional.max_pool2d(h[:1], **o).shape[2:]
        need = [
            (out[i] - 1) * o["stride"][i]
            + o["dilation"][i] * (o["kernel_size"][i] - 1)
            + 1
            - h.shape[2 + i]
            - (p1, p2)[i]
            for i in (0, 1)
        ]
        padded = functional.pad(h, (p2, max(0, need[1]), p1, max(0, need[0])), value=fill)
        # unfold multiplies nothing, but it would turn infinite padding into nan on some paths: indexing does not.
        rows = torch.arange(out[0])[:, None] * o["stride"][0] + torch.arange(k1) * o["dilation"][0]
        columns = torch.arange(out[1])[:, None] * o["stride"][1] + torch.arange(k2) * o["dilation"][1]
        picked = padded[:, :, rows[:, None, :, None], columns[None, :, None, :]]  # n, C, H', W', k1, k2
        return picked.reshape(n, c, *out, k1 * k2).movedim(4, 2)


Operator = Input | Sum | Affine | Convex | Maximum
