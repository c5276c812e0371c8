"""Does an attack that sees only the predicted class find more?"""

from __future__ import annotations

import torch

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import attacked, by_gradients, ids, images_of
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, not_run, share_failed, surely
from robeval.diagnose.subject import Subject


@diagnostic(
    id="X6",
    group=4,
    level="full",
    images=100,
    question="does a hard-label attack find more?",
    limit="0; FAILED when surely above 0.2 %",
    source="Chen, Jordan, Wainwright 2020, HopSkipJumpAttack: A Query-Efficient Decision-Based Attack,"
    " arXiv:1904.02144; Carlini et al. 2019, On Evaluating Adversarial Robustness, arXiv:1902.06705",
)
def hard_label(subject: Subject, *, queries: int = 5000, survivors: int = 100) -> Finding:
    """HopSkipJump on images that survive all gradient attacks; it sees no logit, so no masking of logits hides from it.

    Args:
        queries: Queries per image.
        survivors: Most images.

    Cost:
        ``queries`` forward passes per surviving image, besides the shared attacks.
    Source:
        Chen et al. 2020, arXiv:1904.02144; the gradient-free item of Carlini et al. 2019, arXiv:1902.06705.
    Departs:
        Judged as the other attacks without gradients: one image warns, a share surely above 0.2 % of the survivors
        that were tried fails.
    """
    if subject.norm not in ("linf", "l2"):
        return not_run(f"no hard-label attack in {subject.norm}", "does not apply")
    if subject.randomised:
        return not_run("a walk along the boundary needs answers that repeat", "does not apply")
    images = subject.correct(images_of(subject))
    left = (~by_gradients(subject, images)).nonzero().squeeze(1)[:survivors]
    if not len(left):
        return not_run("no image survives the gradient attacks", "does not apply")
    images = images[left]
    found = attacked(subject, f"hopskipjump:queries={queries}", images)
    count, n = int(found.broken.sum()), len(images)
    near = found.distance[torch.isfinite(found.distance)]
    return Finding(
        FAILED if share_failed(count, n, 0.002) else WARNING if count else CLEAR,
        measured=f"{count} of {n} survivors; nearest "
        + (f"{float(near.min()) / subject.eps:.2f} eps" if len(near) else "none found"),
        limit="0; FAILED when surely above 0.2 %",
        n_images=n,
        flagged=ids(images, found.broken),
        interval=(surely(count, n, 0.975), 1 - surely(n - count, n, 0.975)),
        what_to_do="quote the minimum over all attacks; attack through a smooth stand-in (BPDA, EOT); innocent cause: a"
        " weak gradient attack"
        if count
        else "",
        why="an attack that sees the class alone breaks what gradient attacks do not" if count else "",
        data={"distance": near.tolist()},
    )
