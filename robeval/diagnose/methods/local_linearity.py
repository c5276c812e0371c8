"""How straight the loss is inside the ball."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import diagnostic
from robeval.core.goal import Untargeted
from robeval.diagnose.finding import DOES_NOT_APPLY, Finding
from robeval.diagnose.slopes import slope, start, taken, unit
from robeval.diagnose.subject import Subject


@diagnostic(
    id="G7",
    group=2,
    level="full",
    images=256,
    question="how straight is the loss in the ball?",
    limit="none, a number only",
    source="Qin et al. 2019, Adversarial Robustness through Local Linearization, arXiv:1907.02610, equation 5;"
    " Andriushchenko and Flammarion 2020, Understanding and Improving Fast Adversarial Training, arXiv:2007.02617,"
    " equation 4",
)
def local_linearity(subject: Subject, *, steps: int = 10) -> Finding:
    """Two measures of curvature: the largest gap to the linear prediction, and how far the gradient turns.

    Gamma is the largest found |loss(x + d) - loss(x) - d.grad loss(x)| of the cross-entropy in the ball. The cosine
    is that between the gradients at the image and at a random point of the ball; near 0 beside a high accuracy under
    one step it is the mark of catastrophic overfitting.

    Args:
        steps: Ascent steps in the search for gamma.

    Cost:
        ``steps`` backward passes and 1 forward pass per image, and 2 gradients shared with the zero gradient test.
    Source:
        Qin et al. 2019, arXiv:1907.02610, equation 5; Andriushchenko and Flammarion 2020, arXiv:2007.02617, equation 4.
    Departs:
        No pass mark was published for either, so neither is judged: compare with a model that you know, on the same
        data and eps. Every point of the search counts for gamma, not its last one alone.
    """
    images, value, grad = taken(subject, "ce", "image")
    _, _, elsewhere = taken(subject, "ce", "start")
    cosine = (unit(grad) * unit(elsewhere)).flatten(1).sum(1)
    gamma = _gamma(subject, images.x, images.y, start(subject, images), value, grad, steps)
    middle, turned = float(gamma.median()), float(cosine.median())
    return Finding(
        DOES_NOT_APPLY,
        measured=f"gamma {middle:.3g}, cosine {turned:.2f} (medians)",
        limit="none, a number only",
        n_images=len(images),
        why="no mark was ever published; compare with a known model on the same data and eps",
        data={"gamma": gamma.tolist(), "cosine": cosine.tolist()},
    )


def _gamma(subject: Subject, x0: Tensor, y: Tensor, x: Tensor, value: Tensor, grad: Tensor, steps: int) -> Tensor:
    """Largest gap between loss and linear prediction along an ascent on that gap. -> (n,)."""
    ball = Ball(subject.norm, subject.eps)
    best = torch.zeros_like(value)
    for _ in range(steps):
        now, slopes = slope(subject, "ce", x, y)
        gap = now - value - (grad * (x - x0)).flatten(1).sum(1)
        best = torch.maximum(best, gap.abs())
        uphill = gap.sign().view(-1, 1, 1, 1) * (slopes - grad)  # gradient of the absolute gap
        x = ball.project(x0, x + 2.5 / steps * ball.eps * ball.ascent(uphill, x))
    now = Untargeted(y).cross_entropy(subject.logits(x))
    return torch.maximum(best, (now - value - (grad * (x - x0)).flatten(1).sum(1)).abs())
