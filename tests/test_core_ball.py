"""Norms, projections and random points against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robeval.core.ball import DUAL, NORMS, Ball, project_l1, vector_norm
from robeval.core.errors import UsageError
from robeval.core.streams import Streams

RADII = {"linf": 0.03, "l2": 0.7, "l1": 3.0}


def rows(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    x = torch.rand(n, 3, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x[0], x[1] = 0, 1  # images in two corners of the box
    return x


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]), double=st.booleans())
@settings(max_examples=40, deadline=None)
def test_o65_projection_stays_in_ball_and_box(norm: str, seed: int, scale: float, double: bool) -> None:
    x0 = rows(6, torch.float64 if double else torch.float32, seed)
    ball = Ball(norm, RADII[norm])
    x = x0 + scale * torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=x0.dtype)
    projected = ball.project(x0, x)
    assert ball.contains(x0, projected).all()
    torch.testing.assert_close(ball.project(x0, projected), projected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("eps", [1e-6, 1 / 255, 8 / 255, 0.3])
def test_linf_projection_never_exceeds_eps_by_rounding(eps: float) -> None:
    x0 = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for x in (x0 + 1, x0 - 1):
        projected = Ball("linf", eps).project(x0, x)
        assert (projected.double() - x0.double()).abs().max() <= eps


def test_l1_projection_is_the_nearest_point() -> None:
    d = torch.tensor([[0.5, -0.2, 0.9], [0.1, 0.1, 0.1]], dtype=torch.float64)
    expected = torch.tensor([[0.3, 0.0, 0.7], [0.1, 0.1, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(project_l1(d, 1.0), expected)


@pytest.mark.parametrize(("norm", "dual"), DUAL.items())
def test_o29_dual_norm_is_the_largest_product(norm: str, dual: str) -> None:
    g = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ball = Ball(norm, 0.1)
    torch.testing.assert_close(ball.dual_norm(g), vector_norm(g, dual))
    best = ball.ascent(g)
    assert torch.allclose(ball.norm_of(best), torch.ones(4, dtype=torch.float64))
    if norm != "l1":  # in l1 the step is spread over 5 % of the entries, here a single one
        torch.testing.assert_close((best * g).flatten(1).sum(1), ball.dual_norm(g))


def test_ascent_of_tiny_and_zero_gradients() -> None:
    g = torch.zeros(2, 1, 2, 2)
    g[1, 0, 0, 0] = 1e-30
    step = Ball("l2", 1.0).ascent(g)
    assert step[0].abs().sum() == 0
    assert step[1, 0, 0, 0] == 1


def test_l1_ascent_leaves_out_pixels_at_the_box() -> None:
    x = torch.tensor([[[[1.0, 0.5]]]])
    g = torch.tensor([[[[9.0, 1.0]]]])
    assert Ball("l1", 1.0).ascent(g, x).flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("norm", NORMS)
def test_samples_fill_the_ball_and_surface_lies_on_it(norm: str) -> None:
    x0 = torch.full((2000, 1, 2, 2), 0.5, dtype=torch.float64)
    ball, rng = Ball(norm, 0.2), Streams(0, range(2000), "t", dtype=torch.float64)
    norms = ball.norm_of(ball.sample(x0, rng) - x0)
    assert norms.max() <= 0.2 * (1 + 1e-6)
    # In d dimensions a share r^d of a ball lies within r of its radius.
    assert abs(float((norms <= 0.1).double().mean()) - 0.5**4) < 0.02
    torch.testing.assert_close(
        ball.norm_of(ball.surface(x0, rng) - x0), torch.full((2000,), 0.2).double(), rtol=2e-6, atol=0
    )


def test_verdict_refuses_nan_box_and_distance() -> None:
    ball, x0 = Ball("linf", 0.1), torch.full((4, 1, 1, 1), 0.95)
    x = torch.tensor([math.nan, 1.01, 0.8, 0.86]).reshape(4, 1, 1, 1)
    assert ball.contains(x0, x).tolist() == [False, False, False, True]


def test_bad_balls_are_refused() -> None:
    for norm, eps in (("l3", 0.1), ("l2", -1.0), ("l2", math.nan)):
        with pytest.raises(UsageError):
            Ball(norm, eps)
