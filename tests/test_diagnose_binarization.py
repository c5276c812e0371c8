"""The binarization test: separators that are right, honest networks that meet the mark, scaled logits that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robeval.core.classifier import Classifier
from robeval.diagnose.binary import Heads, features_of, separators
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, FAILED, WARNING
from robeval.diagnose.methods.binarization import binarization
from robeval.diagnose.subject import Subject
from tests import planted


def subject(name: str, n: int = 20) -> Subject:
    return Subject(planted.model(name), planted.chosen(n), planted.NORM, planted.EPS, level="full")


@pytest.mark.parametrize("name", planted.HONEST)
def test_an_honest_network_meets_the_mark_at_both_scales(name: str) -> None:
    found = binarization(subject(name), inner=600)
    assert found.result == CLEAR
    assert min(found.data["found"].values()) >= 0.95 * found.data["fitted"]
    assert max(found.data["random"].values()) < 0.5 * found.data["fitted"]
    assert found.interval is not None and found.interval[0] < 1 and found.interval[1] == 1


def test_scaled_logits_fail_at_the_scale_of_the_model_and_only_there() -> None:
    found = binarization(subject("logits-x1000"), inner=600)
    assert found.result == FAILED
    assert found.data["found"]["width"] >= 0.95 * found.data["fitted"]
    assert found.data["found"]["adaptive"] <= 0.2 * found.data["fitted"]
    assert len(found.flagged) == found.data["fitted"] - found.data["found"]["adaptive"]


def test_a_margin_loss_finds_what_cross_entropy_misses_on_scaled_logits() -> None:
    assert binarization(subject("logits-x1000"), inner=600, attack="pgd:steps=40,loss=cw").result == CLEAR


@pytest.mark.parametrize("name", ["detached", "quantised"])
def test_a_gradient_that_does_not_exist_fails(name: str) -> None:
    assert binarization(subject(name), inner=600).result == FAILED


def test_few_inner_points_are_called_too_easy() -> None:
    found = binarization(subject("honest-standard"), inner=9)
    assert found.result == WARNING
    assert "random" in found.what_to_do


def test_models_without_a_dense_head_are_left_alone_with_the_reason() -> None:
    heads: list[tuple[nn.Module | object, str]] = [
        (nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), "no dense layer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Unflatten(1, (10, 2)), nn.AvgPool1d(2), nn.Flatten()), "20"),
        (nn.Sequential(nn.Flatten(2), nn.Linear(64, 10), nn.Flatten()), "(2, 1, 64)"),
        (lambda x: x.flatten(1)[:, :10], "function"),
    ]
    for module, reason in heads:
        classifier = Classifier(module, 10)
        found = binarization(Subject(classifier, planted.chosen(10), "linf", 0.1, level="full"))
        assert found.result == DOES_NOT_APPLY
        assert reason in found.why


def test_features_are_the_input_of_the_last_dense_layer() -> None:
    net = planted.standard()
    features, x = features_of(planted.model("logits-x1000"), planted.chosen(10).x), planted.chosen(10).x
    assert not isinstance(features, str)
    said, z = features(x)
    assert torch.equal(said, net[:-1](x)) and torch.equal(z, 1000 * net(x))


def test_separators_find_the_largest_gap_and_admit_when_there_is_none() -> None:
    inner = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    outer = torch.tensor([[[2.0, 2.0]], [[0.0, 0.5]]])
    w, fitted = separators(inner, outer, near=1e-4)
    assert fitted.tolist() == [True, False]
    assert w[0, 0].item() == pytest.approx(w[0, 1].item(), rel=1e-2)  # the nearest face is x + y = 1


@pytest.mark.parametrize("scale, width", [("width", 1.0), ("adaptive", 7.0)])
def test_heads_have_the_scale_that_was_asked_for(scale: str, width: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inner, outer = torch.randn(3, 40, 60, generator=generator), 3 + torch.randn(3, 1, 60, generator=generator)
    logits = torch.zeros(3, 41, 4)
    logits[:, 0, 0] = 7.0
    heads = Heads.fit(inner, outer, logits, 0.5).scaled(scale)
    everything = torch.cat([inner, outer], 1)
    z = torch.stack([heads.logits(everything[:, k], torch.arange(3)) for k in range(41)], 1)
    difference: Tensor = z[..., 1] - z[..., 0]
    assert heads.fitted.all()
    assert (difference[:, :40] < 0).all() and (difference[:, 40] > 0).all()
    assert torch.allclose(difference.amax(1) - difference.amin(1), torch.full((3,), width), rtol=1e-4)
