"""Does the gradient predict what the loss does?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import diagnostic
from robeval.core.goal import ROUNDINGS, Untargeted, margin_loss
from robeval.diagnose.evidence import ids
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, not_run
from robeval.diagnose.slopes import is_zero, taken, unit
from robeval.diagnose.subject import Subject

WARN, FAIL, TINY = 0.1, 0.5, 1e-3


@diagnostic(
    id="G4",
    group=2,
    level="quick",
    images=256,
    question="does the gradient predict the loss?",
    limit="0.1; FAILED above 0.5",
    source="robeval; after Athalye, Carlini, Wagner 2018, Obfuscated Gradients Give a False Sense of Security,"
    " arXiv:1802.00420, section 3",
)
def finite_differences(subject: Subject, *, directions: int = 4) -> Finding:
    """Compares the slope of the margin that the gradient states with the slope between two nearby points.

    Along the gradient over three lengths and along random directions over one. A gradient that is exactly zero where
    the margin moves, there or on the way across the ball, is a fault by itself.

    Args:
        directions: Random directions per image.

    Cost:
        6 forward passes per image and 2 per random direction, 2 more if a gradient is zero; the gradient is
        shared with the zero gradient test.
    Source:
        None; the shattered and vanishing gradients of Athalye et al. 2018, arXiv:1802.00420, made visible.
    Departs:
        Lengths are eps, eps / 4 and 0.001 in the l2 norm, whatever the norm of the threat model. The error is relative
        to the larger of both slopes, so that it lies between 0 and 2, and the median is over images and directions.
        The margin of a constant model neither moves nor has a gradient: the two agree.
    """
    if subject.randomised:
        return not_run("two answers of a randomised model differ without any step", "does not apply")
    images, _, grad = taken(subject, "margin", "image")
    rng = subject.rng("finite-differences", images.ids)
    along = unit(grad)
    probes = [(along, h) for h in (subject.eps, subject.eps / 4, TINY)]
    probes += [(unit(rng.normal(*images.x.shape[1:])), subject.eps / 4) for _ in range(directions)]
    errors, moved = [], torch.zeros(len(images), dtype=torch.bool, device=images.x.device)
    for u, h in probes:
        stated = (grad * u).flatten(1).sum(1).double()
        change, noise = _change(subject, images.x, images.y, u, h)
        seen = change / (2 * h)
        errors.append((seen - stated).abs() / torch.maximum(seen.abs(), stated.abs()))  # 0 / 0: nothing to compare
        moved |= change.abs() > noise
    if is_zero(grad).any():  # a model that answers in steps may stand still over small lengths
        far = Ball(subject.norm, subject.eps).surface(images.x, rng) - images.x
        change, noise = _change(subject, images.x, images.y, far, 1.0)
        moved |= change.abs() > noise
    faulty = is_zero(grad) & moved
    each = torch.stack(errors, 1)
    flat = each[~is_zero(grad)].flatten()
    flat = flat[~flat.isnan()]
    median, high = (float(flat.quantile(q)) if len(flat) else 0.0 for q in (0.5, 0.9))
    result = FAILED if faulty.any() or median > FAIL else WARNING if median > WARN else CLEAR
    count = int(faulty.sum())
    return Finding(
        result,
        measured=f"{median:.2g} median, {high:.2g} 90th percentile; {count} of {len(images)} zero but moving",
        limit="0.1; FAILED above 0.5, or 1 zero but moving",
        n_images=len(images),
        flagged=ids(images, faulty | (each.nanmedian(1).values > WARN)) if result != CLEAR else (),
        what_to_do="attack without gradients, by transfer, or through a smooth stand-in of the layer (BPDA, EOT);"
        " innocent cause of a small excess: kinks within the step"
        if result != CLEAR
        else "",
        why=""
        if result == CLEAR
        else "the gradient is zero where the margin moves"
        if count
        else "the margin does not move as its gradient says",
        data={"median": median, "p90": high, "zero_but_moving": count},
    )


def _change(subject: Subject, x: Tensor, y: Tensor, u: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """m(x + hu) - m(x - hu) in float64, and how much of it may be rounding. -> (n,), (n,)."""
    step, goal = per_row(torch.full((len(x),), h, dtype=x.dtype, device=x.device), x) * u, Untargeted(y)
    up, down = subject.logits(x + step), subject.logits(x - step)
    size = torch.maximum(up.abs().amax(1), down.abs().amax(1)).double()
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps * size
    change = margin_loss(goal, up).double() - margin_loss(goal, down).double()
    return torch.where(change.isfinite(), change, math.nan), rounding
