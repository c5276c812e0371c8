"""The first-order bound of Finlay and Oberman with a sampled Lipschitz constant."""

from __future__ import annotations

from typing import Literal

import torch

from robeval.bounds.expansion import Draws, OnBatch, Reading, expand
from robeval.core.ball import Ball
from robeval.core.catalogue import bound
from robeval.core.classifier import Classifier
from robeval.core.images import Images


@bound(
    source="Finlay, Oberman 2019, Scaleable input gradient regularization for adversarial robustness,"
    " arXiv:1905.11468, section 2.2",
    norms=("linf", "l2", "l1"),
    kind="estimate",
    order=1,
    smooth=False,
)
def l_bound(
    classifier: Classifier,
    images: Images,
    norm: str,
    rng: Draws,
    batch_size: int = 256,
    on_batch: OnBatch | None = None,
    *,
    loss: Literal["cw_prob", "cw", "softcw_lse"] = "cw_prob",
    temperature: float = 10.0,
) -> list[Reading]:
    """Margin over the largest loss gradient of the given images: radius = max(-loss, 0) / L.

    L is the largest dual norm of the loss gradient over ALL given images, misclassified ones included. It is an
    ESTIMATE, since the supremum over the balls around the images can be larger than any value at an image.

    Args:
        loss: The margin loss: cw_prob on probabilities, cw on logits, softcw_lse a smooth upper bound of cw_prob.
        temperature: Sharpness of softcw_lse; the others ignore it.

    Shapes:
        images (N, C, H, W) in [0, 1]; one reading per image, in their order.
    Cost:
        One forward and one backward pass per image.
    Source:
        Finlay and Oberman 2019, arXiv:1905.11468, section 2.2.
    Departs:
        None in the bound. The gradient of an image where rivals tie is that of one of them.
    Raises:
        ContractBroken: NaN logits or gradients, or a model without gradients.
    """
    ball = Ball(norm, float("inf"))
    slopes, values, predictions = [], [], []
    for rows in torch.arange(len(images)).split(batch_size):
        at = expand(classifier, images.x[rows], images.y[rows], loss, temperature)
        slopes.append(ball.dual_norm(at.gradient[: at.rows].double()).cpu())
        values.append(at.value.detach()[: at.rows].double().cpu())
        predictions.append(at.logits.detach()[: at.rows].argmax(1).cpu())
        if on_batch:
            on_batch(int(rows[-1]) + 1, len(images), "l-bound")
    slope, value, prediction = torch.cat(slopes), torch.cat(values), torch.cat(predictions)
    constant = slope.max()
    gap = (-value).clamp_min(0).masked_fill(prediction != images.y.cpu(), 0)
    radius = torch.where(gap > 0, gap / constant, 0)  # infinite for a network that is constant on all images
    kind = str(images.x.dtype).removeprefix("torch.")
    return [
        Reading(
            index=int(images.ids[i]),
            label=int(images.y[i]),
            prediction=int(prediction[i]),
            radius=float(radius[i]),
            loss=loss,
            loss_value=float(value[i]),
            gradient_norm=float(slope[i]),
            constant=float(constant),
            domain="test set",
            arithmetic=f"{kind}, rounding not enclosed",
            forwards=1,
            backwards=1,
        )
        for i in range(len(images))
    ]
