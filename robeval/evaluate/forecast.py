"""What a run costs if every image stands, told before it starts: passes by a rehearsal, time by one batch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import Spec
from robeval.core.goal import Goal, Untargeted, loss_named
from robeval.core.images import Images
from robeval.core.questions import Answer, Gradient, Logits, Proposals, Question
from robeval.core.streams import Streams
from robeval.engine.backend import Backend
from robeval.evaluate.settings import Settings, plan, searches_nearest

#: Images in the timed batch.
TIMED = 64
#: A rehearsal ends after so many questions; what an attack asks beyond is not foretold.
PATIENCE = 12_000


@dataclass(frozen=True)
class Cost:
    """Passes of one attack on one image that stands to the end, for all attempts.

    Args:
        label: The attack.
        forwards: Rows forward.
        backwards: Rows backward.
    """

    label: str
    forwards: int
    backwards: int


@dataclass(frozen=True)
class Forecast:
    """What a run costs if every image stands to the end; each one that falls makes it cheaper.

    Args:
        costs: One entry per attack that robeval drives itself.
        images: Images to attack, for each radius.
        radii: Number of radii at which fixed-eps attacks run.
        seconds_forward: Of one image forward.
        seconds_backward: Of one gradient, its forward pass included.
    """

    costs: list[Cost]
    images: int
    radii: int
    seconds_forward: float
    seconds_backward: float

    @property
    def forwards(self) -> int:
        """Forward passes an image."""
        return sum(c.forwards for c in self.costs)

    @property
    def backwards(self) -> int:
        """Backward passes an image."""
        return sum(c.backwards for c in self.costs)

    @property
    def seconds(self) -> float:
        """Model time of the whole run, if every image holds out at every radius."""
        alone = max(0, self.forwards - self.backwards) * self.seconds_forward
        return self.images * self.radii * (alone + self.backwards * self.seconds_backward)

    def __str__(self) -> str:
        return (
            f"about {self.forwards:,} forward and {self.backwards:,} backward passes for an image that stands, "
            f"{self.images * self.radii:,} image{'s' * (self.images * self.radii != 1)} times radii: "
            f"{_span(self.seconds)} if all of them stand, less for each one that falls"
        )


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def forecast(
    settings: Settings, images: Images, clean: Tensor, backend: Backend, *, count: int | None = None
) -> Forecast:
    """Passes and time of a run in which every image stands.

    Args:
        settings: What is going to run.
        images: The images to attack, or some of them; at least one.
        clean: (N, K), their logits.
        backend: Times one batch forward and one with gradients; its counts are left as they were.
        count: Number of images to attack, where ``images`` are only some of them.
    """
    radius = settings.radii[-1] if settings.radii else math.inf
    own = [s for s in settings.specs if s.method.kind == "attacks"]
    costs = [rehearse(s, images, clean, Ball(settings.norm, math.inf if searches_nearest(s) else radius)) for s in own]
    counts = backend.counts
    try:
        forward, backward = _times(backend, images)
    finally:
        backend.counts = counts
    return Forecast(costs, count or len(images), max(1, len(settings.radii)), forward, backward)


def rehearse(spec: Spec, images: Images, clean: Tensor, ball: Ball) -> Cost:
    """Drive an attack on one image against a model that never moves, and count its questions.

    The stand-in answers every point with the logits of the clean image and with gradients drawn at random. Where an
    attack leaves out questions by what it was told, as Square does for proposals that change nothing, the count is near
    but not exact.
    """
    planned = plan(spec)
    one = slice(0, 1)
    x0, z, goal = images.x[one], clean[one], Untargeted(images.y[one])
    rng = Streams(0, [0], "rehearsal", dtype=x0.dtype, device=x0.device)
    attack = planned.start(x0, goal, ball, rng)
    forwards = backwards = 0
    try:
        asked: Question = next(attack)
        for _ in range(PATIENCE):
            rows, gradients = _price(asked, x0, goal, z)
            forwards, backwards = forwards + rows, backwards + gradients
            asked = attack.send(_stand_in(asked, goal, z, rng))
        attack.close()
    except StopIteration as end:
        forwards += end.value is not None
    return Cost(spec.label, forwards * planned.attempts, backwards * planned.attempts)


def _price(asked: Question, x0: Tensor, goal: Goal, z: Tensor) -> tuple[int, int]:
    if isinstance(asked, Proposals):
        return int(asked.only.sum()), 0
    rows = 1 if asked.only is None else int(asked.only.sum())
    if isinstance(asked, Logits):
        return rows * (asked.points is not x0), 0
    loss = loss_named(asked.loss)(goal, z, *asked.args)
    return rows, rows * (1 if loss.dim() == 1 else loss.shape[1])


def _stand_in(asked: Question, goal: Goal, z: Tensor, rng: Streams) -> Answer:
    everyone, nothing = torch.ones_like(goal.margin(z), dtype=torch.bool), z.new_empty(0)
    if isinstance(asked, Proposals):
        logits = z.expand(*asked.only.shape, -1)
        none = torch.full_like(asked.rows, asked.only.shape[1])
        return Answer(logits, everyone, nothing, nothing, none)
    if not isinstance(asked, Gradient):
        return Answer(z, everyone, nothing, nothing)
    loss = loss_named(asked.loss)(goal, z, *asked.args)
    shape = asked.points.shape[1:] if loss.dim() == 1 else (loss.shape[1], *asked.points.shape[1:])
    return Answer(z, everyone, loss, rng.normal(*shape))


def _times(backend: Backend, images: Images) -> tuple[float, float]:
    """Seconds of one image forward, and of one image forward and backward."""
    rows = torch.arange(min(TIMED, backend.capacity), device=images.x.device) % len(images)
    goal = Untargeted(images.y[rows])
    timer = Backend(backend.classifier, backend.capacity)

    def seconds(question: Question) -> Iterator[float]:
        for _ in range(2):  # the first one warms up
            before = time.perf_counter()
            timer.evaluate(question, goal)
            if images.x.is_cuda:
                torch.cuda.synchronize()
            yield (time.perf_counter() - before) / len(rows)

    points = images.x[rows]
    forward = min(seconds(Logits(points)))
    try:
        return forward, min(seconds(Gradient(points, "ce")))
    except Exception:  # a model without gradients: the run says so, where it matters
        return forward, 3 * forward
