"""What the Square attack proposes: squares of +-eps in linf, bumps that move from window to window in l2 and l1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from robeval.core.ball import REL, Ball, project_l1_in_box
from robeval.core.streams import Streams

#: The share of the image that a square covers is halved after each of these proposals (of 10,000).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: Places of the two windows, orientation of the bump; the signs of the channels follow.
WORDS = 5


def side(proposal: int, share: float, height: int, width: int) -> int:
    """Side of the square at a proposal of the 10,000-proposal schedule."""
    share = share / 2 ** sum(proposal > h for h in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def bump(height: int, width: int, norm: str) -> Tensor:
    """Nested rectangles around the middle, each weaker than the one inside it (Square paper, equation 2). -> (h, w)."""
    far = max(height // 2, width // 2) + 1
    layer = torch.arange(1, far + 1, dtype=torch.float64) ** (-2 if norm == "l2" else -4)
    tail = layer.flip(0).cumsum(0).flip(0)
    down, along = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    return tail[torch.maximum(down[:, None], along[None, :])]


@cache
def dipole(size: int, norm: str) -> Tensor:
    """A bump above its negative, of unit norm. -> (size, size) float64."""
    upper = size // 2
    both = torch.cat([bump(upper, size, norm), -bump(size - upper, size, norm)])
    return both / (both.norm() if norm == "l2" else both.abs().sum())


@dataclass
class Squares:
    """Proposals of one cohort of images.

    Args:
        x0: (n, C, H, W).
        ball: The threat model.
        rng: One stream per row; a proposal's draws belong to its number.
        sides: (Q,) int64, side of the square of each proposal.
    """

    x0: Tensor
    ball: Ball
    rng: Streams
    sides: Tensor

    def __post_init__(self) -> None:
        self.height, self.width = self.x0.shape[2:]
        self.low, self.high = self.ball.limits(self.x0)
        self.down = torch.arange(self.height, device=self.x0.device)
        self.along = torch.arange(self.width, device=self.x0.device)
        if self.ball.norm != "linf":  # odd and at least 3, so that a bump has a middle
            most = min(self.height, self.width)
            self.sides = (self.sides.clamp_min(3) // 2 * 2 + 1).clamp(max=most)
            self.patterns = self.x0.new_zeros(most + 1, most, most)
            for s in self.sides.unique().tolist():
                self.patterns[s, :s, :s] = dipole(s, self.ball.norm)

    def start(self) -> Tensor:
        """Vertical stripes of +-eps in linf; a tiling of about 5 x 5 dipoles otherwise. -> (n, C, H, W)."""
        channels = self.x0.shape[1]
        if self.ball.norm == "linf":
            return self.ball.project(self.x0, self.x0 + self.ball.eps * self.rng.sign(channels, 1, self.width))
        tile = max(1, min(self.height, self.width) // 5)
        rows, columns = self.height // tile, self.width // tile
        sign, turned = self.rng.sign(channels, rows, columns), self.rng.sign(rows, columns) > 0
        pattern = dipole(tile, self.ball.norm).to(self.x0)
        pattern = torch.where(turned[..., None, None], pattern.T, pattern)  # (n, rows, columns, tile, tile)
        tiles = sign[..., None, None] * pattern[:, None]
        top, left = (self.height - rows * tile) // 2, (self.width - columns * tile) // 2
        delta = torch.zeros_like(self.x0)
        delta[:, :, top : top + rows * tile, left : left + columns * tile] = (
            tiles.transpose(3, 4).flatten(4).flatten(2, 3)
        )
        return self._full(self.x0, delta)

    def propose(self, rows: Tensor, x: Tensor, numbers: Tensor) -> Tensor:
        """One proposal for each number, all from the same state. -> (m, L, C, H, W).

        Args:
            rows: (m,) the images.
            x: (m, C, H, W), their state.
            numbers: (m, L) numbers of the proposals.
        """
        channels = x.shape[1]
        words = self.rng.numbered(rows, numbers, WORDS + channels)
        size = self.sides[numbers.clamp(max=len(self.sides) - 1)]
        sign = ((words[..., WORDS:] >> 31) * 2 - 1)[..., None, None]
        top, left = self._place(words[..., 0], self.height, size), self._place(words[..., 1], self.width, size)
        window = self._window(top, left, size)
        if self.ball.norm == "linf":
            edge = torch.where(sign > 0, self.high[rows][:, None], self.low[rows][:, None])
            return torch.where(window, edge, x[:, None])
        other = self._window(
            self._place(words[..., 2], self.height, size), self._place(words[..., 3], self.width, size), size
        )
        pattern = self._pattern(top, left, size, words[..., 4] >> 31 == 1)[:, :, None] * sign
        x0 = self.x0[rows][:, None]
        delta = (x - self.x0[rows])[:, None].expand(-1, numbers.shape[1], -1, -1, -1)
        length = self._length(delta.flatten(2))[..., None, None, None]
        within = self._length((delta * window).flatten(3))[..., None, None]
        mass = self._length((delta * (window | other)).flatten(3))[..., None, None]
        new = (pattern + delta / (within + 1e-12)) * window
        new = new / (self._length(new.flatten(3))[..., None, None] + 1e-12)
        if self.ball.norm == "l2":
            new = new * ((self.ball.eps**2 - length**2).clamp_min(0) / channels + mass**2).sqrt()
        else:
            new = new * ((self.ball.eps - length).clamp_min(0) + channels * mass)
        moved = torch.where(window, new, delta.masked_fill(other, 0))
        flat = x0.expand_as(moved).flatten(0, 1)
        return self._full(flat, moved.flatten(0, 1)).view_as(moved)

    def _place(self, word: Tensor, free: int, size: Tensor) -> Tensor:
        """Where the window begins along one axis. (m, L) -> (m, L)."""
        return (word * (free - size + 1)) >> 32

    def _window(self, top: Tensor, left: Tensor, size: Tensor) -> Tensor:
        """The pixels of a square. (m, L) -> (m, L, 1, H, W) bool."""
        rows = (self.down >= top[..., None]) & (self.down < (top + size)[..., None])
        columns = (self.along >= left[..., None]) & (self.along < (left + size)[..., None])
        return (rows[..., :, None] & columns[..., None, :])[:, :, None]

    def _pattern(self, top: Tensor, left: Tensor, size: Tensor, turned: Tensor) -> Tensor:
        """The dipole of that size at that place, some of them turned. (m, L) -> (m, L, H, W); void outside."""
        most = self.patterns.shape[1] - 1
        down = (self.down - top[..., None]).clamp(0, most)[..., :, None]
        along = (self.along - left[..., None]).clamp(0, most)[..., None, :]
        turned = turned[..., None, None]
        return self.patterns[size[..., None, None], torch.where(turned, along, down), torch.where(turned, down, along)]

    def _length(self, flat: Tensor) -> Tensor:
        """Norm over the last axis."""
        return (flat * flat).sum(-1).sqrt() if self.ball.norm == "l2" else flat.abs().sum(-1)

    def _full(self, x0: Tensor, delta: Tensor) -> Tensor:
        """``x0 + delta`` brought to length eps, then into the box (l2); the nearest point of both (l1)."""
        if self.ball.norm == "l2":
            delta = (
                delta
                * (self.ball.eps * (1 - REL) / self._length(delta.flatten(1)).clamp_min(1e-12))[:, None, None, None]
            )
            return (x0 + delta).clamp(0, 1)
        return (x0 + project_l1_in_box(x0, delta, self.ball.eps * (1 - REL))).clamp(0, 1)
