"""Diagnostics of each attack on models where the attack is known to work, to fail, or to stop short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from robeval.core import catalogue
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, FAILED, NOT_RUN, WARNING, Finding
from robeval.diagnose.outcomes import Outcome
from robeval.diagnose.subject import Subject
from tests import problems


def subject(
    before: Callable[[Tensor], Tensor] = lambda x: x,
    after: Callable[[Tensor], Tensor] = lambda z: z,
    *,
    eps: float = 0.1,
    norm: str = "linf",
    **more: Any,
) -> Subject:
    """A linear model with something before and after it, and images that the whole classifies correctly."""
    model, these = problems.linear(4)
    net = model.module
    whole = Classifier(lambda x: after(net(before(x))), 4)
    y = whole.logits(these.x).argmax(1)
    return Subject(whole, Images(these.x, y, these.ids, these.name, these.classes), norm, eps, 0, **more)


def found(name: str, on: Subject, **settings: Any) -> Finding:
    return catalogue.find("diagnostics", name).load()(on, **settings)  # type: ignore[no-any-return]


def quantised(x: Tensor) -> Tensor:
    """Steps with the gradient that torch gives them: zero."""
    return (10 * x).round() / 10


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.4), ("l1", 1.5)])
def test_a_linear_model_shows_no_sign(norm: str, eps: float) -> None:
    on = subject(norm=norm, eps=eps)
    for name in ("iterative-beats-one-step", "eps-monotone", "unbounded-attack", "silent-success", "random-direction"):
        result = found(name, on)
        assert result.result == CLEAR, (name, result.measured)


def test_one_step_and_many_are_compared_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    on = subject()
    n = len(on.images)

    def pretended(self: Subject, text: str, images: Images, **how: Any) -> Outcome:
        broken = torch.zeros(n, dtype=torch.bool)
        broken[0 if "steps=1," in text else slice(1, n)] = True  # as many misses as finds
        if "steps=1," in text:
            broken[1] = True
        far = torch.zeros(n)
        return Outcome(broken, images.x, far, far, far > 1, far.long(), far.long())

    monkeypatch.setattr(Subject, "attack", pretended)
    result = found("iterative-beats-one-step", on)
    assert result.flagged == [100]
    assert result.data == {"one_step": 2, "steps": n - 1}
    assert result.result == FAILED  # 1 of 24: surely above 0.2 %
    big = Images(on.images.x.repeat(20, 1, 1, 1), on.images.y.repeat(20), torch.arange(480), "more", on.images.classes)
    n = 480
    assert found("iterative-beats-one-step", Subject(on.model, big, "linf", 0.1, 0, "standard")).result == WARNING


def test_a_gradient_that_helps_once_and_then_lies_fails() -> None:
    def honest_at_the_image_only(x: Tensor) -> Tensor:
        home = torch.isin(x.detach(), clean)
        return torch.where(home, x, 2 * x.detach() - x)

    clean = problems.linear(4)[1].x
    result = found("iterative-beats-one-step", subject(honest_at_the_image_only))
    assert result.result == FAILED
    assert result.data["one_step"] > result.data["steps"]


def test_too_few_steps_have_not_converged_and_many_have() -> None:
    short = found("steps-converge", subject(eps=0.15), steps=1)
    assert short.result == FAILED
    assert "ce" in short.why
    long = found("steps-converge", subject(eps=0.15), steps=10)
    assert long.result == CLEAR
    for loss in ("ce", "cw"):
        falling = short.data[loss]["accuracy"]
        assert falling == sorted(falling, reverse=True)
        assert long.data[loss]["accuracy"][-1] <= falling[-1]


def test_restarts_are_nested_and_never_judged() -> None:
    blind = subject(lambda x: x.detach() + 0 * x, eps=0.15)  # each restart is a new random point, no more
    result = found("restarts-converge", blind, restarts=8, steps=3)
    curve = result.data["accuracy"]
    assert result.data["restarts"] == [1, 2, 4, 8]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < curve[0]
    assert result.result == DOES_NOT_APPLY


def test_images_that_a_larger_ball_loses_are_carried_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = found("eps-monotone", subject(eps=0.1)).data
    assert honest["eps"] == [0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 1.0]
    assert honest["accuracy"] == sorted(honest["accuracy"], reverse=True)
    assert honest["accuracy"][-1] == 0

    def pretended(self: Subject, text: str, images: Images, *, eps: float, **how: Any) -> Outcome:
        broken = torch.zeros(len(images), dtype=torch.bool)
        broken[:lost] = eps == 0.05
        broken[12:] = eps >= 0.1
        far = torch.zeros(len(images))
        return Outcome(broken, images.x, far, far, far > 1, far.long(), far.long())

    monkeypatch.setattr(Subject, "attack", pretended)
    for lost, expected in ((0, CLEAR), (1, WARNING), (5, FAILED)):
        result = found("eps-monotone", subject(eps=0.1))
        assert result.result == expected
        assert result.flagged == list(range(100, 100 + lost))


def test_the_unbounded_attack_fails_on_the_margin_and_warns_on_cross_entropy() -> None:
    stuck = found("unbounded-attack", subject(quantised))
    assert stuck.result == FAILED
    assert stuck.data["cw"] == 24
    assert stuck.data["cw+start"] < 24  # the start is a random image and hides the fault
    saturated = found("unbounded-attack", subject(after=lambda z: 1e4 * z))
    assert saturated.result == WARNING
    assert saturated.data["cw"] == 0
    assert saturated.data["ce"] > 0
    assert "margin" in saturated.what_to_do


def test_successes_on_the_way_are_kept_by_the_engine() -> None:
    # Misclassified in a thin shell only, which the attack crosses on its way and leaves behind.
    def shell(x: Tensor) -> Tensor:
        wave = 3 * (25 * (x - 0.5)).sin().abs()
        return x + 0.2 * wave

    kept = found("silent-success", subject(shell, eps=0.3))
    assert kept.result == CLEAR
    assert kept.data["undone"] > 0


def test_an_engine_that_forgets_a_success_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    on, real = subject(), Subject.attack

    def forgetful(self: Subject, text: str, images: Images, **how: Any) -> Outcome:
        said = real(self, text, images, **how)
        said.broken[int(said.broken.int().argmax())] = False
        return said

    monkeypatch.setattr(Subject, "attack", forgetful)
    result = found("silent-success", on)
    assert result.result == FAILED
    assert len(result.flagged) == 1


def test_a_path_that_still_climbs_is_counted_and_not_judged() -> None:
    on = subject(eps=0.02)
    done = found("incomplete-optimisation", on)
    assert done.result == DOES_NOT_APPLY
    assert done.data["survivors"] > 0
    assert done.data["moving"] == 0
    assert len(done.data["loss"]) == 41
    torch.manual_seed(0)  # records of a noisy loss fall at any step
    climbs = found("incomplete-optimisation", subject(lambda x: x + 0.01 * torch.randn_like(x), eps=0.005))
    assert climbs.data["moving"] > 0


def test_images_of_the_model_itself_never_fail_to_transfer_and_there_must_be_a_source() -> None:
    model, _ = problems.linear(4)
    itself = found("transfer-failure", subject(surrogates=[model]))
    assert itself.data == {"model": 0.0}
    other, _ = problems.linear(4, seed=5)
    assert found("transfer-failure", subject(surrogates=[other])).data["model"] > 20
    assert found("transfer-failure", subject()).result == NOT_RUN


def test_a_gradient_no_better_than_noise_is_worthless() -> None:
    honest = found("random-direction", subject())
    assert honest.result == CLEAR
    assert found("random-direction", subject(quantised)).result == FAILED
    assert found("random-direction", subject(after=lambda z: 1e4 * z)).data["worthless"] == ["ce"]
    # A ball so small that neither breaks anything: the gradient still comes closer.
    assert found("random-direction", subject(eps=1e-4)).result == CLEAR
    # A ball so large that both break everything says nothing.
    assert found("random-direction", subject(eps=1.0)).result == CLEAR


def test_what_noise_finds_counts_as_a_counterexample() -> None:
    on = subject(quantised, eps=0.3)
    result = found("random-direction", on)
    assert result.flagged
    assert {on.images.ids[c.position].item() for c in on.found} >= set(result.flagged)


@pytest.mark.parametrize("name", ["silent-success", "incomplete-optimisation"])
def test_no_attack_walks_without_a_gradient(name: str) -> None:
    assert found(name, subject(Tensor.detach)).result == DOES_NOT_APPLY
