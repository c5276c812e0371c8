"""Local constants and CLEVER: shells, searches and fits against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from robeval.bounds.clever import clever
from robeval.bounds.clever_second import clever_second
from robeval.bounds.curvature import second_order_radius
from robeval.bounds.expansion import Reading
from robeval.bounds.local_c_bound import local_c_bound
from robeval.bounds.local_l_bound import local_l_bound
from robeval.bounds.neighbourhood import first_order_reach, into_ball, offsets, second_order_reach
from robeval.bounds.weibull import end_point
from robeval.core.ball import vector_norm
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.images import Images
from robeval.core.streams import Streams
from tests.problems import attack, exact_distance, images, linear, network

F64 = torch.float64
NORMS = ("linf", "l2", "l1")


def rng(ids: list[int], number: int) -> Streams:
    return Streams(0, ids, "test", [number] * len(ids))


def radii(readings: list[Reading]) -> Tensor:
    return torch.tensor([r.radius for r in readings], dtype=F64)


class Bowl(nn.Module):
    """Two logits, 0 and c |x - m|^2 / 2 - h: gradient norm c |x - m|, curvature c, boundary a sphere."""

    def __init__(self, c: float = 4.0, h: float = 0.5):
        super().__init__()
        self.c, self.h = c, h

    def forward(self, x: Tensor) -> Tensor:
        score = self.c * (x - 0.5).flatten(1).square().sum(1) / 2 - self.h
        return torch.stack([torch.zeros_like(score), score], 1)


def bowl(rows: int = 6) -> tuple[Classifier, Images, Tensor]:
    """Images inside the sphere, and their exact l2 distances to it."""
    direction = torch.randn(rows, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    out = torch.linspace(0.05, 0.3, rows, dtype=F64)
    x = 0.5 + direction / vector_norm(direction, "l2").view(-1, 1, 1, 1) * out.view(-1, 1, 1, 1)
    return Classifier(Bowl(), 2), images(x, torch.zeros(rows, dtype=torch.int64), 2), 0.5 - out


@pytest.mark.parametrize("norm", NORMS)
def test_draws_are_uniform_in_the_unit_ball(norm: str) -> None:
    d = offsets(norm, (1, 1, 3), 4000, rng, [1, 2], 0)
    length = vector_norm(d, norm)
    assert d.shape == (8000, 1, 1, 3)
    assert float(length.max()) <= 1 + 1e-6
    assert stats.kstest(length.double().numpy() ** 3, "uniform").pvalue > 0.01
    assert d.flatten(1).mean(0).abs().max() < 0.03
    again = offsets(norm, (1, 1, 3), 4000, rng, [2], 0)
    torch.testing.assert_close(again, d[4000:])


@pytest.mark.parametrize("norm", NORMS)
def test_points_are_brought_into_balls_of_their_own(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(40, 1, 4, 4, dtype=F64, generator=generator)
    x = x0 + torch.randn(40, 1, 4, 4, dtype=F64, generator=generator)
    eps = torch.linspace(0.0, 2.0, 40, dtype=F64)
    inside = into_ball(norm, x0, x, eps)
    assert ((inside >= 0) & (inside <= 1)).all()
    assert (vector_norm(inside - x0, norm) <= eps * (1 + 1e-9) + 1e-12).all()
    near = into_ball(norm, x0, x0 + 1e-3 * (0.5 - x0), torch.full((40,), 1.0, dtype=F64))
    torch.testing.assert_close(near, x0 + 1e-3 * (0.5 - x0))


def test_shells_integrate_step_functions() -> None:
    shells = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)
    slopes = torch.tensor([[1.0, 2.0, 4.0]], dtype=F64)
    for gap, r in ((0.5, 0.5), (1.0, 1.0), (2.0, 1.5), (3.0, 2.0), (5.0, 2.5), (7.0, 3.0), (99.0, 3.0), (0.0, 0.0)):
        assert float(first_order_reach(torch.tensor([gap], dtype=F64), shells, slopes)) == pytest.approx(r)
    one = torch.tensor([0.7], dtype=F64)
    c = torch.full((1, 3), 2.3, dtype=F64)
    whole = second_order_radius(one, one + 0.2, c[:, 0])
    assert float(second_order_reach(one, one + 0.2, shells / 5, c)) == pytest.approx(float(whole), rel=1e-12)
    # Slope 1 with curvature 0 up to 1, then 2: r + (r - 1)^2 = 1.75 at r = 1.5.
    c = torch.tensor([[0.0, 2.0, 2.0]], dtype=F64)
    assert float(second_order_reach(torch.tensor([1.75], dtype=F64), one / one, shells, c)) == pytest.approx(1.5)
    assert float(second_order_reach(torch.tensor([99.0], dtype=F64), one / one, shells, c)) == 3


@pytest.mark.parametrize("norm", NORMS)
def test_clever_and_the_local_bounds_are_exact_on_linear_models(norm: str) -> None:
    model, these = linear(4)
    exact = exact_distance(model, these, norm)
    for found in (
        clever(model, these, norm, rng, blocks=4, samples=4),
        clever_second(model, these, norm, rng, blocks=3, samples=2),
        local_l_bound(model, these, norm, rng),
        local_c_bound(model, these, norm, rng),
    ):
        torch.testing.assert_close(radii(found), exact, rtol=1e-9, atol=0)
        assert {r.domain for r in found} == {"ball"}
        assert all(r.reach >= r.radius * (1 - 1e-9) for r in found)
    first = clever(model, these, norm, rng, blocks=4, samples=4)
    assert [r.plain for r in first] == pytest.approx(exact.tolist(), rel=1e-9)
    assert all(math.isnan(r.p_value) and (r.blocks, r.samples) == (4, 4) for r in first)


def test_a_quadratic_bowl_has_one_curvature_and_growing_slopes() -> None:
    model, these, exact = bowl()
    second = local_c_bound(model, these, "l2", rng)
    torch.testing.assert_close(radii(second), exact, rtol=1e-6, atol=0)
    assert [r.constant for r in second] == pytest.approx([4.0] * 6, rel=1e-9)
    torch.testing.assert_close(radii(clever_second(model, these, "l2", rng)), exact, rtol=1e-6, atol=0)
    # The true L(s) is c (|x - m| + s), reached on the sphere of radius s, for images whose ball is inside the box.
    found = local_l_bound(model, these, "l2", rng, steps=30, shells=5)
    for r, away in list(zip(found, 0.5 - exact, strict=True))[-2:]:
        slopes = 4 * (away + r.reach * torch.arange(1, 6, dtype=F64) / 5)
        gap = torch.tensor([-r.loss_value], dtype=F64)
        shells = r.reach * torch.arange(1, 6, dtype=F64)[None] / 5
        assert r.constant == pytest.approx(float(slopes[-1]), rel=1e-3)
        assert r.radius == pytest.approx(float(first_order_reach(gap, shells, slopes[None])), rel=1e-3)


def test_more_search_never_finds_less() -> None:
    model, these, _ = bowl()
    few, many = (local_l_bound(model, these, "l2", rng, steps=s, samples=4) for s in (0, 8))
    assert all(a.constant <= b.constant and a.radius >= b.radius for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_local_estimates_of_a_network_stay_below_attacks(norm: str) -> None:
    model, these = network(rows=12)
    found = radii(local_l_bound(model, these, norm, rng, samples=16, rivals=4))
    reached = torch.tensor([o.distances[norm] for o in attack("deepfool", model, these, norm, math.inf)], dtype=F64)
    assert ((found <= reached) | reached.isinf()).all()
    assert (found > 0).all()


def test_top_2_of_the_local_bounds_is_no_smaller() -> None:
    model, these = linear(4)
    for method in (local_l_bound, clever):
        one, two = (radii(method(model, these, "l2", rng, top=t)) for t in (1, 2))
        assert (two >= one).all()
        assert (two > one * 1.01).any()


def test_kinks_are_refused_by_the_second_order() -> None:
    model, these = network(rows=3)
    for method in (local_c_bound, clever_second):
        with pytest.raises(ContractBroken, match="ReLU"):
            method(model, these, "l2", rng)


def test_a_ball_smaller_than_the_score_is_refused() -> None:
    model, these = linear(3)
    largest = float(exact_distance(model, these, "l2").max())
    with pytest.raises(UsageError, match="smaller than the score") as caught:
        clever(model, these, "l2", rng, radius=largest / 2, blocks=3, samples=3)
    assert f"radius={largest * 1.01:.3g}" in caught.value.do
    kept = clever(model, these, "l2", rng, radius=largest * 1.1, blocks=3, samples=3)
    assert all(r.reach == pytest.approx(largest * 1.1) for r in kept)


@pytest.mark.parametrize("shape", [0.2, 0.5])
def test_the_moments_find_the_end_point_of_a_reverse_weibull(shape: float) -> None:
    y = stats.weibull_max(1 / shape, loc=5.0, scale=1.0).rvs(4000, random_state=np.random.default_rng(0))
    end, p = end_point(y)
    assert end == pytest.approx(5.0, abs=0.15)
    assert end >= y.max()
    assert p > 0.01
    likely, _ = end_point(y, "likelihood")
    assert likely == pytest.approx(5.0, abs=0.15)


def test_fits_of_few_or_equal_maxima() -> None:
    assert end_point(np.array([2.0, 3.0]))[0] == 3.0
    end, p = end_point(np.full(20, 2.5))
    assert (end, math.isnan(p)) == (2.5, True)
    heavy = stats.genpareto(0.5).rvs(50, random_state=np.random.default_rng(0))  # no end point: the shape is held
    end, _ = end_point(heavy)
    assert heavy.max() <= end < 100 * heavy.max()


def test_a_score_is_below_that_of_the_largest_sample_alone() -> None:
    model, these, _ = bowl()
    found = clever(model, these, "l2", rng, blocks=10, samples=8)
    assert all(r.radius <= r.plain for r in found)
    assert any(r.radius < r.plain * 0.999 for r in found)
    assert all(0 <= r.p_value <= 1 for r in found)
