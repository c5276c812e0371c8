"""Covariances that depend on the distance of two pixels alone: a function of the distance, products by FFT.

f[a, b, r] is the covariance of channel a at one pixel and channel b at another, r pixels away, r rounded to a whole
number (Roth et al. 2018, arXiv:1805.08736, equation 16). Such a matrix is a convolution with the kernel
k_ab(D) = f[a, b, |D|], zeros beyond the image, so neither the estimate nor the product ever builds the (d, d) matrix:
both work on a torus of (2 H, 2 W) pixels, which is large enough that nothing wraps around.

With rounded distances the matrix need not be positive semi-definite: exp(-r / 8) on 32 x 32 pixels has the eigenvalue
-0.73. Hence ``psd``: ``none`` leaves it, ``interp`` takes f between whole distances by linear interpolation, and
``spectral`` sets the negative eigenvalues of the convolution on the torus to zero, whose part within the image is then
positive semi-definite too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

#: Tables for one image size, type and device.
tables = lru_cache(maxsize=8)


def distances(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Length of each displacement on the torus, and how many pairs of pixels lie so. -> two (2 H, 2 W) float64.

    The displacements -H and -W occur in no image: no pairs.
    """
    down, along = (torch.cat([torch.arange(s), torch.arange(-s, 0)]).double() for s in (height, width))
    pairs = (height - down.abs())[:, None] * (width - along.abs())
    return (down.square()[:, None] + along.square()).sqrt(), pairs


def reach(height: int, width: int) -> int:
    """Largest rounded distance of two pixels; a covariance function has one more entry."""
    return round(math.hypot(height - 1, width - 1))


@tables
def _bins(height: int, width: int, pairs_of_channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the sum of each displacement goes, for each pair of channels, and how many pairs of pixels that place gets.

    The last place of each pair of channels is for displacements that occur in no image. -> (.., 4 H W) and (R + 1,).
    """
    apart, pairs = distances(height, width)
    last = reach(height, width) + 1
    bins = torch.where(pairs > 0, apart.round(), last).flatten().long()
    count = torch.zeros(last + 1, dtype=torch.float64).index_add_(0, bins, pairs.flatten())
    return (bins + (last + 1) * torch.arange(pairs_of_channels)[:, None]).to(device), count.to(device)


@tables
def _places(height: int, width: int, psd: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of a covariance function below and above each displacement, and the share of the one above.

    The share is NaN where no image has the displacement. -> three (2 H, 2 W).
    """
    apart, pairs = distances(height, width)
    apart = (apart if psd == "interp" else apart.round()).clamp_max(reach(height, width))
    share = torch.where(pairs > 0, apart - apart.floor(), torch.nan)
    return apart.floor().long().to(device), apart.ceil().long().to(device), share.to(device)


def waves(g: Tensor) -> Tensor:
    """Half of the spectrum of images on the torus. Rows that are zero anyway are not transformed along the width.

    Shapes:
        (n, C, H, W) -> (n, C, 2 H, W + 1) complex.
    """
    along = torch.fft.rfft(g, n=2 * g.shape[-1])
    spectrum: Tensor = torch.fft.fft(along, n=2 * g.shape[-2], dim=-2)
    return spectrum


def covariance_function(xi: Tensor) -> Tensor:
    """Mean of the products of all pairs of entries at the same rounded distance, over rows and pairs.

    The sums over pairs with the same displacement are an autocorrelation, which the FFT gives for all displacements.

    Shapes:
        (n, C, H, W) -> (C, C, R), symmetric in the channels.
    """
    n, channels, height, width = xi.shape
    wave = waves(xi).unsqueeze(2)
    re, im = wave.real, wave.imag
    # The imaginary part of the products is odd in the displacement and cancels between D and -D.
    power = (re * re.transpose(1, 2) + im * im.transpose(1, 2)).sum(0) / n
    sums = torch.fft.irfft2(power, s=(2 * height, 2 * width))
    bins, count = _bins(height, width, channels**2, xi.device)
    binned = sums.new_zeros(channels**2 * len(count)).index_add_(0, bins.flatten(), sums.flatten())
    f = (binned.view(channels, channels, -1) / count)[..., :-1].to(xi)
    symmetric: Tensor = (f + f.transpose(0, 1)) / 2
    return symmetric


def decaying(mix: Tensor, height: int, width: int, zeta: float | None) -> Tensor:
    """exp(-r / zeta) times a channel covariance; zeta None means 1 at distance 0 and nothing beyond. -> (C, C, R)."""
    r = torch.arange(reach(height, width) + 1, device=mix.device, dtype=mix.dtype)
    return mix[..., None] * ((r == 0).to(mix) if zeta is None else (-r / zeta).exp())


@dataclass(frozen=True)
class Stationary:
    """A covariance that is a convolution, by its eigenvalues on the torus.

    Args:
        spectrum: (C, C, 2 H, W + 1), one symmetric matrix per frequency of a real FFT.
        lowest: Lowest eigenvalue on the torus before anything was done about it, a bound of the covariance's own from
            below. Scalar.
    """

    spectrum: Tensor
    lowest: Tensor

    @property
    def variance(self) -> Tensor:
        """Mean of the diagonal. -> scalar."""
        columns = self.spectrum.diagonal().mean(
            (0, 2)
        )  # all but the first and the last stand for their mirror image too
        return (columns.sum() + columns[1:-1].sum()) / (2 * len(columns) - 2)

    def product(self, g: Tensor) -> Tensor:
        """Sigma g of each row. Shapes: (n, C, H, W) -> same."""
        mixed = (self.spectrum * waves(g)[:, None]).sum(2)
        rows = torch.fft.ifft(mixed, dim=-2)[..., : g.shape[-2], :]
        whole: Tensor = torch.fft.irfft(rows, n=2 * g.shape[-1])
        return whole[..., : g.shape[-1]]


def stationary(f: Tensor, size: tuple[int, int], psd: str) -> Stationary:
    """The covariance of a covariance function.

    Args:
        f: (C, C, R), symmetric in the channels.
        size: H and W of the images.
        psd: ``none``, ``interp`` or ``spectral``; see above.
    """
    height, width = size
    below, above, share = _places(height, width, psd, f.device)
    kernel = torch.lerp(f[..., below], f[..., above], share.to(f)).nan_to_num(0)
    spectrum = torch.fft.rfft2(kernel).real  # the kernel is even
    if len(f) == 1:
        return Stationary(spectrum.clamp_min(0) if psd == "spectral" else spectrum, spectrum.min())
    blocks = spectrum.permute(2, 3, 0, 1)
    if psd != "spectral":
        return Stationary(spectrum, torch.linalg.eigvalsh(blocks).min())
    values, vectors = torch.linalg.eigh(blocks)
    clamped = (vectors * values.clamp_min(0)[..., None, :]) @ vectors.mT
    return Stationary(clamped.permute(2, 3, 0, 1).contiguous(), values.min())
