"""The second-order bound of Finlay and Oberman with sampled curvature constants."""

from __future__ import annotations

from typing import Literal

import torch

from robeval.bounds.curvature import curvatures, in_double_images, second_order_radius
from robeval.bounds.expansion import RIVALS, Draws, OnBatch, Reading, in_double
from robeval.bounds.margins import largest_per_column, measure, readings
from robeval.core.catalogue import bound
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken
from robeval.core.images import Images


@bound(
    source="Finlay, Oberman 2019, Scaleable input gradient regularization for adversarial robustness,"
    " arXiv:1905.11468, section 2.2",
    norms=("linf", "l2", "l1"),
    kind="estimate",
    order=2,
    smooth=True,
    presets={"c-bound-paper": {"loss": "softcw_prob", "level": 0.0}},
)
def c_bound(
    classifier: Classifier,
    images: Images,
    norm: str,
    rng: Draws,
    batch_size: int = 256,
    on_batch: OnBatch | None = None,
    *,
    loss: Literal["rivals", "rivals_prob", "softcw_lse", "softcw_prob", "cw_prob", "cw"] = "rivals",
    top: int = 1,
    temperature: float = 10.0,
    level: float | None = None,
    rivals: int = 3,
    ends: Literal["largest", "both"] = "largest",
    tolerance: float = 1e-3,
    starts: int = 2,
    least: int = 12,
    steps: int | None = None,
    whole: int = 256,
    float64: bool = False,
) -> list[Reading]:
    """Gap, slope and largest curvature, rival by rival: the root of slope r + C_j r^2 / 2 = gap, and the least root.

    C_j is the largest signed eigenvalue of the Hessian of f_j - f_y over ALL given images where it was computed,
    misclassified ones included, at least 0. It is an ESTIMATE, since curvature between and around the images can be
    larger than any value at an image.

    Args:
        loss: rivals, every rival's logit less the true one's, each with a constant of its own; rivals_prob, the same of
            probabilities; or one loss with one constant: softcw_lse, a smooth upper bound of cw_prob; softcw_prob as
            released with the paper (preset c-bound-paper; not an upper bound of the loss); cw_prob and cw for two
            classes, where they have no kink.
        top: The class is to stay among so many best ones; 1 means the best.
        temperature: Sharpness of the two soft losses.
        level: Value of the loss at which the class can change; none means 0, and -log(K) / temperature for softcw_prob.
        rivals: Most rivals per image whose curvature is computed, the nearest first, those that could decide only.
        ends: Ends of the spectrum that must converge; both gives the spectral norm too.
        tolerance: Largest Lanczos residual relative to the eigenvalue.
        starts: Random starts per image; the largest value found counts.
        least: Products per start before a residual is believed.
        steps: Most products per start; none means 50, or 100 for images of 10,000 pixels or more.
        whole: In linf and l1, images of up to so many pixels get their whole Hessian, one product per pixel.
        float64: Compute in double precision.

    Shapes:
        images (N, C, H, W) in [0, 1]; one reading per image, in their order.
    Cost:
        About 3 forward passes, and 10 + 28 backward passes per rival looked at: a product is one backward pass.
    Source:
        Finlay and Oberman 2019, arXiv:1905.11468, section 2.2; curvature by Lanczos 1950.
    Departs:
        The paper takes one constant of a smooth maximum of probabilities, and l2. The maximum over |w| <= 1 of w^T H w
        is bounded by d lambda_max and sum |H_ij| in linf, by lambda_max and max |H_ij| in l1. A rival without a
        computed curvature gets the largest of all. The root is taken in the form without cancellation.
    Raises:
        UsageError: a top that the loss does not have.
        ContractBroken: a network or loss without second derivatives, or images that influence each other.
    """
    if loss in ("cw", "cw_prob") and classifier.classes > 2:
        raise ContractBroken(
            f"{loss} is a maximum over {classifier.classes - 1} classes and is not twice differentiable",
            code="B01",
            do="c-bound:loss=rivals",
        )
    if float64:
        classifier, images = in_double(classifier), in_double_images(images)
    at = measure(classifier, images, norm, loss, temperature, top=top, zero=level, batch_size=batch_size)
    slope, known = at.filled(), torch.full_like(at.gap, torch.nan)
    largest, smallest, residual, constant = known.clone(), known.clone(), known.clone(), known.clone()
    forwards = torch.ones(len(images), dtype=torch.int64)
    backwards = forwards * at.backwards
    # The nearest rival first; then the nearest of those that the largest curvature seen would let decide.
    column, rows = at.deciding(at.gap / slope, top), torch.arange(len(images))
    for turn in range(max(1, rivals) if loss in RIVALS else 1):
        found = curvatures(
            classifier, images[rows.to(images.x.device)], norm, loss, temperature, rng,
            rival=column[rows] if loss in RIVALS else None, batch_size=batch_size, on_batch=on_batch,
            ends=ends, tolerance=tolerance, starts=starts, least=least, steps=steps, whole=whole, first=turn == 0,
        )  # fmt: skip
        place = rows, column[rows]
        largest[place], smallest[place], residual[place] = found.largest, found.smallest, found.residual
        known[place] = found.constant
        forwards[rows] += found.forwards
        backwards[rows] += found.backwards
        per_rival = largest_per_column(known)
        constant = torch.where(known.isnan(), per_rival.max(), per_rival).clamp_min(0)
        radius = second_order_radius(at.gap, slope, constant)
        which = at.deciding(radius, top)
        limit = radius.gather(1, which[:, None])
        could = radius.masked_fill(~known.isnan() | (radius > limit) | at.gap.isinf() | (limit == 0), torch.inf)
        rows = (could.isfinite().any(1)).nonzero()[:, 0]
        column = could.argmin(1)
        if not len(rows):
            break
    return readings(
        images, at, radius, which, constant, loss=loss, domain="test set", forwards=forwards, backwards=backwards,
        curvature=largest, residual=residual, curvature_least=smallest, samples=starts,
    )  # fmt: skip
