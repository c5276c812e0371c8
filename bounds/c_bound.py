"""The second-order bound of Finlay and Oberman with a sampled curvature constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from robeval.bounds.expansion import Draws, Expansion, OnBatch, Reading, expand, in_double, kinks, uncoupled
from robeval.bounds.lanczos import Spectrum, lanczos
from robeval.core.catalogue import bound
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.images import Images

#: Most entries of the Lanczos basis of one chunk of images, about 1 GiB in float32.
ENTRIES = 1 << 28


@bound(
    source="Finlay, Oberman 2019, Scaleable input gradient regularization for adversarial robustness,"
    " arXiv:1905.11468, section 2.2",
    norms=("l2",),
    kind="estimate",
    order=2,
    smooth=True,
)
def c_bound(
    classifier: Classifier,
    images: Images,
    norm: str,
    rng: Draws,
    batch_size: int = 256,
    on_batch: OnBatch | None = None,
    *,
    loss: Literal["softcw_lse", "softcw_prob", "cw_prob", "cw"] = "softcw_lse",
    temperature: float = 10.0,
    tolerance: float = 1e-3,
    starts: int = 2,
    least: int = 12,
    steps: int | None = None,
    float64: bool = False,
) -> list[Reading]:
    """Margin, slope and the largest curvature of the given images: the root of slope r + C r^2 / 2 = margin.

    C is the largest signed eigenvalue of the loss Hessian over ALL given images, misclassified ones included, at least
    0. It is an ESTIMATE, since curvature between and around the images can be larger than any value at an image.

    Args:
        loss: softcw_lse, a smooth upper bound of cw_prob; softcw_prob, for reproduction only, since its sign is not
            exactly the verdict; cw_prob and cw for two classes, where they have no kink.
        temperature: Sharpness of the two soft losses.
        tolerance: Largest Lanczos residual relative to the eigenvalue.
        starts: Random starts per image; the largest value found counts.
        least: Products per start before a residual is believed.
        steps: Most products per start; none means 50, or 100 for images of 10,000 pixels or more.
        float64: Compute in double precision.

    Shapes:
        images (N, C, H, W) in [0, 1]; one reading per image, in their order.
    Cost:
        About 2 forward passes and 28 backward passes per image: a product is one backward pass.
    Source:
        Finlay and Oberman 2019, arXiv:1905.11468, section 2.2; curvature by Lanczos 1950.
    Departs:
        The smooth maximum lies above the true one, so that a negative loss implies a correct class; the paper's code
        takes a mean that lies below it (softcw_prob). The root is taken in the form without cancellation.
    Raises:
        UsageError: another norm than l2.
        ContractBroken: a network or loss without second derivatives, or images that influence each other.
    """
    if norm != "l2":
        raise UsageError(f"c-bound has no {norm} form", code="A06", do="its norms: l2; choose with --norm")
    if loss.startswith("cw") and classifier.classes > 2:
        raise ContractBroken(
            f"{loss} is a maximum over {classifier.classes - 1} classes and is not twice differentiable",
            code="B01",
            do="c-bound:loss=softcw_lse",
        )
    if float64:
        classifier, images = in_double(classifier), _double(images)
    size = images.x[0].numel()
    chunk = max(1, min(batch_size, ENTRIES // (size * min(steps or 50, size))))
    parts = []
    for rows in torch.arange(len(images)).split(chunk):
        some = images[rows.to(images.x.device)]
        parts.append(_curvature(classifier, some, rng, loss, temperature, tolerance, starts, least, steps))
        if on_batch:
            on_batch(int(rows[-1]) + 1, len(images), "c-bound")
    value, slope, curvature, residual = (torch.cat([p[k] for p in parts]) for k in range(4))
    prediction, forwards, products = (torch.cat([p[k] for p in parts]) for k in range(4, 7))
    constant = curvature.max().clamp_min(0)
    gap = (-value).clamp_min(0).masked_fill(prediction != images.y.cpu(), 0)
    radius = second_order_radius(gap, slope, constant)
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
            forwards=int(forwards[i]),
            backwards=int(forwards[i] + products[i]),
            curvature=float(curvature[i]),
            residual=float(residual[i]),
            samples=starts,
        )
        for i in range(len(images))
    ]


def second_order_radius(gap: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """Root r of slope r + curvature r^2 / 2 = gap: 2 gap / (slope + sqrt(slope^2 + 2 curvature gap)).

    The usual form, (sqrt(slope^2 + 2 C gap) - slope) / C, cancels to 0 for small C. A curvature of 0 gives gap / slope,
    and infinity when the slope is 0 too; a gap of 0 gives 0. Shapes: (n,), (n,), () -> (n,).
    """
    root = slope + (slope.square() + 2 * curvature.clamp_min(0) * gap).sqrt()
    return torch.where(gap > 0, 2 * gap / root, 0)


def _double(images: Images) -> Images:
    return Images(images.x.double(), images.y, images.ids, images.name, images.classes, images.note)


def _curvature(
    classifier: Classifier,
    images: Images,
    rng: Draws,
    loss: str,
    temperature: float,
    tolerance: float,
    starts: int,
    least: int,
    steps: int | None,
) -> tuple[Tensor, ...]:
    """Value, slope, largest eigenvalue, residual, prediction, forwards and products of each image of a chunk."""
    x, y, device = images.x, images.y, images.x.device
    forwards = torch.zeros(len(x), dtype=torch.int64)
    first: list[Expansion] = []

    def draw(rows: Tensor, number: int) -> Tensor:
        return rng(images.ids[rows.to(device)].tolist(), number).normal(x[0].numel()).to(x.dtype)

    def products(rows: Tensor) -> Callable[[Tensor], Tensor]:
        if first and len(rows) == len(x):  # the second start walks over the graph of the first
            return first[0].product
        at = expand(classifier, x[rows.to(device)], y[rows.to(device)], loss, temperature, second=True)
        forwards[rows] += 1
        if not first:
            first.append(at)
            refuse_kinks(at.logits)
            uncoupled(at.product, draw(rows, 0))
        return at.product

    found: Spectrum = lanczos(
        products, draw, len(x), x[0].numel(), starts=starts, least=least, steps=steps, tolerance=tolerance
    )
    at = first[0]
    return (
        at.value.detach()[: at.rows].double().cpu(),
        at.gradient.detach()[: at.rows].flatten(1).double().norm(dim=1).cpu(),
        found.largest.cpu(),
        found.residual_largest.cpu(),
        at.logits.detach()[: at.rows].argmax(1).cpu(),
        forwards,
        found.products.cpu() + (2 if len(x) > 1 else 0),
    )


def refuse_kinks(logits: Tensor) -> None:
    """Refuse a network in whose graph a function has no second derivative.

    Raises:
        ContractBroken: with the names of the functions.
    """
    found = kinks(logits)
    if found:
        raise ContractBroken(
            f"c-bound needs a twice differentiable network; this one uses {', '.join(found)}",
            code="B01",
            why="the Hessian of a piecewise linear function is 0 almost everywhere and says nothing about its kinks",
            do="train with act=smooth (robeval train standard --model-arg act=smooth), or use l-bound",
        )
