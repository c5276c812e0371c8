"""How well the second-order expansion of the loss predicts its worst case."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.ball import per_row
from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import DOES_NOT_APPLY, Finding, not_run
from robeval.diagnose.path import path
from robeval.diagnose.slopes import is_zero, slope, taken, unit, without_gradient
from robeval.diagnose.subject import Subject


@diagnostic(
    id="S1",
    group=2,
    level="full",
    images=256,
    question="does the second-order expansion predict the loss?",
    limit="none, a number only",
    source="Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order Adversarial Regularization, arXiv:2004.01832,"
    " section 3",
)
def taylor_tightness(subject: Subject, *, steps: int = 20, h: float = 0.01) -> Finding:
    """Compares the rise of the cross-entropy at attacked points with its expansions of first and second order.

    At the last point x + d of projected gradient ascent: the rise, the prediction g.d, and g.d + d.Hd / 2.
    A regularizer built on the second form is as good as that form is on the points that attacks visit.

    Args:
        steps: Steps of the attack.
        h: Step of the finite difference in Hd, in pixel units along d.

    Cost:
        ``steps`` + 1 backward passes and 1 forward pass per image, and the gradient at the image.
    Source:
        Ma et al. 2020, arXiv:2004.01832, section 3, where the expansion replaces the loss.
    Departs:
        Errors are relative to the rise of the loss; medians over images whose loss rises. Hd is the difference of two
        gradients, as in the paper's algorithm. Shown, never judged.
    """
    images, value, grad = taken(subject, "ce", "image")
    try:
        last = path(subject, f"pgd:steps={steps},relative_step=0.25", images).last
    except RuntimeError as error:
        if not without_gradient(error):
            raise
        return not_run("the model gives no gradient", "does not apply")
    d = last - images.x
    length = torch.linalg.vector_norm(d.flatten(1), dim=1)
    hd = per_row(length, d) * (slope(subject, "ce", images.x + h * unit(d), images.y)[1] - grad) / h
    rise = torch.nn.functional.cross_entropy(subject.logits(last), images.y, reduction="none") - value
    first = (grad * d).flatten(1).sum(1)
    second = first + (d * hd).flatten(1).sum(1) / 2
    use = (rise > 0) & ~is_zero(grad)
    if not use.any():
        return not_run("the attack raises the loss of no image", "does not apply")
    told = {"first": _error(first, rise, use), "second": _error(second, rise, use)}
    return Finding(
        DOES_NOT_APPLY,
        measured=f"off by {100 * told['first']:.0f} % at first order, {100 * told['second']:.0f} % at second (medians)",
        limit="none, a number only",
        n_images=int(use.sum()),
        why="a measure of SOAR's own premise; it says nothing about an attack",
        data=told | {"rise": rise[use].tolist(), "predicted": second[use].tolist()},
    )


def _error(predicted: Tensor, rise: Tensor, use: Tensor) -> float:
    return float(((predicted - rise).abs() / rise)[use].median())
