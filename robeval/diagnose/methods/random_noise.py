"""Does blind guessing find what gradient attacks miss?"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import diagnostic
from robeval.core.images import Images
from robeval.diagnose.evidence import by_gradients, by_loss, either, ids, images_of
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding
from robeval.diagnose.guesses import guess
from robeval.diagnose.subject import Subject

#: Draws per image at each level.
DRAWS = {"quick": 150, "standard": 1000, "full": 1000}


@diagnostic(
    id="X4",
    group=4,
    level="quick",
    images=1000,
    question="does blind noise find more?",
    limit="0",
    source="Athalye, Carlini, Wagner 2018, Obfuscated Gradients Give a False Sense of Security, arXiv:1802.00420,"
    " section 3.1; Carlini et al. 2019, On Evaluating Adversarial Robustness, arXiv:1902.06705",
)
def random_noise(subject: Subject, *, draws: int | None = None) -> Finding:
    """Uniform draws and corners of the ball, tried blindly.

    Fails when an image that survives all gradient attacks falls to noise: there is no innocent cause. An image that
    survives cross-entropy alone and falls to noise warns. So only survivors of cross-entropy are tried.

    Args:
        draws: Draws per image, half of them corners; none means 150 at the quick level and 1000 beyond.

    Cost:
        ``draws`` forward passes per image that survives the shared attack on cross-entropy.
    Source:
        Athalye et al. 2018, arXiv:1802.00420, section 3.1; Carlini et al. 2019, arXiv:1902.06705, section 5.
    Departs:
        They ask for 10,000 to 100,000 points; give ``draws`` for a few images. In l2 and l1 the corners are points of
        the surface.
    """
    images = subject.correct(images_of(subject))
    many = DRAWS[subject.level] if draws is None else draws
    n, left = len(images), (~by_loss(subject, images)["ce"]).nonzero().squeeze(1)
    if not len(left):
        return Finding(CLEAR, f"0 of {n}; no image survives cross-entropy", "0", n)
    images = images[left]
    found = guess(subject, images, _draws(subject, images, many), "random noise")
    noise = either(found.values())
    only = noise & ~by_gradients(subject, images)
    count, missed = int(only.sum()), int(noise.sum())
    return Finding(
        FAILED if count else WARNING if missed else CLEAR,
        measured=f"{count} of {n}; {missed} missed by cross-entropy; "
        + ", ".join(f"{name} {int(hit.sum())}" for name, hit in found.items()),
        limit="0",
        n_images=n,
        flagged=ids(images, only if count else noise),
        what_to_do="the gradient attacks of the evaluation are worthless here: attack without gradients, by transfer,"
        " or through a smooth stand-in (BPDA, EOT)"
        if count
        else "attack with the margin loss"
        if missed
        else "",
        why="random points break what gradient attacks do not" if count or missed else "",
        data={"draws": many, "only": count, "missed_by_ce": missed},
    )


def _draws(subject: Subject, images: Images, many: int) -> Iterator[tuple[str, Tensor]]:
    """Corners and uniform points by turns, so that neither takes all the finds."""
    ball, rng = Ball(subject.norm, subject.eps), subject.rng("random-noise", images.ids)
    shape = images.x.shape[1:]
    for k in range(many):
        if k % 2:
            yield "uniform", ball.sample(images.x, rng)
        elif ball.norm == "linf":
            yield "corner", ball.project(images.x, images.x + ball.eps * rng.sign(*shape))
        else:
            yield "corner", ball.surface(images.x, rng)
