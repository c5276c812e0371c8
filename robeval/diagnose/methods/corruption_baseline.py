"""Is the attack at least as harmful as common corruptions?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import diagnostic
from robeval.core.images import Images
from robeval.diagnose.corruptions import CORRUPTIONS
from robeval.diagnose.evidence import by_gradients, either, ids, images_of, points
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, share_failed
from robeval.diagnose.guesses import guess
from robeval.diagnose.subject import Subject


@diagnostic(
    id="X5",
    group=4,
    level="full",
    images=1000,
    question="attack at least as harmful as corruptions?",
    limit="0; FAILED when surely above 0.2 %",
    source="Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and"
    " Perturbations, arXiv:1903.12261",
)
def corruption_baseline(subject: Subject) -> Finding:
    """Counts images that a corruption inside the ball breaks and no gradient attack breaks.

    Gaussian, shot, impulse and speckle noise, Gaussian and defocus blur, brightness, contrast and pixelation at five
    severities. Each is tried as it is, which counts only where it lies inside the ball, and pulled back to the ball.

    Cost:
        45 forward passes per surviving image.
    Source:
        Hendrycks and Dietterich 2019, arXiv:1903.12261, the constants of CIFAR-10-C.
    Departs:
        Corruptions that need another package or stored pictures are left out. Shot noise is normal. Most corruptions
        leave a small ball, so the share that lies inside is told; pulled back they are what of them an attack could
        have found.
    """
    images = subject.correct(images_of(subject))
    inside: dict[str, float] = {}
    found = guess(subject, images, _corrupted(subject, images, inside), "corruption")
    broken = either(found.values())
    only = broken & ~by_gradients(subject, images)
    count, n = int(only.sum()), len(images)
    within = sum(inside.values()) / len(inside)
    return Finding(
        FAILED if share_failed(count, n, 0.002) else WARNING if count else CLEAR,
        measured=f"{count} of {n}; corruptions break {int(broken.sum())}; {within:.1f} % of them inside as they are",
        limit="0; FAILED when surely above 0.2 %",
        n_images=n,
        flagged=ids(images, only),
        what_to_do="attack without gradients, by transfer, or through a smooth stand-in (BPDA, EOT); innocent cause"
        " of a few images: a weak gradient attack"
        if count
        else "",
        why="a corruption inside the ball breaks what gradient attacks do not" if count else "",
        data={"broken": {name: int(hit.sum()) for name, hit in found.items()}, "inside_percent": inside},
    )


def _corrupted(subject: Subject, images: Images, inside: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
    """Each corruption pulled back to the ball, mildest first; one that lies inside is not moved by that."""
    ball = Ball(subject.norm, subject.eps)
    for function, constants in CORRUPTIONS.items():
        kept = torch.zeros(len(images), dtype=torch.int64, device=images.x.device)
        for severity, constant in enumerate(constants, 1):
            rng = subject.rng(function.__name__, images.ids, severity)
            x = function(images.x, constant, rng).clamp(0, 1)
            kept += ball.contains(images.x, x)
            yield function.__name__, ball.project(images.x, x)
        inside[function.__name__] = points(kept.sum(), len(images) * len(constants))
