"""Does an image's answer depend on its company?"""

from __future__ import annotations

import torch

from robeval.core.catalogue import diagnostic
from robeval.diagnose.changes import relative_change, rounding
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, FAILED, Finding, not_run, wilson
from robeval.diagnose.subject import Subject


@diagnostic(
    id="D2",
    group=1,
    level="quick",
    images=64,
    question="same answer alone and in a batch?",
    limit="relative change 1e-3",
    source="robeval; the mark is a thousand times what rounding leaves in single precision",
)
def batch_independence(subject: Subject) -> Finding:
    """Compares each image's logits alone, in a batch of 64, in that batch permuted, and beside images of noise.

    A change above 1e-3 of the largest logit on any image fails (2e-2 in half precision and TF32).

    Cost:
        5 forward passes per image.
    Source:
        None published.
    Departs:
        Nothing.
    """
    if subject.randomised:
        return not_run("the model answers at random", DOES_NOT_APPLY)
    images = subject.some(64)
    x, n = images.x, len(images)
    rng = subject.rng("batch-independence", images.ids)
    with torch.no_grad():
        together = subject.classifier.logits(x)
        alone = torch.cat([subject.classifier.logits(one) for one in x.split(1)])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(subject.seed)).to(x.device)
        permuted = subject.classifier.logits(x[order])[order.argsort()]
        beside = subject.classifier.logits(torch.cat([x, rng.uniform(*x.shape[1:])]))[:n]
    others = torch.stack([relative_change(together, z) for z in (alone, permuted, beside)])
    change, limit = others.amax(0), rounding(together)
    flips = (torch.stack([alone, permuted, beside]).argmax(2) != together.argmax(1)).any(0) & (change > limit)
    flagged = images.ids[change > limit].tolist()
    return Finding(
        FAILED if flagged else CLEAR,
        measured=f"{float(change.max()):.1e}",
        limit=f"{limit:g}",
        n_images=n,
        flagged=flagged,
        interval=wilson(len(flagged), n),
        why=f"an image's answer depends on the images beside it ({len(flagged)} of {n} images, "
        f"{int(flips.sum())} change label)"
        if flagged
        else "",
        what_to_do="use fixed statistics (model.eval()), or attack with --batch-size 1" if flagged else "",
        data={"largest_change": dict(zip(("alone", "permuted", "beside noise"), others.amax(1).tolist(), strict=True))},
    )
