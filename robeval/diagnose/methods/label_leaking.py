"""K11, label leaking: does a one-step attack that knows the label make the model more accurate?"""

from __future__ import annotations

from scipy.stats import binomtest

from robeval.core.ball import Ball
from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding
from robeval.diagnose.slopes import slope
from robeval.diagnose.subject import Subject


@diagnostic(
    id="K11",
    group=3,
    level="quick",
    images=256,
    question="does a one-step attack that knows the label raise accuracy?",
    limit="0 points",
    source="Kurakin, Goodfellow, Bengio 2017, Adversarial Machine Learning at Scale, arXiv:1611.01236, section 4.1",
)
def label_leaking(subject: Subject, *, images: int = 256) -> Finding:
    """Accuracy after one step of length eps along the gradient of the true label, held against clean accuracy.

    A model that was trained on one-step images of the true label can read the label from the step. Over all images, the
    misclassified ones too, since these are what a leak mends.

    Args:
        images: Images, the first of those chosen.

    Cost:
        2 forward passes and one backward pass per image.
    Source:
        Kurakin et al. 2017, arXiv:1611.01236, section 4.1. WARNING when accuracy rises, FAILED when an exact sign
        test over the images that changed says so at 5 %.
    Departs:
        Per image and with a paired test, instead of two accuracies.
    """
    chosen = subject.some(images)
    clean = subject.clean_logits()[: len(chosen)].argmax(1) == chosen.y
    ball = Ball(subject.norm, subject.eps)
    step = slope(subject, "ce", chosen.x, chosen.y)[1]
    moved = ball.project(chosen.x, chosen.x + subject.eps * ball.ascent(step, chosen.x))
    stepped = subject.logits(moved).argmax(1) == chosen.y
    mended, broken = int((stepped & ~clean).sum()), int((clean & ~stepped).sum())
    if broken:
        subject.counterexample(chosen.ids[clean & ~stepped], moved[clean & ~stepped], "one step along the gradient")
    n, gain = len(chosen), mended - broken
    sure = gain > 0 and binomtest(mended, mended + broken, alternative="greater").pvalue < 0.05
    return Finding(
        FAILED if sure else WARNING if gain > 0 else CLEAR,
        f"{100 * gain / n:+.1f} points",
        "0 points",
        n,
        flagged=chosen.ids[stepped & ~clean].tolist() if gain > 0 else (),
        why=f"{int(clean.sum())} of {n} right on clean images, {int(stepped.sum())} after one step",
        what_to_do="" if gain <= 0 else "craft training images with predicted labels; trust iterative attacks only",
    )
