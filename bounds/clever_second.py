"""Second-order CLEVER: the end point of a reverse Weibull fit to sampled curvatures."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robeval.bounds.curvature import dual_constant, refuse_kinks, second_order_radius
from robeval.bounds.expansion import Draws, OnBatch, Reading, expand, uncoupled
from robeval.bounds.lanczos import Product, lanczos
from robeval.bounds.margins import measure, nearest_columns, readable
from robeval.bounds.weibull import scores
from robeval.core.catalogue import bound
from robeval.core.classifier import Classifier
from robeval.core.images import Images


@bound(
    source="Weng, Zhang, Chen, Lozano, Hsieh, Daniel 2018, On Extensions of CLEVER: A Neural Network Robustness"
    " Evaluation Algorithm, arXiv:1810.08640, section 2",
    norms=("linf", "l2", "l1"),
    kind="estimate",
    order=2,
    smooth=True,
)
def clever_second(
    classifier: Classifier,
    images: Images,
    norm: str,
    rng: Draws,
    batch_size: int = 256,
    on_batch: OnBatch | None = None,
    *,
    space: Literal["logits", "probabilities"] = "logits",
    top: int = 1,
    rivals: int = 2,
    radius: float | None = None,
    blocks: int = 12,
    samples: int = 4,
    fit: Literal["moments", "likelihood"] = "moments",
    least: int = 8,
    tolerance: float = 1e-2,
) -> list[Reading]:
    """The root of slope r + C_j r^2 / 2 = gap with a local curvature that is extrapolated from random points.

    Of every block of points uniform in the ball the largest eigenvalue of the Hessian of f_j - f_y is kept, a reverse
    Weibull distribution is fitted to these, and its right end point is C_j, at least 0. It is an ESTIMATE.

    Args:
        space: What f_j and f_y are.
        top: The class is to stay among so many best ones; 1 means the best.
        rivals: Rivals per image that are sampled, the nearest first; others get the largest constant of these.
        radius: Radius R of the balls in pixels of [0, 1]; none means gap / slope of the image itself, which no score
            exceeds. One that is smaller than a score is refused.
        blocks: Blocks N_b per image.
        samples: Points N_s per block.
        fit: moments, probability-weighted; likelihood, the maximum, whose end point is unstable.
        least: Hessian-vector products at a point before the Lanczos residual is believed.
        tolerance: Largest Lanczos residual relative to the eigenvalue.

    Shapes:
        images (N, C, H, W) in [0, 1]; one reading per image, in their order.
    Cost:
        blocks * samples * rivals * (least + 5) backward passes.
    Source:
        Weng et al. 2018, arXiv:1810.08640, section 2; Hosking, Wallis and Wood 1985 for the moments.
    Departs:
        Points are cut to the pixel box. The paper takes l2; in linf the eigenvalue counts d-fold, in l1 once. Far
        fewer points than the paper's, since each costs a Lanczos run. The score of the largest sample alone and the
        p-value of the fit stand beside the score (``plain``, ``p_value``).
    Raises:
        UsageError: a radius smaller than the score, or a top that does not exist.
        ContractBroken: a network without second derivatives, or images that influence each other.
    """
    loss = readable(space)
    at = measure(classifier, images, norm, loss, top=top, batch_size=batch_size)
    linear = torch.where(at.gap > 0, at.gap / at.filled(), 0)
    columns = nearest_columns(at, linear, max(rivals, top))
    size, products = images.x[0].numel(), torch.zeros(len(images), dtype=torch.int64)
    more = torch.zeros_like(products)

    def draw(rows: Tensor, number: int) -> Tensor:
        return rng(images.ids[rows].tolist(), 100_000 + number).normal(size).to(images.x)

    def largest(points: Tensor, rows: Tensor, rival: Tensor) -> Tensor:
        y, rival = images.y[rows], rival.to(rows.device)
        whole = expand(classifier, points, y, loss, 1.0, second=True, rival=rival)

        def product(left: Tensor) -> Product:
            if len(left) == len(points):
                return whole.product
            more.index_add_(0, rows[left].cpu(), torch.ones_like(left).cpu())
            return expand(classifier, points[left], y[left], loss, 1.0, second=True, rival=rival[left]).product

        if not products.any():
            refuse_kinks(whole.logits)
            uncoupled(whole.product, draw(rows, 0))
        found = lanczos(
            product, lambda left, number: draw(rows[left], number), len(points), size,
            starts=1, least=least, tolerance=tolerance,
        )  # fmt: skip
        products.index_add_(0, rows.cpu(), found.products.cpu())
        return found.largest

    def curvatures(points: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        return torch.stack([largest(points, rows, which[:, k]) for k in range(which.shape[1])], 1)

    return scores(
        images, at, norm, loss, rng, columns, linear, curvatures,
        lambda constant: second_order_radius(at.gap, at.filled(), dual_constant(constant, norm, size)),
        floor=torch.full_like(at.gap, torch.nan), top=top, radius=radius, blocks=blocks, samples=samples, fit=fit,
        batch_size=batch_size, on_batch=on_batch, name="clever-second",
        passes=lambda points: (points * columns.shape[1] + more, points * columns.shape[1] + more + products),
    )  # fmt: skip
