"""Rows of coefficients on a node's output: whole maps, or small windows of them. Machinery of the proofs.

A neuron of a convolution sees a few pixels. Its coefficients are kept for that window alone, which grows from layer to
layer until it covers the map: on 28x28 images this spares early layers more than nine tenths of the work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from robeval.bounds.operators import Average, Convolution, Dense, Reshape, Scale
from robeval.bounds.region import Region


@dataclass(frozen=True)
class Rows:
    """S rows of coefficients for each of n images.

    Args:
        data: (n, S, *shape), or (n, S, C, h, w) for windows; what lies outside the map is zero.
        shape: Shape of the node's output.
        origin: (n, S, 2) first line and column of each window; None for whole maps.
    """

    data: Tensor
    shape: tuple[int, ...]
    origin: Tensor | None = None

    @classmethod
    def neurons(cls, which: Tensor, shape: tuple[int, ...], like: Tensor) -> Rows:
        """One row per neuron, with a single 1; which (n, S) flat places in the node's output."""
        if len(shape) < 3:
            zero = torch.zeros(*which.shape, shape[0] if len(shape) == 1 else -1, dtype=like.dtype, device=like.device)
            return cls(zero.scatter_(2, which[..., None], 1.0), shape)
        channel, place = which // (shape[1] * shape[2]), which % (shape[1] * shape[2])
        one = functional.one_hot(channel, shape[0]).to(like)[..., None, None]
        return cls(one, shape, torch.stack([place // shape[2], place % shape[2]], 2))

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Flat place of each entry of the windows, cut to the map, and which lie in it: (n, S, h, w) each."""
        assert self.origin is not None
        (h, w), (lines, columns) = self.data.shape[-2:], self.shape[1:]
        row = self.origin[..., 0, None] + torch.arange(h, device=self.origin.device)
        column = self.origin[..., 1, None] + torch.arange(w, device=self.origin.device)
        inside = ((row >= 0) & (row < lines))[..., :, None] & ((column >= 0) & (column < columns))[..., None, :]
        flat = row.clamp(0, lines - 1)[..., :, None] * columns + column.clamp(0, columns - 1)[..., None, :]
        return flat, inside

    def pick(self, t: Tensor) -> Tensor:
        """The entries of a tensor on which the rows stand.

        Shapes:
            (n, *shape), (n, S, *shape) for whole maps, or (1, *shape) -> something that broadcasts against ``data``.
        """
        if self.origin is None:
            return t if t.dim() == self.data.dim() else t[:, None]
        flat, _ = self._places
        n, s, h, w = flat.shape
        source = t.expand(n, *self.shape).flatten(2)
        found = source.gather(2, flat.view(n, 1, -1).expand(n, self.shape[0], -1))
        return found.view(n, self.shape[0], s, h, w).movedim(1, 2)

    def inner(self, t: Tensor) -> Tensor:
        """Sum of products with the picked entries. -> (n, S)."""
        total: Tensor = (self.data * self.pick(t)).flatten(2).sum(2)
        return total

    def size(self) -> Tensor:
        """Sum of absolute coefficients. -> (n, S)."""
        total: Tensor = self.data.detach().abs().flatten(2).sum(2)
        return total

    def whole(self) -> Rows:
        """The same rows on whole maps."""
        if self.origin is None:
            return self
        flat, _ = self._places
        n, s, c = self.data.shape[:3]
        image = self.data.new_zeros(n, s, c, self.shape[1] * self.shape[2])
        index = flat.flatten(2)[:, :, None].expand(n, s, c, -1)
        return Rows(image.scatter_add(3, index, self.data.flatten(3)).view(n, s, *self.shape), self.shape)

    def __add__(self, other: Rows) -> Rows:
        if self.origin is None or other.origin is None:
            return Rows(self.whole().data + other.whole().data, self.shape)
        first = torch.minimum(self.origin, other.origin)
        parts = []
        # Windows that meet at a node belong to the same neurons, so they are shifted alike in every row.
        sizes = [(r.origin - first)[0, 0] + torch.tensor(r.data.shape[-2:], device=first.device) for r in (self, other)]  # type: ignore[operator]
        most = torch.maximum(*sizes).tolist()
        for r in (self, other):
            (up, left), (h, w) = (r.origin - first)[0, 0].tolist(), r.data.shape[-2:]  # type: ignore[operator]
            parts.append(functional.pad(r.data, (left, most[1] - left - w, up, most[0] - up - h)))
        return Rows(parts[0] + parts[1], self.shape, first)

    def times(self, factor: float) -> Rows:
        """Every coefficient times a number."""
        return self if factor == 1 else replace(self, data=factor * self.data)

    def through(self, op: Dense | Convolution | Scale | Average | Reshape, shape: tuple[int, ...]) -> Rows:
        """The rows on the input of an affine operator, of the given shape."""
        n, s = self.data.shape[:2]
        if isinstance(op, Scale):
            weight = (
                op.weight if op.weight.numel() == 1 or op.weight.shape[1:].numel() == 1 else self.pick(op.weight[None])
            )
            return replace(self, data=self.data * weight)
        if self.origin is None or not isinstance(op, Convolution):
            return Rows(op.transpose(self.whole().data.flatten(0, 1)).view(n, s, *shape), shape)
        o = op.options
        how = {"stride": o["stride"], "dilation": o["dilation"], "groups": o["groups"]}
        data = functional.conv_transpose2d(self.data.flatten(0, 1), op.weight, **how)
        origin = self.origin * torch.tensor(o["stride"], device=self.origin.device)
        origin = origin - torch.tensor(o["padding"], device=self.origin.device)
        moved = Rows(data.view(n, s, *data.shape[1:]), shape, origin)
        inside = moved._places[1][:, :, None]  # coefficients on the padding count nothing, for it is zero
        moved = replace(moved, data=moved.data * inside)
        return moved.whole() if data.shape[-2] * data.shape[-1] >= shape[1] * shape[2] else moved

    def minimum(self, region: Region) -> Tensor:
        """Lower bounds of the rows over the region, where the rows stand on the image. -> (n, S)."""
        if self.origin is None:
            return region.minimum(self.data)
        inside = self._places[1][:, :, None]
        x, low, high = (self.pick(t) for t in (region.x, region.low, region.high))
        x, low, high = (torch.where(inside, t, 0.0).flatten(2) for t in (x, low, high))
        return region.lowest(self.data.flatten(2), x, low, high)
