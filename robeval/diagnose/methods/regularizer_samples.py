"""How many samples SOAR's regularizer needs."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.ball import per_row
from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import DOES_NOT_APPLY, Finding
from robeval.diagnose.slopes import slope, taken, unit
from robeval.diagnose.subject import Subject


@diagnostic(
    id="S2",
    group=2,
    level="full",
    images=256,
    question="how noisy is SOAR's regularizer?",
    limit="none, a number only",
    source="Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order Adversarial Regularization, arXiv:2004.01832,"
    " equation 14",
)
def regularizer_samples(subject: Subject, *, samples: int = 32, h: float = 0.01) -> Finding:
    """The value of SOAR's regularizer with 1, 2, 4, ... Gaussian samples, and how much it still varies.

    Taken at the images themselves, for a model trained in any way: kappa ||Hz|| with the augmented Hessian H of the
    cross-entropy and a Gaussian z.

    Args:
        samples: Most samples, a power of two.
        h: Step of the finite difference, in pixel units along a unit vector.

    Cost:
        ``samples`` backward passes per image.
    Source:
        Ma et al. 2020, arXiv:2004.01832, equation 14 and its average over samples.
    Departs:
        Unclipped, at the image and not at a training start. Shown, never judged. In l1 kappa is that of l2.
    """
    images, _, g = taken(subject, "ce", "image")
    size, rng = images.x[0].numel(), subject.rng("regularizer-samples", images.ids)
    kappa = ((size if subject.norm == "linf" else 1) * subject.eps**2 + 1) / 2
    values = torch.stack([kappa * _hz(subject, images.x, images.y, g, rng.normal(*images.x.shape[1:]), rng.normal(), h)
                          for _ in range(samples)])  # fmt: skip
    means = values.cumsum(0) / torch.arange(1, samples + 1, device=values.device)[:, None]
    counts = [2**k for k in range(samples.bit_length()) if 2**k <= samples]
    curve = {s: float(means[s - 1].mean()) for s in counts}
    mean = values.mean(0)
    noise = float((values.std(0) / mean.clamp_min(1e-30)).median()) if samples > 1 else 0.0
    return Finding(
        DOES_NOT_APPLY,
        measured=", ".join(f"{v:.3g}" for v in curve.values())
        + f" with {', '.join(map(str, curve))} samples; one sample varies by {100 * noise:.0f} %",
        limit="none, a number only",
        n_images=len(images),
        why="a measure of SOAR's own estimator; it says nothing about an attack",
        data={"samples": counts, "value": list(curve.values()), "relative_deviation": noise},
    )


def _hz(subject: Subject, x: Tensor, y: Tensor, g: Tensor, zd: Tensor, z1: Tensor, h: float) -> Tensor:
    """||Hz|| for H = [[hessian, g], [g, 1]] and z = (zd, z1), the Hessian product by a finite difference. -> (n,)."""
    length = torch.linalg.vector_norm(zd.flatten(1), dim=1)
    product = per_row(length, zd) * (slope(subject, "ce", x + h * unit(zd), y)[1] - g) / h
    top = (product + per_row(z1, g) * g).flatten(1)
    last = (g * zd).flatten(1).sum(1) + z1
    whole: Tensor = torch.linalg.vector_norm(torch.cat([top, last[:, None]], 1), dim=1)
    return whole
