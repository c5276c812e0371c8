"""Curvature of margins at many images, and the radius that it gives. Machinery of the bounds, no bound itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.bounds.expansion import Draws, Expansion, OnBatch, expand, kinks, uncoupled
from robeval.bounds.lanczos import End, Product, Spectrum, lanczos
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken
from robeval.core.images import Images

#: Most entries of the Lanczos basis of one chunk of images, about 1 GiB in float32.
ENTRIES = 1 << 28


@dataclass
class Curvatures:
    """What was found at n images, float64 on the CPU; the passes are int64.

    Args:
        constant: (n,), at least the largest w^T H w over the unit ball of the norm, if the eigenvalue is right.
        largest: (n,), largest eigenvalue of the Hessian.
        smallest: (n,), smallest; nan unless it was asked for.
        residual: (n,), an eigenvalue lies this close to the largest.
        forwards: (n,).
        backwards: (n,).
    """

    constant: Tensor
    largest: Tensor
    smallest: Tensor
    residual: Tensor
    forwards: Tensor
    backwards: Tensor


def second_order_radius(gap: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """Root r of slope r + curvature r^2 / 2 = gap: 2 gap / (slope + sqrt(slope^2 + 2 curvature gap)).

    The usual form, (sqrt(slope^2 + 2 C gap) - slope) / C, cancels to 0 for small C. A curvature of 0 gives gap / slope,
    and infinity when the slope is 0 too; a gap of 0 gives 0, and an infinite one infinity.
    Shapes: all broadcast together.
    """
    finite = torch.where(gap.isfinite(), gap, 0)
    root = slope + (slope.square() + 2 * curvature.clamp_min(0) * finite).sqrt()
    return torch.where(gap.isfinite(), torch.where(gap > 0, 2 * finite / root, 0), torch.inf)


def dual_constant(largest: Tensor, norm: str, size: int) -> Tensor:
    """Upper bound of w^T H w over |w| <= 1 from the largest eigenvalue: |w|_2^2 is at most d in linf and 1 in l1."""
    return largest.clamp_min(0) * (size if norm == "linf" else 1)


def in_double_images(images: Images) -> Images:
    return Images(images.x.double(), images.y, images.ids, images.name, images.classes, images.note)


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


def curvatures(
    classifier: Classifier,
    images: Images,
    norm: str,
    loss: str,
    temperature: float,
    rng: Draws,
    *,
    rival: Tensor | None,
    batch_size: int,
    on_batch: OnBatch | None,
    ends: End,
    tolerance: float,
    starts: int,
    least: int,
    steps: int | None,
    whole: int,
    first: bool,
) -> Curvatures:
    """Extreme eigenvalues of each image's Hessian by Lanczos, or in linf and l1 the whole Hessian of a small image.

    Args:
        classifier: Pixels in [0, 1] to logits.
        images: n images.
        norm: Norm of the constant.
        loss: The margin, towards ``rival`` (n,) if it is one per rival.
        temperature: Sharpness of the soft losses.
        rng: Random streams of the images.
        rival: (n,) or none.
        batch_size: Most images at once.
        on_batch: Told after every batch.
        ends: Ends of the spectrum that must converge.
        tolerance: Largest residual relative to the eigenvalue.
        starts: Random starts.
        least: Products before a residual is believed.
        steps: Most products.
        whole: Most pixels for a whole Hessian.
        first: Check the network for kinks and coupled images.
    """
    size = images.x[0].numel()
    dense = norm != "l2" and size <= whole
    chunk = max(1, min(batch_size, ENTRIES // (size * (size if dense else min(steps or 50, size)))))
    parts: list[Curvatures] = []
    for rows in torch.arange(len(images)).split(chunk):
        some = images[rows.to(images.x.device)]
        near = _Near(classifier, some, loss, temperature, rng, None if rival is None else rival[rows])
        if first and not parts:
            near.check()
        if dense:
            parts.append(_whole(near, norm))
        else:
            found = lanczos(
                near.products, near.draw, len(some), size,
                end=ends, starts=starts, least=least, steps=steps, tolerance=tolerance,
            )  # fmt: skip
            parts.append(_sparse(near, found, norm, size, ends))
        if on_batch:
            on_batch(int(rows[-1]) + 1, len(images), "c-bound")
    return Curvatures(*(torch.cat([getattr(p, name) for p in parts]) for name in Curvatures.__dataclass_fields__))


class _Near:
    """The Hessians of some images, with the graph of their first expansion kept for every product of all."""

    def __init__(
        self, classifier: Classifier, images: Images, loss: str, temperature: float, rng: Draws, rival: Tensor | None
    ):
        self.classifier, self.images, self.loss, self.temperature = classifier, images, loss, temperature
        self.rng, self.rival = rng, rival
        self.forwards = torch.zeros(len(images), dtype=torch.int64)
        self.checks = 0
        self.all = self.expand(torch.arange(len(images)))

    def expand(self, rows: Tensor) -> Expansion:
        """Value, gradient and products of some of the images."""
        self.forwards[rows] += 1
        x, here = self.images.x, rows.to(self.images.x.device)
        rival = None if self.rival is None else self.rival[rows].to(x.device)
        y = self.images.y[here]
        return expand(self.classifier, x[here], y, self.loss, self.temperature, second=True, rival=rival)

    def products(self, rows: Tensor) -> Product:
        return (self.all if len(rows) == len(self.images) else self.expand(rows)).product

    def draw(self, rows: Tensor, number: int) -> Tensor:
        x = self.images.x
        ids = self.images.ids[rows.to(x.device)].tolist()
        return self.rng(ids, number).normal(x[0].numel()).to(x.dtype)

    def check(self) -> None:
        """Refuse kinks and images that influence each other."""
        refuse_kinks(self.all.logits)
        uncoupled(self.all.product, self.draw(torch.arange(len(self.images)), 0))
        self.checks = 2 if len(self.images) > 1 else 0


def _sparse(near: _Near, found: Spectrum, norm: str, size: int, ends: End) -> Curvatures:
    largest = found.largest.cpu()
    smallest = found.smallest.cpu() if ends == "both" else torch.full_like(largest, torch.nan)
    backwards = near.forwards + found.products.cpu() + near.checks
    constant = largest if norm == "l2" else dual_constant(largest, norm, size)
    return Curvatures(constant, largest, smallest, found.residual_largest.cpu(), near.forwards, backwards)


def _whole(near: _Near, norm: str) -> Curvatures:
    """From the whole Hessians: the smaller of two upper bounds of w^T H w over |w| <= 1."""
    h = near.all.hessian().double().cpu()
    if not h.isfinite().all():
        raise ContractBroken("a Hessian-vector product is NaN or infinite", code="B02", do="try float64=true")
    size = h.shape[1]
    ends = torch.linalg.eigvalsh((h + h.mT) / 2)
    entries = h.abs().flatten(1).sum(1) if norm == "linf" else h.abs().flatten(1).amax(1)
    constant = torch.minimum(dual_constant(ends[:, -1], norm, size), entries)
    backwards = near.forwards + size + near.checks
    return Curvatures(constant, ends[:, -1], ends[:, 0], 0 * ends[:, 0], near.forwards, backwards)
