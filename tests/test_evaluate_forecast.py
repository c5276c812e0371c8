"""What a run may cost is told before it starts, and is what it costs when every image holds out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robeval.core.ball import Ball
from robeval.core.catalogue import parse
from robeval.core.choosing import for_classes
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.engine.backend import Backend
from robeval.engine.run import run
from robeval.evaluate.forecast import forecast, rehearse
from robeval.evaluate.settings import Settings, plan, searches_nearest
from tests.problems import images


class Unmoved(nn.Module):
    """Class 0 by far, everywhere, with gradients that are not zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tiny = 1e-3 * x.flatten(1)
        return torch.stack([50 + tiny.sum(1), tiny[:, 0], tiny[:, 1], tiny[:, 2], tiny[:, 3]], 1)


def unbreakable() -> tuple[Classifier, Images]:
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Classifier(Unmoved(), 5), images(x, torch.zeros(6, dtype=torch.int64), 5)


@pytest.mark.parametrize(
    "text", ["fgsm", "pgd:steps=7,restarts=3", "apgd-ce:steps=20", "apgd-t:steps=15", "fab-t:steps=6",
             "square:queries=90,lookahead=1", "noise:draws=3", "apgd-ce:samples=4,steps=10"]
)  # fmt: skip
def test_a_rehearsal_tells_what_an_image_costs_that_stands_to_the_end(text: str) -> None:
    model, these = unbreakable()
    spec = for_classes(parse("attacks", text), 5)
    clean = model.logits(these.x)
    ball = Ball("linf", math.inf if searches_nearest(spec) else 0.02)
    told = rehearse(spec, these, clean, ball)
    outcomes = list(run(plan(spec), these, Untargeted(these.y), ball, Backend(model, 32), clean=clean))
    assert not any(o.success for o in outcomes)
    assert all(o.backwards == told.backwards for o in outcomes)
    # Square skips proposals that change nothing, so that it may cost less than told.
    assert all(0.4 * told.forwards <= o.forwards <= told.forwards for o in outcomes)
    if not text.startswith("square"):
        assert all(o.forwards == told.forwards for o in outcomes)


def test_the_forecast_of_a_run() -> None:
    model, these = unbreakable()
    specs = [parse("attacks", "fgsm"), parse("attacks", "pgd:steps=4")]
    backend = Backend(model, 16)
    told = forecast(Settings(specs, "linf", [0.01, 0.02]), these, model.logits(these.x), backend)
    assert (told.forwards, told.backwards) == (2 + 5, 1 + 4)
    assert backend.counts.forwards == 0  # its own passes are not the run's
    alone = told.seconds_forward * 2 + told.seconds_backward * 5
    assert told.seconds == pytest.approx(6 * 2 * alone)
    assert "about 7 forward and 5 backward passes" in str(told)
