"""How sure the model is, on and off the data."""

from __future__ import annotations

from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, WARNING, Finding
from robeval.diagnose.slopes import start, taken
from robeval.diagnose.subject import Subject

MOST = 0.99


@diagnostic(
    id="G6",
    group=2,
    level="quick",
    images=256,
    question="sure of everything?",
    limit="99 % on all three",
    source="Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order Adversarial Regularization, arXiv:2004.01832,"
    " appendix D",
)
def confidence(subject: Subject) -> Finding:
    """Mean top probability on the images, at random points of the ball, and after one gradient step.

    A model that stays above 99 % on all three has saturated logits. References on CIFAR-10: adversarially trained
    70, 70, 65; standard 98, 98, 97; masked SOAR 100, 100, 100; final SOAR 98, 98, 98.

    Cost:
        2 forward passes per image; the gradient is shared with the zero gradient test.
    Source:
        Ma et al. 2020, arXiv:2004.01832, appendix D.
    Departs:
        The mark of 99 % is ours; the paper only points out values near 100 %.
    """
    images, _, _ = taken(subject, "ce", "image")
    _, _, grad = taken(subject, "ce", "start")
    ball, at = Ball(subject.norm, subject.eps), start(subject, images)
    stepped = ball.project(images.x, at + ball.eps * ball.ascent(grad, at))
    tops = [_top(z) for z in (subject.logits(images.x), subject.logits(at), subject.logits(stepped))]
    seen = min(tops) > MOST
    return Finding(
        WARNING if seen else CLEAR,
        measured="clean {:.1f}, random {:.1f}, one step {:.1f} %".format(*(100 * t for t in tops)),
        limit="99 % on all three",
        n_images=len(images),
        what_to_do="attack with the margin loss; innocent cause: a standard network at a small eps" if seen else "",
        why="the model is as sure of attacked images as of clean ones" if seen else "",
        data={"clean": tops[0], "random": tops[1], "one_step": tops[2]},
    )


def _top(z: Tensor) -> float:
    return float(z.softmax(1).amax(1).mean())
