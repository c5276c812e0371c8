"""Gradients that are exactly zero."""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import ids
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, share_failed
from robeval.diagnose.slopes import is_zero, losses_for, taken
from robeval.diagnose.subject import Subject


@diagnostic(
    id="G1",
    group=2,
    level="quick",
    images=256,
    question="gradient exactly zero somewhere?",
    limit="0; FAILED when surely above 1 %",
    source="Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse"
    " parameter-free attacks, arXiv:2003.01690; Pintor et al. 2022, Indicators of Attack Failure, arXiv:2106.09947, I1",
)
def zero_gradient(subject: Subject) -> Finding:
    """Counts correctly classified images whose whole input gradient is exactly zero.

    Looks at the image and at a random start, for cross-entropy, margin, DLR and targeted margin. A gradient that is
    missing counts as zero, since an attack finds nothing to climb there.

    Cost:
        8 backward passes per image.
    Source:
        The flag of Croce and Hein 2020 and the indicator I1 of Pintor et al. 2022, arXiv:2106.09947.
    Departs:
        AutoAttack looks at DLR alone, at one start of its first batch; here every loss, both places, every image. One
        image warns; a share that is surely above 1 % fails.
    """
    losses = losses_for(subject.classifier.classes)
    zero = {}
    for loss in losses:
        images, _, at_image = taken(subject, loss, "image")
        _, _, at_start = taken(subject, loss, "start")
        zero[loss] = is_zero(at_image) | is_zero(at_start)
    counts = {loss: int(z.sum()) for loss, z in zero.items()}
    worst, n = max(counts, key=counts.__getitem__), len(images)
    result = CLEAR
    if counts[worst]:
        result = FAILED if share_failed(counts[worst], n, 0.01) else WARNING
    cured = [loss for loss, count in counts.items() if count == 0]
    advice = f"attack with a loss that has a gradient: {', '.join(cured)}" if cured else "attack without gradients"
    return Finding(
        result,
        measured=", ".join(f"{loss} {count}" for loss, count in counts.items()) + f" of {n}",
        limit="0; FAILED when surely above 1 %",
        n_images=n,
        flagged=ids(images, zero[worst]),
        what_to_do=f"{advice}; cross-entropy alone is zero on very confident models in single precision"
        if counts[worst]
        else "",
        why=f"no {worst} gradient on {counts[worst]} images: that attack stands still there" if counts[worst] else "",
        data={"zero": counts, "images": n},
    )
