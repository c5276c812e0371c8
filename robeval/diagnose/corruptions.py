"""Common corruptions at five severities, with the constants of CIFAR-10-C (Hendrycks and Dietterich 2019).

Those that need no other package; frost, glass, snow, fog, motion and zoom blur, elastic distortion and JPEG are left
out. Every image draws from its own stream. Shapes: (n, C, H, W) in [0, 1] to the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from robeval.core.streams import Streams


def gaussian_noise(x: Tensor, c: float, rng: Streams) -> Tensor:
    return x + c * rng.normal(*x.shape[1:])


def shot_noise(x: Tensor, c: float, rng: Streams) -> Tensor:
    """Counting noise of c photons at white, by its normal approximation."""
    return x + (x / c).sqrt() * rng.normal(*x.shape[1:])


def impulse_noise(x: Tensor, c: float, rng: Streams) -> Tensor:
    """A share c of the entries turns black or white."""
    u = rng.uniform(*x.shape[1:])
    return torch.where(u < c / 2, 0.0, torch.where(u < c, 1.0, x))


def speckle_noise(x: Tensor, c: float, rng: Streams) -> Tensor:
    return x + c * x * rng.normal(*x.shape[1:])


def gaussian_blur(x: Tensor, c: float, rng: Streams) -> Tensor:
    reach = min(math.ceil(4 * c), x.shape[2] - 1, x.shape[3] - 1)
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    bell = (-(at**2) / (2 * c**2)).exp()
    return _filtered(x, torch.outer(bell, bell))


def defocus_blur(x: Tensor, c: float, rng: Streams) -> Tensor:
    """A disk of radius c, its rim weighted by how much of a pixel it covers."""
    reach = min(math.ceil(c), x.shape[2] - 1, x.shape[3] - 1)
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    disk = (c + 0.5 - torch.hypot(at[:, None], at[None])).clamp(0, 1)
    return _filtered(x, disk)


def brightness(x: Tensor, c: float, rng: Streams) -> Tensor:
    """The value of the hue-saturation-value form grows by c."""
    value = x.amax(1, keepdim=True)
    return torch.where(value > 0, x * ((value + c).clamp(max=1) / value.clamp_min(1e-6)), x + c)


def contrast(x: Tensor, c: float, rng: Streams) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * c + mean


def pixelate(x: Tensor, c: float, rng: Streams) -> Tensor:
    small = [max(1, int(c * side)) for side in x.shape[2:]]
    return F.interpolate(F.interpolate(x, small, mode="area"), x.shape[2:], mode="nearest")


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel by itself, borders mirrored."""
    channels, reach = x.shape[1], kernel.shape[0] // 2
    weight = (kernel / kernel.sum()).expand(channels, 1, -1, -1)
    return F.conv2d(F.pad(x, (reach,) * 4, mode="reflect"), weight, groups=channels)


#: Constants of severity 1 to 5.
CORRUPTIONS: dict[Callable[[Tensor, float, Streams], Tensor], tuple[float, ...]] = {
    gaussian_noise: (0.04, 0.06, 0.08, 0.09, 0.10),
    shot_noise: (500, 250, 100, 75, 50),
    impulse_noise: (0.01, 0.02, 0.03, 0.05, 0.07),
    speckle_noise: (0.06, 0.1, 0.12, 0.16, 0.2),
    gaussian_blur: (0.4, 0.6, 0.7, 0.8, 1.0),
    defocus_blur: (0.3, 0.4, 0.5, 1.0, 1.5),
    brightness: (0.05, 0.1, 0.15, 0.2, 0.3),
    contrast: (0.75, 0.5, 0.4, 0.3, 0.15),
    pixelate: (0.95, 0.9, 0.85, 0.75, 0.65),
}
