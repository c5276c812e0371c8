"""Is the gradient better than noise?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import diagnostic
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.diagnose.evidence import BY_LOSS, attacked
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding
from robeval.diagnose.slopes import IMAGES
from robeval.diagnose.subject import Subject


@diagnostic(
    id="K10",
    group=3,
    level="standard",
    images=256,
    question="gradient better than random directions?",
    limit="breaks more, or comes closer",
    source="robeval; a control in the spirit of Carlini et al. 2019, On Evaluating Adversarial Robustness,"
    " arXiv:1902.06705",
)
def random_direction(subject: Subject, *, steps: int = 40) -> Finding:
    """The attack once more with noise in the place of its gradient.

    An attack that breaks no more images than a walk of random steps of the same length, and comes no closer to the
    boundary on the rest, has a worthless gradient. Fails when that holds for cross-entropy and margin, warns for one.

    Args:
        steps: Random steps, as many as the attack's.

    Cost:
        ``steps`` forward passes per image, besides the shared attacks.
    Source:
        None; a control experiment.
    Departs:
        Where both break the same number of images, the median of the smallest margins decides.
    """
    images = subject.correct(IMAGES)
    walked, closest = _walk(subject, images, steps)
    told, worthless = [f"noise {int(walked.sum())}"], []
    for loss in ("ce", "margin"):
        said = attacked(subject, BY_LOSS[loss], images)
        more = int(said.broken.sum()) - int(walked.sum())
        alive = ~said.broken & ~walked
        nearer = bool(alive.any()) and float(said.margin[alive].median()) < float(closest[alive].median())
        told.append(f"{loss} {int(said.broken.sum())}")
        if more < 0 or (more == 0 and alive.any() and not nearer):
            worthless.append(loss)
    seen = bool(worthless)
    return Finding(
        FAILED if len(worthless) == 2 else WARNING if seen else CLEAR,
        measured=", ".join(told) + f" of {len(images)} broken",
        limit="breaks more, or comes closer",
        n_images=len(images),
        flagged=images.ids[walked].tolist() if seen else (),
        what_to_do="attack with a loss that has a useful gradient, or without gradients; innocent cause: every image"
        " breaks under noise"
        if seen
        else "",
        why=f"random steps do as well as the gradient of {', '.join(worthless)}" if seen else "",
        data={"worthless": worthless},
    )


def _walk(subject: Subject, images: Images, steps: int) -> tuple[Tensor, Tensor]:
    """A walk of random steps: the images that it broke, and the smallest margin of each. -> (n,) bool, (n,)."""
    ball, goal = Ball(subject.norm, subject.eps), Untargeted(images.y)
    rng = subject.rng("random-direction", images.ids)
    x = ball.sample(images.x, rng)
    least = torch.full((len(images),), math.inf, dtype=torch.float64, device=images.x.device)
    best = images.x.clone()
    for _ in range(steps):
        x = ball.project(images.x, x + 0.2 * ball.eps * ball.ascent(rng.normal(*images.x.shape[1:]), x))
        margin = goal.margin(subject.logits(x)).double()
        nearer = margin < least
        least, best[nearer] = torch.where(nearer, margin, least), x[nearer]
    broken = torch.zeros(len(images), dtype=torch.bool, device=images.x.device)
    hit = (least < 0).nonzero().squeeze(1)
    if len(hit):
        broken[hit] = subject.counterexample(images.ids[hit], best[hit], "random directions")
    return broken, least
