"""The first-order bound with gradients sought in the ball around each image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robeval.bounds.expansion import Draws, OnBatch, Reading, expand
from robeval.bounds.margins import measure, nearest_columns, readable, readings, with_unseen
from robeval.bounds.neighbourhood import first_order_reach, into_ball, largest_nearby, offsets
from robeval.core.ball import Ball
from robeval.core.catalogue import bound
from robeval.core.classifier import Classifier
from robeval.core.images import Images


@bound(
    source="Finlay, Oberman 2019, arXiv:1905.11468, section 2.2, with constants of the ball in place of the test set;"
    " Hein, Andriushchenko 2017, Formal Guarantees on the Robustness of a Classifier against Adversarial Manipulation,"
    " arXiv:1705.08475, theorem 2.1",
    norms=("linf", "l2", "l1"),
    kind="estimate",
    order=1,
    smooth=False,
)
def local_l_bound(
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
    shells: int = 4,
    samples: int = 8,
    steps: int = 10,
) -> list[Reading]:
    """Largest r with integral_0^r L_j(s) ds < f_y - f_j, L_j(s) the largest gradient found within distance s.

    L_j(s) is a step function of several shells, each searched by random points and by gradient ascent on the dual norm
    of the gradient. It is an ESTIMATE: a search finds a lower bound of the supremum over the ball.

    Args:
        space: What f_j and f_y are.
        top: The class is to stay among so many best ones; 1 means the best.
        rivals: Rivals per image that are searched, the nearest first; others get the largest of the searched slopes.
        shells: Steps of L_j(s).
        samples: Random points per shell.
        steps: Steps of gradient ascent per shell and rival; piecewise linear networks have no ascent.

    Shapes:
        images (N, C, H, W) in [0, 1]; one reading per image, in their order.
    Cost:
        1 + rivals * shells * (samples + steps + 1) forward passes and as many backward ones, plus one for each of the
        10 best rivals and one for each step.
    Source:
        Hein and Andriushchenko 2017, arXiv:1705.08475, theorem 2.1, for the integral.
    Departs:
        L is searched, not proven. The balls end at gap / slope of the image itself, since no larger radius can follow
        from a constant that is at least that slope.
    Raises:
        UsageError: a top that the loss does not have.
        ContractBroken: NaN logits or gradients, or a model without gradients.
    """
    found: list[Reading] = []
    loss = readable(space)
    ball = Ball(norm, torch.inf)
    for rows in torch.arange(len(images)).split(batch_size):
        some = images[rows.to(images.x.device)]
        at = measure(classifier, some, norm, loss, top=top, batch_size=batch_size)
        linear = torch.where(at.gap > 0, at.gap / at.filled(), 0)
        reach = linear.gather(1, at.deciding(linear, top)[:, None])[:, 0]
        reach = torch.where(reach.isfinite(), reach, 1)  # a slope of 0 at the image: look around it all the same
        steps_out = reach[:, None] * torch.arange(1, shells + 1) / shells
        columns = nearest_columns(at, linear, max(rivals, top))
        slopes = at.slope[:, :, None].repeat(1, 1, shells).nan_to_num(0)
        searched = torch.zeros_like(at.gap, dtype=torch.bool).scatter(1, columns, True)
        passes = torch.zeros(len(some), dtype=torch.int64)
        for k in range(shells):
            eps = steps_out[:, k]
            drawn = offsets(norm, tuple(some.x.shape[1:]), samples, rng, some.ids.tolist(), k).to(some.x)
            around = some.x.repeat_interleave(samples, 0)
            wide = eps.repeat_interleave(samples)
            start = into_ball(norm, around, around + drawn * wide.to(drawn).view(-1, 1, 1, 1), wide)
            for rival in columns.T:
                seen = _largest(classifier, some, rival, loss, ball, eps, start, steps, batch_size)
                slopes[torch.arange(len(some)), rival, k:] = torch.maximum(
                    slopes[torch.arange(len(some)), rival, k:], seen[:, None]
                )
                passes += samples + steps + (1 if steps else 0)
        slopes = with_unseen(slopes, searched)
        radius = torch.stack(
            [first_order_reach(at.gap[:, j], steps_out, slopes[:, j]) for j in range(at.gap.shape[1])], 1
        ).masked_fill(at.gap.isinf(), torch.inf)
        found += readings(
            some, at, radius, at.deciding(radius, top), slopes[:, :, -1], loss=loss, domain="ball",
            forwards=1 + passes, backwards=at.backwards + passes + len(columns.T) * shells * steps,
            reach=reach, samples=samples * shells,
        )  # fmt: skip
        if on_batch:
            on_batch(int(rows[-1]) + 1, len(images), "local-l-bound")
    return found


def _largest(
    classifier: Classifier,
    images: Images,
    rival: Tensor,
    loss: str,
    ball: Ball,
    eps: Tensor,
    start: Tensor,
    steps: int,
    batch_size: int,
) -> Tensor:
    """Largest dual norm of the gradient of f_j - f_y found within eps of each image. -> (n,) float64 on the CPU."""
    rival = rival.to(images.y.device)

    def value(points: Tensor, rows: Tensor) -> Tensor:
        at = expand(classifier, points, images.y[rows], loss, 1.0, rival=rival[rows])
        return ball.dual_norm(at.gradient[: at.rows].double())

    def uphill(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        at = expand(classifier, points, images.y[rows], loss, 1.0, second=True, rival=rival[rows])
        with torch.enable_grad():
            slope = ball.dual_norm(at.gradient)
        if not slope.requires_grad:  # a margin that is linear in the pixels
            return slope[: at.rows].double(), torch.zeros_like(points)
        (gradient,) = torch.autograd.grad(slope.sum(), at.point, materialize_grads=True)
        return slope.detach()[: at.rows].double(), gradient[: at.rows]

    return largest_nearby(ball.norm, images.x, eps, start, value, uphill, steps, batch_size).cpu()
