"""Spectral densities of symmetric operators by stochastic Lanczos quadrature. Machinery of bounds, no bound itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.bounds.lanczos import Product, tridiagonal


@dataclass
class Density:
    """How the eigenvalues of each operator are spread, float64 on the CPU.

    Args:
        nodes: (n, S, m), Ritz values of S random starts.
        weights: (n, S, m), share of the spectrum that each stands for; they sum to 1 over the last dimension.
    """

    nodes: Tensor
    weights: Tensor

    def moment(self, power: int) -> Tensor:
        """Mean of the eigenvalues to a power, an estimate of trace(H^power) / d. -> (n,)."""
        return (self.weights * self.nodes**power).sum(2).mean(1)

    def curve(self, points: int = 200, width: float = 0.01) -> tuple[Tensor, Tensor]:
        """Densities smoothed by a Gaussian, for a plot; each integrates to 1.

        Args:
            points: Eigenvalues at which the densities are taken, from the least to the largest node of all operators
                and three widths beyond.
            width: Standard deviation of the Gaussian, as a share of that range.

        Returns:
            Eigenvalues (points,) and densities (n, points). Their mean over n is the density of all operators.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        sigma = width * (high - low) or width * max(abs(high), 1.0)
        grid = torch.linspace(low - 3 * sigma, high + 3 * sigma, points, dtype=torch.float64)
        density = torch.zeros(len(self.nodes), points, dtype=torch.float64)
        for row, (nodes, weights) in enumerate(zip(self.nodes.flatten(1), self.weights.flatten(1), strict=True)):
            bumps = (-((grid[:, None] - nodes) / sigma).square() / 2).exp() / (sigma * math.sqrt(2 * math.pi))
            density[row] = (bumps * weights).sum(1) / self.nodes.shape[1]
        return grid, density


def spectral_density(
    products: Callable[[Tensor], Product],
    draw: Callable[[Tensor, int], Tensor],
    rows: int,
    size: int,
    *,
    starts: int = 4,
    steps: int = 40,
) -> Density:
    """Stochastic Lanczos quadrature: with the Ritz pairs (theta, s) of a random unit start, weight theta by s_1^2.

    For a start v the sum of s_1^2 f(theta) equals v^T f(H) v for all polynomials f of degree below 2 m, whose mean over
    starts is trace(f(H)) / d. With m = d and one start the nodes are the eigenvalues themselves.

    Args:
        products: Given row numbers, returns the product of those rows' operators, (n, size) -> (n, size).
        draw: Random vectors for some rows: (n,), number -> (n, size).
        rows: Number of operators n.
        size: Their dimension d.
        starts: Random starts, averaged.
        steps: Products m per start, at most d.

    Source:
        Bai, Fahey, Golub 1996; Ubaru, Chen, Saad 2017, Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature;
        Ghorbani, Krishnan, Xiao 2019, arXiv:1901.10159, for the smoothed density.
    Raises:
        ContractBroken: a product is NaN or infinite.
    """
    m = min(steps, size)
    nodes, weights = [], []
    for start in range(starts):
        theta, s = torch.linalg.eigh(tridiagonal(products, draw, rows, size, steps=m, number=start * (m + 1)))
        nodes.append(theta.cpu())
        weights.append(s[:, 0, :].square().cpu())
    return Density(torch.stack(nodes, 1), torch.stack(weights, 1))
