"""End points of reverse Weibull fits to block maxima, and CLEVER's scores. Machinery of the bounds, no bound itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from robeval.bounds.expansion import Draws, OnBatch, Reading
from robeval.bounds.margins import Margins, readings
from robeval.bounds.neighbourhood import into_ball, offsets
from robeval.core.errors import UsageError
from robeval.core.images import Images

Fit = Literal["moments", "likelihood"]

#: Smallest shape that is believed. Below it the end point runs off to infinity; Weibull's k is one over this number.
SHAPE = 0.1
#: Maxima that differ by less than this share of themselves are one number.
SPREAD = 1e-9


def end_point(maxima: np.ndarray, fit: Fit = "moments") -> tuple[float, float]:
    """Right end point a of F(y) = exp(-((a - y) / s)^k) fitted to block maxima, and the p-value of the fit.

    moments are probability-weighted: with L-moments l1, l2, t3 of the maxima and c = 2 / (3 + t3) - log 2 / log 3, the
    shape is 7.8590 c + 2.9554 c^2 (Hosking, Wallis, Wood 1985), at least SHAPE. likelihood is scipy's maximum. The end
    point is at least the largest maximum; where the maxima do not vary it is that, and the p-value is nan.

    Returns:
        The end point and the p-value of the Kolmogorov-Smirnov test, which is too kind since the fit saw the data.
    """
    y = np.sort(np.asarray(maxima, dtype=np.float64))
    if len(y) < 3 or y[-1] - y[0] <= SPREAD * max(abs(y[-1]), abs(y[0])):
        return float(y[-1]), math.nan
    if fit == "likelihood":
        k, end, scale = stats.weibull_max.fit(y, loc=y[-1] + (y[-1] - y[0]) / 10, scale=y[-1] - y[0])
    else:
        n = len(y)
        rank = np.arange(n)
        b0, b1 = y.mean(), (rank * y).sum() / (n * (n - 1))
        b2 = (rank * (rank - 1) * y).sum() / (n * (n - 1) * (n - 2))
        l2, l3 = 2 * b1 - b0, 6 * b2 - 6 * b1 + b0
        c = 2 / (3 + l3 / l2) - math.log(2) / math.log(3)
        shape = max(7.8590 * c + 2.9554 * c * c, SHAPE)
        spread = l2 * shape / ((1 - 2**-shape) * special.gamma(1 + shape))
        end = b0 - spread * (1 - special.gamma(1 + shape)) / shape + spread / shape
        k, scale = 1 / shape, spread / shape
    p = stats.kstest(y, stats.weibull_max(k, loc=end, scale=scale).cdf).pvalue
    return max(float(end), float(y[-1])), float(p)


def scores(
    images: Images,
    at: Margins,
    norm: str,
    loss: str,
    rng: Draws,
    columns: Tensor,
    linear: Tensor,
    evaluate: Callable[[Tensor, Tensor, Tensor], Tensor],
    radius_of: Callable[[Tensor], Tensor],
    *,
    floor: Tensor,
    top: int,
    radius: float | None,
    blocks: int,
    samples: int,
    fit: Fit,
    batch_size: int,
    on_batch: OnBatch | None,
    name: str,
    passes: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> list[Reading]:
    """Draw blocks of points around each image, fit the largest value of each block, and turn end points into radii.

    Args:
        images: N images.
        at: Their margins.
        norm: Norm of the ball.
        loss: Name of the margins.
        rng: Random streams.
        columns: (N, r), rivals whose constants are sampled; the others get the largest of these.
        linear: (N, M), radii from the image alone, which no larger constant can exceed.
        evaluate: (points, rows, rivals (m, r)) -> (m, r), the sampled quantity.
        radius_of: (N, M) constants -> (N, M) radii.
        floor: (N, M), the quantity at the image itself, nan where unknown.
        top: Rank of the class that must hold.
        radius: Radius of the balls; none means the smallest of ``linear``, image by image.
        blocks: Blocks per image.
        samples: Points per block.
        fit: How the end point is found.
        batch_size: Most points at once.
        on_batch: Told after every batch.
        name: Name of the bound.
        passes: Points per image -> forwards and backwards per image.

    Raises:
        UsageError: a radius smaller than a score that the samples in it would claim.
    """
    n, places = len(images), torch.arange(len(images))
    own = linear.gather(1, at.deciding(linear, top)[:, None])[:, 0]
    reach = torch.where(own.isfinite(), own, 1) if radius is None else torch.full_like(own, radius)
    ends, most = floor.clone(), floor.clone()
    p_value = torch.full_like(floor, math.nan)
    chunk = max(1, batch_size // samples)
    shape = tuple(images.x.shape[1:])
    for rows in places.split(chunk):
        here = rows.to(images.x.device)
        each, wide = here.repeat_interleave(samples), reach[rows].repeat_interleave(samples)
        around = images.x[each]
        maxima = []
        for block in range(blocks):
            drawn = offsets(norm, shape, samples, rng, images.ids[here].tolist(), block).to(around)
            points = into_ball(norm, around, around + drawn * wide.to(drawn).view(-1, 1, 1, 1), wide)
            pairs = zip(points.split(batch_size), each.split(batch_size), strict=True)
            seen = torch.cat([evaluate(p, e, columns[e.cpu()]) for p, e in pairs])
            maxima.append(seen.view(len(rows), samples, -1).amax(1).cpu())
        found = torch.stack(maxima, 2)
        for i, image in enumerate(rows.tolist()):
            for rival, values in zip(columns[image].tolist(), found[i], strict=True):
                end, p = end_point(values.numpy(), fit)
                known = float(floor[image, rival].nan_to_num(-math.inf))
                ends[image, rival], most[image, rival] = max(end, known), max(float(values.max()), known)
                p_value[image, rival] = p
        if on_batch:
            on_batch(int(rows[-1]) + 1, n, name)
    sampled = torch.zeros_like(floor, dtype=torch.bool).scatter(1, columns, True)
    ends, most = (_others(constants, sampled) for constants in (ends, most))
    result = radius_of(ends)
    which, plain = at.deciding(result, top), radius_of(most)
    claimed = result.gather(1, which[:, None])[:, 0]
    over = claimed > reach * (1 + 1e-9)
    if radius is not None and over.any():
        raise UsageError(
            f"radius={radius:g} of {name} is smaller than the score of {int(over.sum())} images",
            code="A04",
            why="a score beyond the ball that was sampled rests on nothing",
            do=f"radius={float(claimed[over].max()) * 1.01:.3g}, or leave radius out",
        )
    forwards, backwards = passes(torch.full((n,), blocks * samples))
    return readings(
        images, at, result, which, ends, loss=loss, domain="ball", forwards=1 + forwards,
        backwards=at.backwards + backwards, reach=reach, samples=samples, blocks=blocks, p_value=p_value,
        plain=plain.gather(1, at.deciding(plain, top)[:, None])[:, 0],
    )  # fmt: skip


def _others(constants: Tensor, sampled: Tensor) -> Tensor:
    """Constants, rivals that were not sampled raised to the largest of those that were. (N, M)."""
    most = constants.masked_fill(~sampled, -math.inf).amax(1, keepdim=True)
    return torch.where(sampled, constants, torch.maximum(constants.nan_to_num(-math.inf), most))
