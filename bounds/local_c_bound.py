"""The second-order bound with curvature sought in the ball around each image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robeval.bounds.curvature import dual_constant, refuse_kinks
from robeval.bounds.expansion import Draws, Expansion, OnBatch, Reading, expand, uncoupled
from robeval.bounds.lanczos import Product, Spectrum, lanczos
from robeval.bounds.margins import measure, nearest_columns, readable, readings, with_unseen
from robeval.bounds.neighbourhood import into_ball, largest_nearby, offsets, second_order_reach
from robeval.core.catalogue import bound
from robeval.core.classifier import Classifier
from robeval.core.images import Images


@bound(
    source="Finlay, Oberman 2019, arXiv:1905.11468, section 2.2, with constants of the ball in place of the test set;"
    " Singla, Feizi 2020, Second-Order Provable Defenses against Adversarial Attacks, arXiv:2006.00731, theorem 2",
    norms=("linf", "l2", "l1"),
    kind="estimate",
    order=2,
    smooth=True,
)
def local_c_bound(
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
    shells: int = 3,
    samples: int = 2,
    steps: int = 4,
    least: int = 8,
    tolerance: float = 1e-2,
) -> list[Reading]:
    """Largest r with |g_j| r + integral_0^r (r - s) C_j(s) ds < f_y - f_j, C_j(s) the largest curvature within s.

    C_j(s) is a step function of several shells, each searched by random points and by ascent on the largest eigenvalue
    along the gradient of its Rayleigh quotient. It is an ESTIMATE: a search finds a lower bound of the supremum.

    Args:
        space: What f_j and f_y are.
        top: The class is to stay among so many best ones; 1 means the best.
        rivals: Rivals per image that are searched, the nearest first; others get the largest of the searched constants.
        shells: Steps of C_j(s).
        samples: Random points per shell, beside the image itself.
        steps: Steps of ascent per shell and rival.
        least: Hessian-vector products at a point before the Lanczos residual is believed.
        tolerance: Largest Lanczos residual relative to the eigenvalue.

    Shapes:
        images (N, C, H, W) in [0, 1]; one reading per image, in their order.
    Cost:
        About rivals * shells * (samples + steps + 1) * (least + 4) backward passes.
    Source:
        Singla and Feizi 2020, arXiv:2006.00731, theorem 2, for a curvature bound turned into a radius.
    Departs:
        C is searched, not proven. The balls end at gap / slope of the image itself, which no radius can exceed. In linf
        the largest eigenvalue counts d-fold, since |w|_2^2 is at most d there; in l1 it is at most 1.
    Raises:
        UsageError: a top that the loss does not have.
        ContractBroken: a network without second derivatives, or images that influence each other.
    """
    found: list[Reading] = []
    loss = readable(space)
    size = images.x[0].numel()
    for rows in torch.arange(len(images)).split(batch_size):
        some = images[rows.to(images.x.device)]
        at = measure(classifier, some, norm, loss, top=top, batch_size=batch_size)
        linear = torch.where(at.gap > 0, at.gap / at.filled(), 0)
        reach = linear.gather(1, at.deciding(linear, top)[:, None])[:, 0]
        reach = torch.where(reach.isfinite(), reach, 1)  # a slope of 0 at the image: look around it all the same
        steps_out = reach[:, None] * torch.arange(1, shells + 1) / shells
        columns = nearest_columns(at, linear, max(rivals, top))
        search = _Search(classifier, some, loss, rng, least, tolerance)
        if not len(found):
            search.check(columns[:, 0])
        curvature = torch.full((*at.gap.shape, shells), -torch.inf, dtype=torch.float64)
        searched = torch.zeros_like(at.gap, dtype=torch.bool).scatter(1, columns, True)
        every = torch.arange(len(some))
        for k in range(shells):
            eps = steps_out[:, k].repeat_interleave(samples)
            drawn = offsets(norm, tuple(some.x.shape[1:]), samples, rng, some.ids.tolist(), k).to(some.x)
            around = some.x.repeat_interleave(samples, 0)
            start = into_ball(norm, around, around + drawn * eps.to(drawn).view(-1, 1, 1, 1), eps)
            start = torch.cat([some.x[:, None], start.view(len(some), samples, *some.x.shape[1:])], 1).flatten(0, 1)
            for rival in columns.T:
                search.rival = rival.to(some.y.device)
                seen = largest_nearby(
                    norm, some.x, steps_out[:, k], start, search.value, search.uphill, steps, batch_size
                ).cpu()
                curvature[every, rival, k:] = torch.maximum(curvature[every, rival, k:], seen[:, None])
        constant = dual_constant(with_unseen(curvature, searched), norm, size)
        radius = torch.stack(
            [
                second_order_reach(at.gap[:, j], at.filled()[:, j], steps_out, constant[:, j])
                for j in range(at.gap.shape[1])
            ],
            1,
        ).masked_fill(at.gap.isinf(), torch.inf)
        found += readings(
            some, at, radius, at.deciding(radius, top), constant[:, :, -1], loss=loss, domain="ball",
            forwards=1 + search.forwards, backwards=at.backwards + search.backwards,
            curvature=curvature[:, :, -1], reach=reach, samples=samples * shells,
        )  # fmt: skip
        if on_batch:
            on_batch(int(rows[-1]) + 1, len(images), "local-c-bound")
    return found


class _Search:
    """Largest eigenvalues at points around some images, and the gradient of each with respect to its point."""

    def __init__(self, classifier: Classifier, images: Images, loss: str, rng: Draws, least: int, tolerance: float):
        self.classifier, self.images, self.loss = classifier, images, loss
        self.rng, self.least, self.tolerance = rng, least, tolerance
        self.rival = images.y
        self.forwards = torch.zeros(len(images), dtype=torch.int64)
        self.backwards = torch.zeros(len(images), dtype=torch.int64)

    def expand(self, points: Tensor, rows: Tensor) -> Expansion:
        """The margin near points; ``rows`` says around which image each lies."""
        self.forwards += torch.bincount(rows.cpu(), minlength=len(self.forwards))
        self.backwards += torch.bincount(rows.cpu(), minlength=len(self.forwards))
        y, rival = self.images.y[rows], self.rival[rows]
        return expand(self.classifier, points, y, self.loss, 1.0, second=True, rival=rival)

    def draw(self, rows: Tensor, number: int) -> Tensor:
        ids = self.images.ids[rows].tolist()
        return self.rng(ids, 1000 + number).normal(self.images.x[0].numel()).to(self.images.x)

    def check(self, rival: Tensor) -> None:
        """Refuse kinks and images that influence each other."""
        self.rival = rival.to(self.images.y.device)
        rows = torch.arange(len(self.images), device=self.rival.device)
        at = self.expand(self.images.x, rows)
        refuse_kinks(at.logits)
        uncoupled(at.product, self.draw(rows, 0))

    def spectrum(self, points: Tensor, rows: Tensor, vectors: bool) -> tuple[Expansion, Spectrum]:
        whole = self.expand(points, rows)

        def products(left: Tensor) -> Product:
            return (whole if len(left) == len(points) else self.expand(points[left], rows[left])).product

        found = lanczos(
            products, lambda left, number: self.draw(rows[left], number), len(points), points[0].numel(),
            starts=1, least=self.least, tolerance=self.tolerance, vectors=vectors,
        )  # fmt: skip
        self.backwards.index_add_(0, rows.cpu(), found.products.cpu())
        return whole, found

    def value(self, points: Tensor, rows: Tensor) -> Tensor:
        return self.spectrum(points, rows, False)[1].largest

    def uphill(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The largest eigenvalue and its gradient, that of v^T H v for its Ritz vector v."""
        at, found = self.spectrum(points, rows, True)
        if not at.gradient.requires_grad:
            return found.largest, torch.zeros_like(points)
        v = torch.zeros_like(at.point)
        v[: at.rows] = found.vector.view_as(points)
        with torch.enable_grad():
            (hv,) = torch.autograd.grad(at.gradient, at.point, v, create_graph=True, materialize_grads=True)
            quotient = (hv * v).sum()
        self.backwards += 2 * torch.bincount(rows.cpu(), minlength=len(self.backwards))
        if not quotient.requires_grad:  # a quadratic margin: the same curvature everywhere
            return found.largest, torch.zeros_like(points)
        (gradient,) = torch.autograd.grad(quotient, at.point, materialize_grads=True)
        return found.largest, gradient[: at.rows]
