"""Gaussian noise with long-range correlations: its covariances, and a sampler that needs only small factors.

The covariance of an image is the Kronecker product of a channel matrix M and a pixel matrix C, so that two small
factors L_M and L_C turn white noise n into (L_M kron L_C) n (Roth, Lucchi, Nowozin, Hofmann 2018, Adversarially Robust
Training through Structured Gradient Regularization, arXiv:1805.08736).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robeval.core.errors import UsageError

#: Negative eigenvalues of a covariance up to this share of the largest are rounding.
ROUNDING = 1e-6
#: Images whose second moments are taken at once.
CHUNK = 1000


def channel_covariance(channels: int, inter: float) -> Tensor:
    """1 within a channel, ``inter`` between two. -> (C, C) float64."""
    lowest = -1 / (channels - 1) if channels > 1 else -math.inf
    if channels > 1 and not lowest <= inter <= 1:
        raise UsageError(
            f"inter must lie between {lowest:.3g} and 1 for {channels} channels, got {inter}",
            code="A04",
            why="other values are the correlations of nothing",
        )
    return torch.full((channels, channels), float(inter), dtype=torch.float64).fill_diagonal_(1)


def pixel_covariance(height: int, width: int, zeta: float) -> Tensor:
    """exp(-r / zeta), r the exact Euclidean distance between two pixels. -> (H * W, H * W) float64.

    Distances rounded to whole pixels would make the matrix indefinite.
    """
    if not 0 < zeta < math.inf:
        raise UsageError(f"zeta must be a number > 0, got {zeta}", code="A04")
    down, along = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([down, along], -1).reshape(-1, 2).double()
    apart = (places[:, None] - places).square().sum(-1).sqrt()
    decay: Tensor = (-apart / zeta).exp()
    return decay


def root(covariance: Tensor) -> Tensor:
    """L with L L^T = ``covariance``: Cholesky, or the eigenvectors when it is singular. Shapes: (d, d) -> (d, d)."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -ROUNDING * values[-1]:
        raise UsageError(
            f"the covariance has the negative eigenvalue {float(values[0]):.3g}; no noise has it", code="A04"
        )
    factor = vectors * values.clamp_min(0).sqrt()
    return factor


@dataclass(frozen=True)
class Sampler:
    """Turns white noise into correlated noise.

    Args:
        channels: Factor of the channel covariance, (c, c).
        pixels: Factor of the pixel covariance, (p, p), where c * p is the number of entries of an image.
    """

    channels: Tensor
    pixels: Tensor

    def __call__(self, white: Tensor) -> Tensor:
        """Shapes: (b, C, H, W) -> same. The last bits may depend on b."""
        c, p = len(self.channels), len(self.pixels)
        smooth = (white.reshape(-1, p) @ self.pixels.T).view(-1, c, p)
        return (self.channels @ smooth).view_as(white)

    def to(self, like: Tensor) -> Sampler:
        """The same sampler in the type and on the device of a tensor."""
        return Sampler(self.channels.to(like), self.pixels.to(like))


@lru_cache(maxsize=4)
def exponential(shape: tuple[int, int, int], zeta: float, inter: float) -> Sampler:
    """Unit variance, exp(-r / zeta) between pixels, times ``inter`` between channels. For images (C, H, W)."""
    channels, height, width = shape
    return Sampler(root(channel_covariance(channels, inter)), root(pixel_covariance(height, width, zeta)))


def second_moment(x: Tensor) -> Tensor:
    """Mean of x x^T over the rows. Shapes: (n, C, H, W) -> (d, d)."""
    flat = x.flatten(1)
    return flat.T @ flat / len(flat)


def centred(x: Tensor, moment: Callable[[Tensor], Tensor] = second_moment) -> Tensor:
    """A moment of images around their mean image, by default their (d, d) covariance; float64.

    Args:
        x: (N, C, H, W).
        moment: A mean over rows that is linear in the second moments.
    """
    mean = x.mean(0, dtype=torch.float64)
    parts = x.split(CHUNK)
    total = moment(parts[0].double() - mean) * len(parts[0])
    for part in parts[1:]:
        total += moment(part.double() - mean) * len(part)
    return total / len(x)


def with_covariance(matrix: Tensor) -> Sampler:
    """Noise with the covariance (d, d), scaled to a mean variance of 1.

    Raises:
        UsageError: a negative eigenvalue, or no variance.
    """
    scale = matrix.diagonal().mean()
    if not scale > 0:
        raise UsageError("the covariance has no variance: are all images the same?", code="A04")
    return Sampler(torch.ones(1, 1, dtype=matrix.dtype, device=matrix.device), root((matrix + matrix.T) / (2 * scale)))


def from_file(path: str, shape: tuple[int, int, int]) -> Sampler:
    """The covariance of a .npy file, (d, d) with d = C * H * W, scaled to a mean variance of 1.

    Raises:
        UsageError: no such file, not a square matrix of that size, not symmetric, not finite, or indefinite.
    """
    if not Path(path).is_file():
        raise UsageError(f"covariance must be exponential or a .npy file; no file at {path}", code="A04")
    return _from_file(path, math.prod(shape), Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _from_file(path: str, size: int, changed: int) -> Sampler:
    try:
        held = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        raise UsageError(f"{path} is not a .npy file of numbers", code="A04") from None
    if not isinstance(held, np.ndarray) or held.shape != (size, size) or held.dtype.kind not in "fiu":
        told = f"{held.dtype} of shape {held.shape}" if isinstance(held, np.ndarray) else "several arrays"
        raise UsageError(f"{path} holds {told}, expected a covariance of shape ({size}, {size})", code="A04")
    matrix = torch.from_numpy(held.astype(np.float64))
    scale = float(matrix.diagonal().mean())
    if not (matrix.isfinite().all() and scale > 0 and (matrix - matrix.T).abs().max() <= ROUNDING * scale * size):
        raise UsageError(f"{path} is no covariance: not finite, not symmetric or without variance", code="A04")
    return with_covariance(matrix)
