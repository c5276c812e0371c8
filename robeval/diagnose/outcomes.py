"""What attacks of a diagnosis do to images, and the verdict on candidates from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.core.ball import ABS, REL, Ball, vector_norm
from robeval.core.catalogue import Spec
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.engine.backend import Backend
from robeval.engine.judge import Outcome as Decided
from robeval.engine.verdict import judge_points
from robeval.evaluate.transferring import craft, insist_on_transferable

NORMS = ("linf", "l2", "l1", "l0")


def reach(eps: float) -> float:
    """Largest distance that counts as within eps: the tolerance of every verdict."""
    return eps * (1 + REL) + ABS


@dataclass(frozen=True)
class Outcome:
    """What an attack did to some images, in their order.

    Args:
        broken: (n,) bool, an adversarial image within eps was found and judged independently.
        x_adv: (n, C, H, W), that image; the clean one where none was found.
        distance: (n,) of it in the attack's norm; inf where none was found.
        margin: (n,) true logit minus best other logit at it, else the smallest seen.
        error: (n,) bool, the model gave no finite answer, so that the image is not evaluated.
        forwards: (n,) passes that each image cost when it was attacked.
        backwards: (n,) likewise.
    """

    broken: Tensor
    x_adv: Tensor
    distance: Tensor
    margin: Tensor
    error: Tensor
    forwards: Tensor
    backwards: Tensor


@dataclass(frozen=True)
class Counterexample:
    """An adversarial image that a diagnostic found on an image which no stored attack had broken."""

    position: int
    how: str
    decided: Decided


def judged(backend: Backend, images: Images, points: Tensor, ball: Ball) -> list[Decided]:
    """The verdict on candidates from elsewhere: for each image the first that stands.

    Shapes:
        points (n, tries, C, H, W).
    Cost:
        2 forward passes per candidate.
    """
    tries = points.shape[1]
    rows = torch.arange(len(images), device=images.x.device).repeat_interleave(tries)
    x0, goal, flat = images.x[rows], Untargeted(images.y[rows]), points.flatten(0, 1)
    verdict = judge_points(backend, x0, flat, goal, ball)
    decided = []
    for k in range(len(images)):
        mine = slice(k * tries, (k + 1) * tries)
        first, success = int(verdict.adversarial[mine].int().argmax()), bool(verdict.adversarial[mine].any())
        at = k * tries + first
        change = (flat[at].double() - x0[at].double())[None]
        seen = verdict.margin[mine].double().masked_fill(~verdict.evaluable[mine], math.inf)
        decided.append(
            Decided(
                k,
                success=success,
                prediction=int(verdict.prediction[at] if success else images.y[k]),
                margin=float(verdict.margin[at] if success else seen.amin()),
                attempt=first if success else -1,
                iterations=tries,
                forwards=2 * tries,
                backwards=0,
                first_success_forward=2 * first + 1 if success else -1,
                survives_8bit=success and bool(verdict.survives_8bit[at]),
                distances={n: float(vector_norm(change, n)) if success else math.inf for n in NORMS},
                example=flat[at].clone() if success else None,
                error="" if verdict.evaluable[mine].all() else "the model gave NaN or Inf logits under attack",
            )
        )
    return decided


def carried(spec: Spec, images: Images, ball: Ball, target: Backend, source: Classifier, seed: int) -> list[Decided]:
    """Craft on another model, at full length, and judge on the target.

    Raises:
        UsageError: an attack without a last point to carry over.
    """
    insist_on_transferable([spec])
    decided: list[Decided] = []
    for rows in torch.arange(len(images), device=images.x.device).split(target.capacity):
        part = images[rows]
        points = craft(spec, part.to(source.device), ball, Backend(source, target.capacity), seed=seed)
        decided += judged(target, part, points.to(images.x.device), ball)
    return decided


def gathered(images: Images, decided: Sequence[Decided], norm: str, eps: float) -> Outcome:
    """The verdicts as tensors; a search for the nearest point has broken an image when that point lies within eps."""
    device, x_adv = images.x.device, images.x.clone()
    distance = torch.tensor([one.distances[norm] for one in decided], dtype=torch.float64, device=device)
    found = torch.tensor([one.success for one in decided], dtype=torch.bool, device=device)
    for k, one in enumerate(decided):
        if one.example is not None:
            x_adv[k] = one.example
    return Outcome(
        broken=found & (distance <= reach(eps)),
        x_adv=x_adv,
        distance=distance,
        margin=torch.tensor([one.margin for one in decided], dtype=torch.float64, device=device),
        error=torch.tensor([bool(one.error) for one in decided], dtype=torch.bool, device=device),
        forwards=torch.tensor([one.forwards for one in decided], dtype=torch.int64, device=device),
        backwards=torch.tensor([one.backwards for one in decided], dtype=torch.int64, device=device),
    )
