"""Covariances of perturbations: as matrices, or as functions of distance; how they are taken, learnt and built.

"Covariance" is the raw second moment, as in Roth et al. 2018 (arXiv:1805.08736), algorithm 1: perturbations are not
centred. What is averaged and saved is its ``moment``, a plain tensor that is linear in the second moments of images:
the (d, d) matrix itself (``full``), or a covariance function (C, C, R) (``covfun``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.core.correlated import centred, channel_covariance, pixel_covariance, second_moment
from robeval.train.covariance_function import Stationary, covariance_function, decaying, stationary


@dataclass(frozen=True)
class Matrix:
    """Any covariance, as the matrix that it is; memory and time of a product grow with d^2.

    Args:
        values: (d, d), d = C * H * W.
    """

    values: Tensor

    @property
    def variance(self) -> Tensor:
        """Mean of the diagonal. -> scalar."""
        return self.values.diagonal().mean()

    def product(self, g: Tensor) -> Tensor:
        """Sigma g of each row. Shapes: (n, C, H, W) -> same."""
        return (g.flatten(1) @ self.values).view_as(g)


def form(covariance: Matrix | Stationary, g: Tensor) -> Tensor:
    """g^T Sigma g of each row, to be differentiated once.

    Both the value and the gradient 2 Sigma g come from one product, which itself is not differentiated.

    Shapes:
        (n, C, H, W) -> (n,).
    """
    fixed = g.detach()
    return ((2 * g - fixed) * covariance.product(fixed)).flatten(1).sum(1)


#: How the moment of a mini-batch is taken, by the name of the representation.
MOMENTS: dict[str, Callable[[Tensor], Tensor]] = {"full": second_moment, "covfun": covariance_function}


def covariance_of(moment: Tensor, shape: tuple[int, ...], psd: str) -> Matrix | Stationary:
    """What a moment stands for.

    Args:
        moment: (d, d), or a covariance function (C, C, R).
        shape: (C, H, W) of the images.
        psd: What is done about negative eigenvalues of a covariance function, see :func:`stationary`; a mean of second
            moments has none.
    """
    return Matrix(moment) if moment.dim() == 2 else stationary(moment, (shape[1], shape[2]), psd)


def synthetic(x: Tensor, representation: str, *, zeta: float | None, inter: float = 0.0) -> Tensor:
    """Moment of noise with correlation exp(-r / zeta) between pixels, times ``inter`` between channels.

    Args:
        x: (n, C, H, W), of which only shape, type and device count.
        representation: ``full`` or ``covfun``.
        zeta: Decay length in pixels; None for independent pixels.
        inter: Correlation of two channels at the same pixel.
    """
    _, channels, height, width = x.shape
    mix = channel_covariance(channels, inter)
    if representation == "covfun":
        return decaying(mix, height, width, zeta).to(x)
    pixels = torch.eye(height * width).double() if zeta is None else pixel_covariance(height, width, zeta)
    return torch.kron(mix, pixels).to(x)


def data_moment(x: Tensor, representation: str) -> Tensor:
    """Moment of a set of images around their mean image. Shapes: (N, C, H, W) -> (d, d) or (C, C, R)."""
    return centred(x, MOMENTS[representation]).to(x)


def running_mean(kept: dict[str, Tensor], news: dict[str, Tensor], beta: float) -> None:
    """Move each kept mean towards its news by ``beta``, the first times by more, so that all weights sum to 1.

    That is the mean that starts from zeros, after its bias correction.

    Args:
        kept: The means by name, changed in place, and ``updates``, how often that was done.
        news: New values by name.
        beta: Weight of the newest value in the long run.
    """
    updates = int(kept.get("updates", 0)) + 1
    rate = beta / (1 - (1 - beta) ** updates)
    for name, new in news.items():
        kept[name] = new if updates == 1 else torch.lerp(kept[name], new, rate)
    kept["updates"] = torch.tensor(updates)
