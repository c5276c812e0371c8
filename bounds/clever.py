"""CLEVER: the end point of a reverse Weibull fit to sampled gradient norms as local Lipschitz constant."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robeval.bounds.expansion import RIVALS, Draws, OnBatch, Reading
from robeval.bounds.margins import measure, nearest_columns, readable, towards_rivals
from robeval.bounds.weibull import scores
from robeval.core.ball import Ball
from robeval.core.catalogue import bound
from robeval.core.classifier import Classifier
from robeval.core.images import Images


@bound(
    source="Weng, Zhang, Chen, Yi, Su, Gao, Hsieh, Daniel 2018, Evaluating the Robustness of Neural Networks: An"
    " Extreme Value Theory Approach, arXiv:1801.10578, algorithms 1 and 2",
    norms=("linf", "l2", "l1"),
    kind="estimate",
    order=1,
    smooth=False,
    presets={"clever-paper": {"blocks": 500, "samples": 1024, "fit": "likelihood"}},
)
def clever(
    classifier: Classifier,
    images: Images,
    norm: str,
    rng: Draws,
    batch_size: int = 256,
    on_batch: OnBatch | None = None,
    *,
    space: Literal["logits", "probabilities"] = "logits",
    top: int = 1,
    rivals: int = 3,
    radius: float | None = None,
    blocks: int = 30,
    samples: int = 32,
    fit: Literal["moments", "likelihood"] = "moments",
) -> list[Reading]:
    """Gap over a local Lipschitz constant that extreme value theory extrapolates from gradients at random points.

    Of every block of points uniform in the ball the largest dual norm of the gradient of f_j - f_y is kept, a reverse
    Weibull distribution is fitted to these, and its right end point is L_j. It is an ESTIMATE: the limit needs a
    continuous tail, and random points in many dimensions miss the worst directions.

    Args:
        space: What f_j and f_y are.
        top: The class is to stay among so many best ones; 1 means the best.
        rivals: Rivals per image that are sampled, the nearest first; others get the largest constant of these.
        radius: Radius R of the balls in pixels of [0, 1]; none means gap / slope of the image itself, which no score
            exceeds. One that is smaller than a score is refused.
        blocks: Blocks N_b per image; 500 in the paper.
        samples: Points N_s per block; 1024 in the paper.
        fit: moments, probability-weighted; likelihood, the maximum, as in the paper, whose end point is unstable.

    Shapes:
        images (N, C, H, W) in [0, 1]; one reading per image, in their order.
    Cost:
        blocks * samples forward passes, and as many backward ones per rival.
    Source:
        Weng et al. 2018, arXiv:1801.10578, algorithms 1 and 2; Hosking, Wallis and Wood 1985 for the moments.
    Departs:
        Points are cut to the pixel box. The paper fixes R (5 in l2, its code 0.1 in linf) and cuts the score at it, and
        takes the likelihood's end point, which runs far past the data. The gradient at the image counts too. The score
        of the largest sample alone and the p-value of the fit stand beside the score (``plain``, ``p_value``).
    Raises:
        UsageError: a radius smaller than the score, or a top that does not exist.
        ContractBroken: NaN logits or gradients, or a model without gradients.
    """
    loss, ball = readable(space), Ball(norm, torch.inf)
    at = measure(classifier, images, norm, loss, top=top, batch_size=batch_size)
    linear = torch.where(at.gap > 0, at.gap / at.filled(), 0)
    columns = nearest_columns(at, linear, max(rivals, top))

    def slopes(points: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        which = which.to(points.device)
        _, slope, _ = towards_rivals(classifier, points, images.y[rows], ball, RIVALS[loss], which.shape[1], which)
        return slope.gather(1, which)

    return scores(
        images, at, norm, loss, rng, columns, linear, slopes,
        lambda constant: torch.where(at.gap > 0, at.gap / constant, 0),
        floor=at.slope, top=top, radius=radius, blocks=blocks, samples=samples, fit=fit,
        batch_size=batch_size, on_batch=on_batch, name="clever",
        passes=lambda points: (points, points * columns.shape[1]),
    )  # fmt: skip
