"""Diagnostics of gradients on models whose gradients are known by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, FAILED, WARNING, Finding
from robeval.diagnose.subject import Subject
from tests import problems

EPS = 0.1


def subject(
    before: Callable[[Tensor], Tensor] = lambda x: x,
    after: Callable[[Tensor], Tensor] = lambda z: z,
    *,
    norm: str = "linf",
    rows: int = 24,
    **more: Any,
) -> Subject:
    """A linear model with something before and after it, and images that the whole classifies correctly."""
    model, these = problems.linear(4, rows=rows)
    net = model.module
    whole = Classifier(lambda x: after(net(before(x))), 4)
    y = whole.logits(these.x).argmax(1)
    return Subject(whole, Images(these.x, y, these.ids, these.name, these.classes), norm, EPS, 0, **more)


def found(name: str, on: Subject, **settings: Any) -> Finding:
    return catalogue.find("diagnostics", name).load()(on, **settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_linear_model_shows_no_sign(norm: str) -> None:
    on = subject(norm=norm)
    for name in ("zero-gradient", "nonzero-elements", "graph", "finite-differences", "gradient-norms", "confidence"):
        assert found(name, on).result == CLEAR, name
    assert found("finite-differences", on).data["median"] < 1e-6


def test_zero_gradients_are_counted_loss_by_loss() -> None:
    on = subject(after=lambda z: 1e4 * z)
    result = found("zero-gradient", on)
    assert result.result == FAILED
    assert result.data["zero"]["ce"] > 0.8 * 24
    assert result.data["zero"]["margin"] == result.data["zero"]["dlr"] == 0
    assert "margin" in result.what_to_do
    assert set(result.flagged) <= set(on.images.ids.tolist())
    assert len(result.flagged) == result.data["zero"]["ce"]


def test_one_image_without_gradient_warns_and_a_share_fails() -> None:
    def dead(x: Tensor) -> Tensor:
        """Images whose first pixel carries the mark have no gradient."""
        return torch.where(x[:, :1, :1, :1] > 0.9, x.detach(), x)

    def marked(count: int) -> Finding:
        on = subject(before=dead, rows=200)
        x = on.images.x.clone()
        x[:count, 0, 0, 0] = 1.0
        y = on.model.logits(x).argmax(1)
        images = Images(x, y, on.images.ids, "marked", on.images.classes)
        return found("zero-gradient", Subject(on.model, images, "linf", 0.01, 0))

    assert [marked(k).result for k in (0, 1, 3, 12)] == [CLEAR, WARNING, WARNING, FAILED]
    assert marked(3).data["zero"]["margin"] == 3


def test_missing_elements_warn_unless_they_come_back_off_the_image() -> None:
    half = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    half[..., 2:] = 0
    gone = found("nonzero-elements", subject(before=lambda x: half * x))
    assert gone.result == WARNING
    assert "50.0 % at the images, 50.0 %" in gone.measured
    # A gradient that is missing on one shade of grey is there at a random start.
    on = subject(before=lambda x: torch.where(x == 0.5, x.detach(), x))
    x = on.images.x.clone()
    x[..., 2:] = 0.5
    grey = Images(x, on.model.logits(x).argmax(1), on.images.ids, "grey", on.images.classes)
    again = found("nonzero-elements", Subject(on.model, grey, "linf", EPS, 0))
    assert "50.0 % at the images, 100.0 %" in again.measured
    assert again.result == CLEAR


@pytest.mark.parametrize(
    "before, after, operation",
    [
        (Tensor.detach, lambda z: z, "detach"),
        (lambda x: x, lambda z: nn.functional.one_hot(z.argmax(1), 4).double(), "argmax"),
        (lambda x: x.sign().bool().double(), lambda z: z, "bool"),
    ],
)
def test_the_operation_that_cuts_the_graph_is_named(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], operation: str
) -> None:
    on = subject(before, after)
    result = found("graph", on)
    assert result.result == FAILED
    assert result.data["operation"] == operation
    assert found("zero-gradient", on).result == FAILED


def test_an_error_of_the_model_is_not_a_missing_gradient() -> None:
    on = subject()

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("disk on fire")

    on.classifier.module = fails
    with pytest.raises(RuntimeError, match="on fire"):
        found("graph", on)


def test_a_gradient_that_lies_fails_and_one_that_is_zero_where_the_margin_moves_too() -> None:
    def reversed_(x: Tensor) -> Tensor:
        return -x + (2 * x).detach()  # the value of x, the gradient of -x

    lying = found("finite-differences", subject(before=reversed_))
    assert lying.result == FAILED
    assert lying.data["median"] == pytest.approx(2)
    steps = found("finite-differences", subject(before=lambda x: (20 * x).round() / 20))
    assert steps.result == FAILED
    assert steps.data["zero_but_moving"] == 24
    slanted = found("finite-differences", subject(before=lambda x: 1.25 * x - (0.25 * x).detach()))
    assert slanted.result == WARNING
    assert slanted.data["median"] == pytest.approx(0.2)


def test_a_constant_model_agrees_with_its_zero_gradient() -> None:
    still = found("finite-differences", subject(after=lambda z: 0 * z + torch.arange(4.0)))
    assert still.result == CLEAR
    assert still.data["zero_but_moving"] == 0


def test_two_answers_of_a_randomised_model_are_not_a_slope() -> None:
    on = subject(before=lambda x: x + 0.1 * torch.randn_like(x))
    assert found("finite-differences", on).result == FAILED
    on.randomised = True
    assert found("finite-differences", on).result == DOES_NOT_APPLY


def test_norms_are_those_of_the_weights() -> None:
    on = subject()
    model, these = problems.linear(4)
    z = model.logits(these.x)
    weight = model.module[1].weight.detach()  # type: ignore[index]
    second = z.topk(2, 1).indices[:, 1]
    each = (weight[second] - weight[on.images.y]).norm(dim=1)
    assert found("gradient-norms", on).data["median"]["margin"]["l2"] == pytest.approx(float(each.median()), rel=1e-6)
    saturated = found("gradient-norms", subject(after=lambda z: 100 * z))
    assert saturated.result == WARNING
    assert saturated.data["ratio"] < 1e-6


def test_confidence_warns_only_when_it_never_falls() -> None:
    on = subject(after=lambda z: 1000 * z)
    assert found("confidence", on).result == WARNING
    assert min(found("confidence", on).data.values()) > 0.99
    assert found("confidence", subject(after=lambda z: 0.1 * z)).result == CLEAR


def test_a_linear_loss_has_no_gap_and_no_turn() -> None:
    # Two classes and a tiny slope: cross-entropy is as good as linear in the ball.
    flat = found("local-linearity", subject(after=lambda z: 1e-4 * z))
    assert max(flat.data["gamma"]) < 1e-6
    assert min(flat.data["cosine"]) > 1 - 1e-6
    bent = found("local-linearity", subject(before=lambda x: x + 0.05 * (200 * x).sin()))
    assert min(bent.data["gamma"]) > 1e-3
    assert sum(bent.data["cosine"]) / 24 < 0.8
    assert flat.result == bent.result == DOES_NOT_APPLY


def test_noise_moves_a_steeper_model_as_much_as_its_margins_differ() -> None:
    one, steep = (found("unstable-predictions", subject(after=lambda z, s=s: s * z)) for s in (1, 50))
    assert one.result == DOES_NOT_APPLY
    assert one.data["mean"] == pytest.approx(steep.data["mean"], rel=1e-9)
    assert steep.data["spread"] == pytest.approx(50 * one.data["spread"], rel=1e-9)


def test_the_second_order_predicts_a_quadratic_loss() -> None:
    """With two classes a and b, z = (0, q(x)) and y = a, cross-entropy is softplus(q), nearly quadratic for small q."""
    on = subject(after=lambda z: 0.05 * z)
    told = found("taylor-tightness", on).data
    assert told["second"] < 0.1 * told["first"]
    assert told["second"] < 1e-3


def test_more_samples_say_the_same_with_less_noise() -> None:
    on = subject()
    said = found("regularizer-samples", on, samples=16)
    assert said.data["samples"] == [1, 2, 4, 8, 16]
    assert said.data["value"][-1] == pytest.approx(said.data["value"][-2], rel=0.3)
    assert said.data["relative_deviation"] > 0
    flat = found("regularizer-samples", subject(after=lambda z: 0 * z + torch.arange(4.0)), samples=4)
    # H = [[0, 0], [0, 1]]: the length of Hz is |z1|, whose mean is sqrt(2 / pi).
    kappa = (16 * EPS**2 + 1) / 2
    assert flat.data["value"][-1] == pytest.approx(kappa * (2 / torch.pi) ** 0.5, rel=0.25)
