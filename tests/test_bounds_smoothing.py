"""Randomised smoothing against published figures and the closed form of linear networks."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from robeval.bounds.expansion import Reading
from robeval.bounds.smoothing import lower_confidence, smoothing, votes
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.images import Images
from robeval.core.streams import Streams
from tests.problems import exact_distance, images, linear, network


def rng(ids: list[int], number: int) -> Streams:
    return Streams(0, ids, "smoothing", [number] * len(ids))


def facts(readings: list[Reading]) -> list[tuple[float, float, int, str]]:
    return [(r.radius, r.p_lower, r.samples, r.status) for r in readings]


@pytest.mark.parametrize(
    "hits, trials, ratio", [(100_000, 100_000, 3.8115), (99_990, 100_000, 3.4902), (990, 1000, 1.9780)]
)
def test_published_radii_over_sigma(hits: int, trials: int, ratio: float) -> None:
    p = lower_confidence(torch.tensor([hits]), trials, 0.001)
    assert float(torch.special.ndtri(p)) == pytest.approx(ratio, abs=5e-5)


def test_the_limit_at_its_ends_and_its_level() -> None:
    p = lower_confidence(torch.tensor([0, 50, 1000]), 1000, 0.01)
    assert float(p[0]) == 0
    assert float(p[2]) == pytest.approx(0.01 ** (1 / 1000), rel=1e-12)
    # At the limit, so many hits or more have exactly the chance alpha.
    assert stats.binom.sf(49, 1000, float(p[1])) == pytest.approx(0.01, rel=1e-9)


def test_a_network_that_never_changes_its_mind_reaches_the_ceiling() -> None:
    always = Classifier(lambda x: torch.tensor([0.0, 1.0]).expand(len(x), 2), 2)
    these = images(torch.rand(3, 1, 4, 4), torch.tensor([1, 1, 0]), 2)
    readings = smoothing(always, these, "l2", rng, sigma=0.5, n=1000)
    ceiling = 0.5 * float(stats.norm.ppf(0.001 ** (1 / 1000)))
    assert [r.radius for r in readings] == pytest.approx([ceiling, ceiling, 0])
    assert [r.prediction for r in readings] == [1, 1, 1]
    assert all(
        (r.confidence, r.forwards, r.samples, r.domain) == (0.999, 1100, 1000, "smoothed classifier") for r in readings
    )
    in_linf = smoothing(always, these, "linf", rng, sigma=0.5, n=1000)
    assert in_linf[0].radius == pytest.approx(ceiling / 4)


def test_the_radius_of_a_linear_network_is_its_distance_within_the_confidence() -> None:
    model, these = linear(2, rows=12)
    exact = exact_distance(model, these, "l2")
    sigma = float(exact.median())
    readings = smoothing(model, these, "l2", rng, sigma=sigma, n=20_000, alpha=1e-4)
    found = torch.tensor([r.radius for r in readings], dtype=torch.float64)
    near = exact < 2.5 * sigma  # further away n votes cannot tell
    assert (found <= exact).all()  # each with chance 1 - 1e-4
    assert near.sum() >= 6
    assert (found[near] >= exact[near] - 0.15 * sigma).all()


def test_the_limit_covers_the_truth_as_often_as_it_says() -> None:
    model, these = linear(2, rows=1)
    truth = float(stats.norm.cdf(1.0))
    sigma = float(exact_distance(model, these, "l2")[0])  # the distance is one sigma
    ids, many = torch.arange(1000), these.x.expand(1000, -1, -1, -1)
    same = Images(many, these.y.expand(1000), ids, "same", these.classes)
    hits = votes(model, same, rng, 1, 200, sigma, 4096)[:, int(these.y[0])]
    wrong = int((lower_confidence(hits, 200, 0.1) > truth).sum())
    assert stats.binom.cdf(wrong, 1000, 0.1) < 0.9999  # not more often than alpha
    assert wrong > 40  # and the limit is not idle


def test_an_image_on_the_boundary_is_abstained_on() -> None:
    coin = Classifier(lambda x: torch.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], 1), 2)
    these = images(torch.full((2, 1, 1, 2), 0.5), torch.tensor([0, 1]), 2)
    for r in smoothing(coin, these, "l2", rng, n=500):
        assert (r.status, r.radius) == ("abstain", 0)
        assert r.p_lower <= 0.5


@pytest.mark.parametrize("target", [None, 0.1])
def test_noise_belongs_to_the_image(target: float | None) -> None:
    model, these = network(rows=6)
    whole = smoothing(model, these, "l2", rng, 1024, n=700, target=target, sigma=0.1)
    for size in (1, 300):
        assert facts(smoothing(model, these, "l2", rng, size, n=700, target=target, sigma=0.1)) == facts(whole)
    turned = torch.arange(6).flip(0)
    assert facts(smoothing(model, these[turned], "l2", rng, 300, n=700, target=target, sigma=0.1)) == facts(whole)[::-1]
    other = smoothing(model, these, "l2", lambda i, k: Streams(1, i, "smoothing", [k] * len(i)), n=700, sigma=0.1)
    assert [r.loss_value for r in other] != [r.loss_value for r in whole]


def test_chosen_and_counted_votes_are_fresh_and_unclipped() -> None:
    seen: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)

    these = images(torch.zeros(1, 1, 4, 4), torch.tensor([0]), 2)
    smoothing(Classifier(spy, 2), these, "l2", rng, n0=100, n=100, sigma=0.25)
    first, second = torch.cat(seen).flatten(1).split(100)
    assert not torch.equal(first, second)
    assert float(torch.cat([first, second]).std()) == pytest.approx(0.25, rel=0.05)  # clipping would leave half of it


def test_stopping_early_shares_alpha_among_the_looks() -> None:
    always = Classifier(lambda x: torch.tensor([0.0, 1.0]).expand(len(x), 2), 2)
    these = images(torch.rand(1, 1, 4, 4), torch.tensor([1]), 2)
    (r,) = smoothing(always, these, "l2", rng, sigma=0.5, n=8000, target=0.9, looks=4)
    assert r.samples == 1000  # the first look of 1000, 2000, 4000, 8000 suffices
    assert r.radius == pytest.approx(0.5 * float(stats.norm.ppf((0.001 / 4) ** (1 / 1000))))
    (r,) = smoothing(always, these, "l2", rng, sigma=0.5, n=8000, target=1.6, looks=4)
    assert r.samples == 8000
    assert r.forwards == 8100


@pytest.mark.parametrize(
    "settings",
    [{"sigma": 0.0}, {"n": 0}, {"n0": 0}, {"alpha": 1.0}, {"target": 0.0}, {"looks": 0}, {"sigma": math.nan}],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    model, these = linear(2, rows=1)
    with pytest.raises(UsageError, match="must"):
        smoothing(model, these, "l2", rng, **settings)  # type: ignore[arg-type]


def test_nan_logits_are_refused() -> None:
    these = images(torch.rand(1, 1, 4, 4), torch.tensor([0]), 2)
    with pytest.raises(ContractBroken, match="NaN logits"):
        smoothing(Classifier(lambda x: x.flatten(1)[:, :2] * math.nan, 2), these, "l2", rng, n=10)
