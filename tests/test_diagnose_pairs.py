"""Diagnostics that hold attack against attack, on models where one kind of attack is known to be blind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robeval.core import catalogue
from robeval.core.ball import Ball
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.diagnose.corruptions import CORRUPTIONS
from robeval.diagnose.evidence import by_gradients, is_black_box, whole_box
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, FAILED, NOT_RUN, WARNING, Finding
from robeval.diagnose.guesses import guess
from robeval.diagnose.subject import Subject
from robeval.evaluate.attacking import attack_run
from robeval.evaluate.settings import Settings
from robeval.store.runstore import RunStore
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


def without_gradient(x: Tensor) -> Tensor:
    return x.detach() + 0 * x


def saturated(z: Tensor) -> Tensor:
    return 1e4 * z


def sources() -> list[Classifier]:
    return [problems.linear(4)[0]]


@pytest.mark.parametrize("level", ["quick", "standard"])
def test_a_linear_model_shows_no_sign(level: str) -> None:
    on = subject(level=level, surrogates=sources())
    for name in ("black-box-only", "loss-disagreement", "transfer", "random-noise", "corruption-baseline"):
        settings = {"queries": 200} if name == "black-box-only" else {}
        result = found(name, on, **settings)
        assert result.result == CLEAR, (name, result.measured)


def test_black_boxes_see_what_a_missing_gradient_hides() -> None:
    on = subject(without_gradient, surrogates=sources(), eps=0.2)
    result = found("black-box-only", on, queries=200, draws=20)
    assert result.result == FAILED
    assert result.data["only"] == len(result.flagged) > 5
    assert set(result.flagged) <= {on.images.ids[c.position].item() for c in on.found}
    assert result.interval is not None
    assert result.interval[0] < result.data["only"] / 24 <= result.interval[1]


def test_a_masked_cross_entropy_shows_although_the_margin_makes_up_for_it() -> None:
    on = subject(after=saturated, surrogates=sources(), eps=0.2)
    result = found("black-box-only", on, queries=200, draws=20)
    assert result.data["only"] == 0
    assert result.data["lead_points"] > 15
    assert result.result == FAILED
    losses = found("loss-disagreement", on)
    assert losses.result == FAILED
    assert losses.data["accuracy"]["margin"] < losses.data["accuracy"]["ce"] - 15
    broken = losses.data["broken_by_row_not_column"]
    assert broken["margin"]["ce"] > 3
    assert broken["margin"]["margin"] == 0
    carried = found("transfer", on)
    assert carried.result == FAILED
    assert "ce" in carried.why
    assert found("random-noise", subject(after=saturated, eps=0.35)).result == WARNING


def test_transfer_from_the_model_inside_beats_a_hidden_gradient_and_needs_a_source() -> None:
    blind = found("transfer", subject(without_gradient, surrogates=sources(), eps=0.2))
    assert blind.result == FAILED
    assert len(blind.flagged) > 5
    assert found("transfer", subject()).result == NOT_RUN


def test_noise_fails_what_no_gradient_attack_broke() -> None:
    on = subject(without_gradient, eps=0.4)
    result = found("random-noise", on, draws=40)
    assert result.result == FAILED
    assert result.flagged
    assert result.data["draws"] == 40
    assert len(on.found) >= len(result.flagged)
    assert found("random-noise", subject(without_gradient, eps=1e-4)).result == CLEAR


def test_levels_draw_more() -> None:
    drawn = [found("random-noise", subject(eps=0.01, level=level)).data["draws"] for level in ("quick", "standard")]
    assert drawn == [150, 1000]


def test_guesses_are_judged_one_after_the_other_and_each_image_falls_once() -> None:
    on = subject(eps=0.2)
    images = on.correct(24)
    away = (images.x - 0.2).clamp(0, 1)
    outside = (images.x + 0.4).clamp(0, 1)
    hit = guess(on, images, [("outside", outside), ("away", away), ("again", away)], "test")
    wrong = on.model.logits(away).argmax(1) != images.y
    assert wrong.any()
    assert not hit["outside"].any()  # misclassified or not, it is no point of the ball
    assert hit["away"].tolist() == wrong.tolist()
    assert not hit["again"].any()


def stored_run(folder: Path, *texts: str) -> RunStore:
    """A run of some attacks on the plain linear model."""
    model, these = problems.linear(4)
    specs = [catalogue.parse("attacks", text) for text in texts]
    return attack_run(model, these, Settings(specs, "linf", [0.2], each=True), root=str(folder))


def one(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "label": name, "settings": settings}


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["pgd:steps=2", "apgd-ce:steps=2", "square:queries=2"], WARNING),
        (["pgd:steps=2", "apgd-dlr:steps=2"], CLEAR),
        (["pgd:steps=2", "fab:steps=2"], CLEAR),
        (["square:queries=2"], CLEAR),
        ([], CLEAR),
    ],
)
def test_a_report_with_one_loss_warns_on_an_honest_model(texts: list[str], expected: str, tmp_path: Path) -> None:
    stores = [stored_run(tmp_path, *texts)] if texts else []
    assert found("loss-disagreement", subject(stores=stores)).result == expected


@pytest.mark.parametrize(
    "more, texts, expected",
    [
        (1, ["pgd:steps=2"], WARNING),
        (3, ["pgd:steps=2"], FAILED),
        (3, ["pgd:steps=2", "apgd-dlr:steps=2"], WARNING),
        (5, ["pgd:steps=2", "apgd-dlr:steps=2"], FAILED),
    ],
)
def test_a_report_with_one_loss_fails_where_losses_disagree(
    more: int, texts: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The targeted margin breaks so many images of about 25 more than cross-entropy does."""
    on = subject(stores=[stored_run(tmp_path, *texts)])
    n = len(on.correct(1000))
    assert 20 <= n <= 36
    none, some = torch.zeros(n, dtype=torch.bool), torch.arange(n) < more
    hits = {"ce": none, "margin": none, "dlr": none, "targeted": some}
    monkeypatch.setattr("robeval.diagnose.methods.loss_disagreement.by_loss", lambda subject, images: hits)
    assert found("loss-disagreement", on).result == expected


def test_black_box_methods_of_a_manifest() -> None:
    assert is_black_box(one("square"))
    assert is_black_box(one("pgd", loss="ce") | {"crafted_on": {"name": "other"}})
    assert not is_black_box(one("pgd", loss="ce"))
    assert not is_black_box(one("torchattacks:PGD"))


def test_stored_successes_count_on_the_side_of_their_access(tmp_path: Path) -> None:
    blind = subject(without_gradient, eps=0.2)
    run = stored_run(tmp_path, "pgd:steps=10", "square:queries=200")
    broken = set(run.frame().query("attack == 'pgd:steps=10' and success")["index"])
    assert broken
    helped = Subject(blind.model, blind.images, "linf", 0.2, 0, stores=[run])
    seen = by_gradients(helped, helped.images)
    own = by_gradients(blind, blind.images)  # what random starts find
    assert set(helped.images.ids[seen].tolist()) == broken | set(blind.images.ids[own].tolist())
    assert seen.sum() > own.sum()


def test_a_hard_label_attack_breaks_survivors_of_a_hidden_gradient() -> None:
    result = found("hard-label", subject(without_gradient, eps=0.2), queries=300)
    assert result.result == FAILED
    assert min(result.data["distance"]) < 0.2
    assert found("hard-label", subject(eps=0.01), queries=100).result == CLEAR
    assert found("hard-label", subject(eps=1.0)).result == DOES_NOT_APPLY  # nobody survives
    assert found("hard-label", subject(eps=1.0, norm="l1")).result == DOES_NOT_APPLY


def test_corruptions_inside_the_ball_count() -> None:
    result = found("corruption-baseline", subject(without_gradient, eps=0.3))
    assert result.result == FAILED
    assert result.data["inside_percent"]["brightness"] == 100
    assert found("corruption-baseline", subject(without_gradient, eps=0.01)).data["inside_percent"]["brightness"] == 0


@pytest.mark.parametrize("function", list(CORRUPTIONS), ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
def test_corruptions_grow_with_severity_and_stay_with_their_image(
    function: Callable[[Tensor, float, Streams], Tensor], shape: tuple[int, ...]
) -> None:
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    ids = [3, 1, 4, 2]
    sizes = []
    for constant in CORRUPTIONS[function]:
        out = function(x, constant, Streams(0, ids, "test"))
        assert out.shape == x.shape
        assert out.isfinite().all()
        alone = function(x[2:3], constant, Streams(0, [4], "test"))
        torch.testing.assert_close(alone, out[2:3])
        sizes.append(float((out - x).norm()))
    assert sizes[0] < sizes[-1]
    assert sizes[-1] > 0


def test_grey_images_keep_their_grey_under_blur_and_contrast() -> None:
    grey = torch.full((2, 3, 8, 8), 0.4)
    rng = Streams(0, [0, 1], "test")
    for function in CORRUPTIONS:
        if function.__name__ in ("gaussian_blur", "defocus_blur", "contrast", "pixelate"):
            torch.testing.assert_close(function(grey, CORRUPTIONS[function][-1], rng), grey)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_whole_box_lies_in_its_ball(norm: str) -> None:
    black, white = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    radius = whole_box(norm, 16)
    assert bool(Ball(norm, radius).contains(black, white))
    assert not bool(Ball(norm, 0.99 * radius).contains(black, white))
