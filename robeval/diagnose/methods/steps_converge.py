"""Would more steps find more?"""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.catalogue import diagnostic
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.diagnose.evidence import attacked, ids, images_of, points
from robeval.diagnose.finding import CLEAR, FAILED, Finding
from robeval.diagnose.subject import Subject

MORE_POINTS, MORE_LOSS = 1.0, 0.01


@diagnostic(
    id="K2",
    group=3,
    level="standard",
    images=1000,
    question="would more steps find more?",
    limit="1 point, and 1 % of the loss",
    source="Carlini et al. 2019, On Evaluating Adversarial Robustness, arXiv:1902.06705, section 5",
)
def steps_converge(subject: Subject, *, steps: int = 20) -> Finding:
    """Accuracy after T, 2T and 4T steps, and the loss of the survivors, for cross-entropy and margin.

    Converged on one loss says nothing about another, so that each is judged: a loss has converged when the last
    doubling lowers accuracy by at most a point and the median margin of the survivors by at most 1 % of the clean one.

    Args:
        steps: T, the shortest attack.

    Cost:
        7 T backward passes per loss and image; images already broken by the shorter attack are spared the longer.
    Source:
        Carlini et al. 2019, arXiv:1902.06705, section 5.
    Departs:
        All three attacks share start and step size (eps / 5), so that the longer one continues the shorter. The change
        is relative to the clean margin: the loss of a survivor may be near 0.
    """
    images = subject.correct(images_of(subject))
    clean = Untargeted(images.y).margin(subject.logits(images.x)).double().median()
    failed, late, told, curves = [], [], [], {}
    for loss in ("ce", "cw"):
        accuracy, fall, left = _curve(subject, images, loss, steps)
        moved = float(fall / clean)
        told.append(f"{loss} {' / '.join(f'{a:.1f}' for a in accuracy)} %, margin falls by {100 * moved:.2f} %")
        curves[loss] = {"steps": [steps, 2 * steps, 4 * steps], "accuracy": accuracy, "margin_fall": moved}
        if accuracy[1] - accuracy[2] > MORE_POINTS or moved > MORE_LOSS:
            failed.append(loss)
            late += left
    return Finding(
        FAILED if failed else CLEAR,
        measured="; ".join(told),
        limit="last doubling: 1 point, 1 % of the clean margin",
        n_images=len(images),
        flagged=sorted(set(late)),
        what_to_do="run the attack with more steps, until a doubling changes nothing" if failed else "",
        why=f"not converged on {', '.join(failed)}" if failed else "",
        data=curves,
    )


def _curve(subject: Subject, images: Images, loss: str, steps: int) -> tuple[list[float], Tensor, list[int]]:
    """Accuracy at T, 2T and 4T, the fall of the survivors' median margin in the last doubling, and its finds."""
    left, total = images, len(images)
    accuracy: list[float] = []
    before = images.x.new_zeros(total, dtype=torch.float64)  # smallest margin so far, of the images that are left
    fall, late = before.new_zeros(()), []
    for many in (steps, 2 * steps, 4 * steps):
        if not len(before):
            accuracy.append(0.0)
            continue
        said = attacked(subject, f"pgd:steps={many},relative_step=0.2,loss={loss}", left)
        stands = ~said.broken
        now = torch.minimum(before, said.margin)[stands] if many > steps else said.margin[stands]
        if many == 4 * steps:
            late = ids(left, said.broken)
            fall = (before[stands].median() - now.median()) if len(now) else fall
        accuracy.append(points(stands.sum(), total))
        before = now
        if len(now):
            left = left[stands]
    return accuracy, fall.nan_to_num(0.0, 0.0, 0.0), late
