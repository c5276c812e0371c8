"""Does the model repeat itself?"""

from __future__ import annotations

import torch

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, wilson
from robeval.diagnose.subject import Subject

#: Largest change of the logits, both scaled to length 1, that is taken for rounding (AutoAttack's mark).
MARK = 1e-4


@diagnostic(
    id="D1",
    group=1,
    level="quick",
    images=256,
    question="same answer twice?",
    limit="0 images",
    source="Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse"
    " parameter-free attacks, arXiv:2003.01690, flag of random outputs in the authors' code",
)
def repeatability(subject: Subject, *, runs: int = 5) -> Finding:
    """Asks about the same batches several times, without and with gradients, and compares labels and logits.

    An image shows the sign when its logits, scaled to length 1, move by more than 1e-4, or when its label changes by
    more than the noise of floating-point arithmetic explains: three standard deviations of its margin.

    Args:
        runs: Passes without gradients; two more are made with gradients on, where some noise hides.

    Cost:
        7 forward passes per image.
    Source:
        AutoAttack's flag of random outputs.
    Departs:
        AutoAttack looks at its first batch and counts correct answers; here every image is compared with itself, and
        noise that only acts when gradients are recorded is found too.
    """
    images = subject.some(256)
    answers = [subject.logits(images.x) for _ in range(runs)]
    with torch.enable_grad():
        for _ in range(2):
            parts = [x.clone().requires_grad_() for x in images.x.split(subject.batch_size)]
            answers.append(torch.cat([subject.classifier.logits(x).detach() for x in parts]))
    z = torch.stack(answers).double()  # (runs, n, K)
    scaled = z / z.norm(dim=2, keepdim=True).clamp_min(1e-12)
    change = torch.nan_to_num((scaled - scaled[:1]).norm(dim=2).amax(0))
    labels, top = z.argmax(2), z.topk(2, dim=2).values
    margin = top[..., 0] - top[..., 1]
    flips = (labels != labels[:1]).any(0)
    moved = (change > MARK) | (flips & (margin.amax(0) > 3 * z.std(0).amax(1)))
    flagged = images.ids[moved].tolist()
    k, n = len(flagged), len(images)
    result = (WARNING if subject.randomised else FAILED) if k else CLEAR
    return Finding(
        result,
        measured=f"{k} of {n}",
        limit="0",
        n_images=n,
        flagged=flagged,
        interval=wilson(k, n),
        why=f"the model answers differently on the same input ({k} of {n} images, {int(flips.sum())} change label)"
        if k
        else "",
        what_to_do="robeval attack --randomised --suite autoattack-rand, which averages over the randomness"
        if k
        else "",
        data={"largest_change": float(change.max()), "label_changes": int(flips.sum())},
    )
