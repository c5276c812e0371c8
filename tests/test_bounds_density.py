"""Spectral densities by stochastic Lanczos quadrature against known spectra."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robeval.bounds.spectral_density import Density, spectral_density
from robeval.core.streams import Streams

F64 = torch.float64


def draw_of(size: int) -> Callable[[Tensor, int], Tensor]:
    return lambda rows, number: Streams(0, rows.tolist(), "test", [number] * len(rows), dtype=F64).normal(size)


def of(matrices: Tensor, **settings: int) -> Density:
    size = matrices.shape[1]
    return spectral_density(
        lambda rows: lambda v: torch.einsum("nij,nj->ni", matrices[rows], v),
        draw_of(size), len(matrices), size, **settings,
    )  # fmt: skip


def symmetric(n: int, d: int) -> Tensor:
    a = torch.randn(n, d, d, generator=torch.Generator().manual_seed(0), dtype=F64)
    return (a + a.mT) / 2


def test_the_quadrature_is_exact_for_polynomials() -> None:
    """One start of m steps integrates v^T H^k v exactly for k < 2 m."""
    a = symmetric(5, 30)
    v = draw_of(30)(torch.arange(5), 0)
    v = v / v.norm(dim=1, keepdim=True)
    found = of(a, starts=1, steps=4)
    torch.testing.assert_close(found.weights.sum(2), torch.ones(5, 1, dtype=F64))
    power = v
    for k in range(8):
        exact = (v * power).sum(1)
        torch.testing.assert_close(found.moment(k), exact, rtol=1e-9, atol=1e-9)
        power = torch.einsum("nij,nj->ni", a, power)


def test_as_many_steps_as_dimensions_give_the_spectrum() -> None:
    a = symmetric(3, 12)
    found = of(a, starts=1, steps=12)
    torch.testing.assert_close(found.nodes[:, 0], torch.linalg.eigvalsh(a), rtol=1e-9, atol=1e-9)


def test_the_mean_over_starts_is_the_trace() -> None:
    a = symmetric(2, 40)
    found = of(a, starts=60, steps=10)
    second = (torch.linalg.eigvalsh(a) ** 2).mean(1)
    assert found.moment(2).tolist() == pytest.approx(second.tolist(), rel=0.1)


def test_curves_integrate_to_one_and_peak_at_the_eigenvalues() -> None:
    values = torch.tensor([-2.0] * 10 + [1.0] * 30, dtype=F64)
    grid, density = of(torch.diag(values)[None], starts=50, steps=5).curve(points=601, width=0.02)
    assert float(torch.trapezoid(density[0], grid)) == pytest.approx(1, abs=5e-3)
    left = density[0] * (grid < 0)
    assert float(torch.trapezoid(left, grid)) == pytest.approx(0.25, abs=0.05)
    assert float(grid[density[0].argmax()]) == pytest.approx(1, abs=0.02)


def test_an_operator_of_one_eigenvalue() -> None:
    grid, density = of(torch.zeros(1, 8, 8, dtype=F64), starts=2, steps=3).curve(points=101)
    assert float(torch.trapezoid(density[0], grid)) == pytest.approx(1, abs=0.01)
    assert float(grid[density[0].argmax()]) == pytest.approx(0, abs=1e-3)
