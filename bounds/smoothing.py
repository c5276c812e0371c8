"""Randomised smoothing: the most frequent class under Gaussian noise, and how far it must stay the most frequent."""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

from robeval.bounds.expansion import Draws, OnBatch, Reading
from robeval.core.catalogue import bound
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.images import Images

#: Noisy copies of one image that are drawn at once: fixed, so that its noise does not depend on the batch size.
BLOCK = 128


@bound(
    source="Cohen, Rosenfeld, Kolter 2019, Certified Adversarial Robustness via Randomized Smoothing,"
    " arXiv:1902.02918, algorithm 1 and theorem 1",
    norms=("l2", "linf"),
    kind="probabilistic",
    smooth=False,
)
def smoothing(
    classifier: Classifier,
    images: Images,
    norm: str,
    rng: Draws,
    batch_size: int = 256,
    on_batch: OnBatch | None = None,
    *,
    sigma: float = 0.25,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    target: float | None = None,
    looks: int = 8,
) -> list[Reading]:
    """Radius sigma * Phi^-1(p) of the SMOOTHED classifier, p a lower bound of how often noise gives its class.

    The smoothed classifier answers the class that the network gives most often to the image plus noise N(0, sigma^2).
    Its class is guessed from n0 votes and p is counted on n fresh ones; the statement is about the smoothed classifier,
    not about the network, and holds with probability 1 - alpha for each image.

    Args:
        sigma: Standard deviation of the noise in pixel units.
        n0: Votes that choose the class.
        n: Fresh votes that are counted.
        alpha: Probability per image that the statement is wrong.
        target: Stop an image as soon as its radius reaches this, in pixel units and in the norm asked for; none counts
            all n votes at once.
        looks: With a target: how often the votes are looked at, after n / 2^(looks - 1), ..., n / 2, n of them, each
            time with alpha / looks.

    Shapes:
        images (N, C, H, W) in [0, 1]; one reading per image, in their order.
    Cost:
        n0 + n forward passes per image.
    Source:
        Cohen et al. 2019, arXiv:1902.02918, algorithm 1 (CERTIFY) and theorem 1; Clopper and Pearson 1934. linf:
        |v|_2 <= sqrt(d) |v|_inf for d pixels.
    Departs:
        Early stopping by a schedule fixed beforehand with alpha shared among its looks (Bonferroni), if a target is
        given. Noise is not clipped to the pixel box, as in the paper.
    Raises:
        UsageError: sigma, n0, n, alpha, target or looks out of range.
        ContractBroken: NaN logits.
    """
    _check(sigma, n0, n, alpha, target, looks)
    pixels, size = images.x[0].numel(), batch_size
    scale = pixels**-0.5 if norm == "linf" else 1.0
    schedule = [n] if target is None else sorted({max(1, n >> k) for k in range(looks)})
    wanted = math.inf if target is None else target
    together = max(1, size // BLOCK)  # images side by side in one batch
    readings: list[Reading] = []
    for rows in torch.arange(len(images)).split(together):
        some = images[rows.to(images.x.device)]
        chosen = votes(classifier, some, rng, 0, n0, sigma, size).argmax(1)
        p, radius = torch.zeros(2, len(some), dtype=torch.float64)
        hits, used = torch.zeros(2, len(some), dtype=torch.int64)
        open_ = torch.arange(len(some))
        for look, upto in enumerate(schedule):
            more = upto - (schedule[look - 1] if look else 0)
            counted = votes(classifier, some[open_.to(some.x.device)], rng, 1 + look, more, sigma, size)
            hits[open_] += counted.gather(1, chosen[open_, None])[:, 0]
            used[open_] = upto
            now = lower_confidence(hits[open_], upto, alpha / len(schedule))
            p[open_] = torch.maximum(p[open_], now)  # all looks hold together with probability 1 - alpha
            radius[open_] = sigma * scale * torch.special.ndtri(p[open_].clamp_min(0.5))
            open_ = open_[radius[open_] < wanted]
            if len(open_) == 0:
                break
        readings += [
            Reading(
                index=int(some.ids[i]),
                label=int(some.y[i]),
                prediction=int(chosen[i]),
                radius=float(radius[i]) if chosen[i] == some.y[i] else 0.0,
                loss="votes",
                loss_value=float(0.5 - hits[i] / used[i]),
                gradient_norm=math.nan,
                constant=math.nan,
                domain="smoothed classifier",
                arithmetic=f"{str(some.x.dtype).removeprefix('torch.')} votes, noise not clipped",
                forwards=n0 + int(used[i]),
                backwards=0,
                samples=int(used[i]),
                confidence=1 - alpha,
                status="abstain" if p[i] <= 0.5 else "",
                p_lower=float(p[i]),
            )
            for i in range(len(some))
        ]
        if on_batch:
            on_batch(len(readings), len(images), "smoothing")
    return readings


def lower_confidence(hits: Tensor, trials: int, alpha: float) -> Tensor:
    """One-sided lower limit of a probability, right with probability 1 - alpha (Clopper and Pearson 1934).

    No hits give 0, all hits alpha^(1 / trials). Shapes: (n,) int64 -> (n,) float64.
    """
    limit = stats.beta.ppf(alpha, hits.clamp_min(1).numpy(), trials - hits.clamp_min(1).numpy() + 1)
    return torch.from_numpy(limit).double().masked_fill(hits == 0, 0)


def votes(
    classifier: Classifier, images: Images, rng: Draws, number: int, count: int, sigma: float, batch_size: int
) -> Tensor:
    """How often each class wins among ``count`` noisy copies of each image.

    Every image has a generator of its own, seeded by its stream of this number, and draws blocks of one fixed size: its
    noise depends neither on its neighbours nor on the batch size.

    Shapes:
        images (n, C, H, W) -> (n, K) int64, on the CPU.
    Raises:
        ContractBroken: NaN logits.
    """
    x = images.x
    words = rng(images.ids.tolist(), number).bits(2).tolist()
    drawing = [torch.Generator(x.device).manual_seed((high << 31) ^ low) for high, low in words]
    found = torch.zeros(len(x), classifier.classes, dtype=torch.int64, device=x.device)
    for start in range(0, count, BLOCK):
        some = min(BLOCK, count - start)
        noise = torch.stack(
            [torch.randn(BLOCK, *x.shape[1:], generator=g, dtype=x.dtype, device=x.device)[:some] for g in drawing]
        )
        with torch.no_grad():
            z = torch.cat([classifier.logits(b) for b in (x[:, None] + sigma * noise).flatten(0, 1).split(batch_size)])
        if z.isnan().any():
            raise ContractBroken("NaN logits on noisy images", code="C07")
        winner = z.argmax(1).view(len(x), some)
        found.scatter_add_(1, winner, torch.ones_like(winner))
    return found.cpu()


def _check(sigma: float, n0: int, n: int, alpha: float, target: float | None, looks: int) -> None:
    """Refuse settings that mean nothing."""
    wrong = [
        (not 0 < sigma < math.inf, f"sigma must be a positive number, got {sigma}"),
        (n0 < 1 or n < 1, f"n0 and n must be at least 1, got {n0} and {n}"),
        (not 0 < alpha < 1, f"alpha must lie between 0 and 1, got {alpha}"),
        (target is not None and not target > 0, f"target must be a positive radius, got {target}"),
        (looks < 1, f"looks must be at least 1, got {looks}"),
    ]
    for bad, what in wrong:
        if bad:
            raise UsageError(what, code="A02", do="robeval list bounds shows the settings and their defaults")
