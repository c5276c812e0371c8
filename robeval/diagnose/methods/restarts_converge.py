"""Would more restarts find more?"""

from __future__ import annotations

import torch

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import attacked, images_of, points
from robeval.diagnose.finding import DOES_NOT_APPLY, Finding
from robeval.diagnose.subject import Subject


@diagnostic(
    id="K3",
    group=3,
    level="standard",
    images=1000,
    question="would more restarts find more?",
    limit="none, a number only",
    source="Carlini et al. 2019, On Evaluating Adversarial Robustness, arXiv:1902.06705, section 5",
)
def restarts_converge(subject: Subject, *, restarts: int = 8, steps: int = 20) -> Finding:
    """Accuracy after 1, 2, 4, ... restarts of projected gradient ascent on cross-entropy.

    Nested: more restarts repeat the starts of fewer and add to them, so that the curve can only fall.

    Args:
        restarts: Most restarts, a power of two.
        steps: Steps of each.

    Cost:
        At most 2 ``restarts`` times ``steps`` backward passes per surviving image.
    Source:
        Carlini et al. 2019, arXiv:1902.06705, section 5.
    Departs:
        Shown, never judged: five restarts cost honest models up to 6 points.
    """
    images = subject.correct(images_of(subject))
    left = torch.arange(len(images), device=images.x.device)
    curve: dict[int, float] = {}
    count = 1
    while count <= restarts:
        if len(left):
            said = attacked(subject, f"pgd:steps={steps},relative_step=0.25,restarts={count}", images[left])
            left = left[~said.broken]
        curve[count] = points(len(left), len(images))
        count *= 2
    shown = list(curve.values())
    gain = shown[-2] - shown[-1] if len(shown) > 1 else 0.0
    return Finding(
        DOES_NOT_APPLY,
        measured=" / ".join(f"{a:.1f}" for a in shown) + f" % after {', '.join(map(str, curve))} restarts",
        limit="none, a number only",
        n_images=len(images),
        why=f"honest models fall too; the last doubling broke {gain:.1f} points",
        data={"restarts": list(curve), "accuracy": shown},
    )
