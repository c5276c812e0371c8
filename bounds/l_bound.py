"""The first-order bound of Finlay and Oberman with sampled Lipschitz constants."""

from __future__ import annotations

from typing import Literal

import torch

from robeval.bounds.expansion import Draws, OnBatch, Reading
from robeval.bounds.margins import largest_per_column, measure, readings
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
    presets={"l-bound-paper": {"loss": "cw_prob"}},
)
def l_bound(
    classifier: Classifier,
    images: Images,
    norm: str,
    rng: Draws,
    batch_size: int = 256,
    on_batch: OnBatch | None = None,
    *,
    loss: Literal["rivals", "rivals_prob", "cw", "cw_prob", "softcw_lse", "softcw_prob"] = "rivals",
    top: int = 1,
    temperature: float = 10.0,
    level: float | None = None,
) -> list[Reading]:
    """Gap over the largest gradient of the given images, rival by rival: radius = min_j (f_y - f_j) / L_j.

    L_j is the largest dual norm of the gradient of f_j - f_y over ALL given images, misclassified ones included. It is
    an ESTIMATE, since the supremum over the balls around the images can be larger than any value at an image.

    Args:
        loss: rivals, every rival's logit less the true one's, each with a constant of its own; rivals_prob, the same of
            probabilities; or one loss with one constant: cw on logits, cw_prob on probabilities (the paper's, preset
            l-bound-paper), softcw_lse, which lies above cw_prob, softcw_prob, which lies below it.
        top: The class is to stay among so many best ones; 1 means the best.
        temperature: Sharpness of the two soft losses; the others ignore it.
        level: Value of the loss at which the class can change; none means 0, and -log(K) / temperature for softcw_prob.

    Shapes:
        images (N, C, H, W) in [0, 1]; one reading per image, in their order.
    Cost:
        One forward pass per image, and one backward pass for each of its 10 best rivals; one for a single loss.
    Source:
        Finlay and Oberman 2019, arXiv:1905.11468, section 2.2.
    Departs:
        The paper takes one constant for the best rival's probability; a constant per rival and logits, whose gap does
        not saturate, give larger radii. A rival that is among no image's 10 best gets the largest constant of all.
    Raises:
        UsageError: a top that the loss does not have.
        ContractBroken: NaN logits or gradients, or a model without gradients.
    """
    at = measure(
        classifier, images, norm, loss, temperature,
        top=top, zero=level, batch_size=batch_size, on_batch=on_batch, name="l-bound",
    )  # fmt: skip
    constant = largest_per_column(at.slope).expand_as(at.gap)
    radius = torch.where(at.gap > 0, at.gap / constant, 0)  # infinite for a network that is constant on all images
    return readings(images, at, radius, at.deciding(radius, top), constant, loss=loss, domain="test set")
