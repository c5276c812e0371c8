"""Branch and bound over the signs of neurons."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from robeval.bounds.ascent import ascend
from robeval.bounds.cells import Cells, Kinks, roots
from robeval.bounds.crown_intervals import relaxed
from robeval.bounds.graph import Graph
from robeval.bounds.multipliers import Bounded, Task, bounded, passed
from robeval.bounds.proof import Proof, against
from robeval.bounds.region import Region
from robeval.bounds.witnesses import descend, minimisers
from robeval.core.catalogue import bound
from robeval.core.errors import UsageError

#: Sub-problems of one image that are taken from its pool at a time, the ones with the lowest bounds.
TOGETHER = 64
#: Neurons of the largest scores whose halves are bounded by one pass each before one is chosen.
CANDIDATES = 3
#: How often a sub-problem without a neuron to split is bounded again, by ever smaller steps.
TRIES = 10


@bound(
    source="Wang, Zhang, Xu, Lin, Jana, Hsieh, Kolter 2021, Beta-CROWN: Efficient Bound Propagation with Per-neuron"
    " Split Constraints for Neural Network Robustness Verification, arXiv:2103.06624",
    norms=("linf", "l2", "l1"),
    kind="proof",
    order=1,
    smooth=False,
)
def bab(
    graph: Graph,
    region: Region,
    y: Tensor,
    *,
    branches: int = 1000,
    seconds: float | None = None,
    steps: int = 20,
    rate: float = 0.25,
) -> Proof:
    """alpha-crown, then cases: neurons that may have either sign are split until every case is proven.

    The signs that a case assumes enter its backward pass as Lagrange multipliers, in one batch for all images.
    Points where the bound is least are tried, and one that is misclassified ends its image. Given enough branches, a
    ReLU network without max-pooling is decided unless its least margin is 0.

    Args:
        branches: Most cases per image, shared by its rivals; 0 is alpha-crown and a search for a misclassified point.
        seconds: Most seconds per image for its cases, looked at after each round; none means no limit, and results that
            do not depend on the speed of the machine.
        steps: Steps of Adam on lines and multipliers, at the start and in each case.
        rate: Its first step size, as in alpha-crown.

    Shapes:
        region of n images, y (n,); lower bounds (n, K), a witness (n, C, H, W).
    Cost:
        That of alpha-crown; then at most ``steps`` forward and backward passes of one margin per case, and for each
        choice of a neuron 6 passes more.
    Source:
        Wang et al. 2021, arXiv:2103.06624, sections 3.1 to 3.3; the order of the neurons: Bunel et al. 2020,
        arXiv:1909.06588 (BaBSR), and De Palma et al. 2021, arXiv:2104.06718, section 4 (FSB).
    Departs:
        Neurons are scored by coefficient times height of the triangle between their lines; of the three best, the one
        whose halves are bounded best by one pass is split. The intervals before the activations are those of crown met
        with intervals carried forward in each case; they are not optimised. Max-pooling stays relaxed. One
        misclassified point ends its image, also where top-k asks for more.
    Raises:
        ContractBroken: B03, an operator that proofs do not know; B01, an activation without a kink.
        UsageError: a negative limit.
    """
    _check(branches, seconds)
    kinks = Kinks.of(graph)
    found, lines = relaxed(graph, region, tight=True)
    lower, positions = ascend(graph, region, y, found, lines, steps, rate)
    lower = against(lower, y)
    witness = torch.full_like(region.x, torch.nan)
    task, cells = Task(kinks, region, y, found), roots(kinks, lower, positions)
    if len(cells) == 0:
        return Proof(lower, witness=witness)
    worst = torch.full_like(lower, torch.inf)  # of the cases that are closed, whatever the reason
    left, spent = torch.full_like(y, branches), torch.zeros_like(region.eps)
    start = time.monotonic()
    now = bounded(task, cells, 0, rate)
    pool, scores = now.cells, now.score
    while True:
        _try(graph, task, now, witness)
        charge = torch.bincount(now.cells.image, minlength=len(y)) / max(1, len(now.cells))
        spent, start = spent + (time.monotonic() - start) * charge, time.monotonic()
        on = witness.isnan().flatten(1).any(1) & (left >= 2) & (spent < (torch.inf if seconds is None else seconds))
        open_ = (pool.lower <= 0) & (pool.tries < TRIES) & on[pool.image]
        _close(worst, pool.take(~open_))
        pool, scores = pool.take(open_), scores[open_]
        if len(pool) == 0:
            return Proof(torch.maximum(lower, torch.where(lower <= 0, worst, lower)), witness=witness)
        chosen = _lowest(pool, (left // 2).clamp_max(TOGETHER))
        halves = _split(task, pool.take(chosen), scores[chosen])
        left -= torch.bincount(halves.image, minlength=len(y))
        now = bounded(task, halves, steps, rate)
        pool, scores = Cells.cat([pool.take(~chosen), now.cells]), torch.cat([scores[~chosen], now.score])


def _split(task: Task, cells: Cells, scores: Tensor) -> Cells:
    """Two cases of each, by the sign of one neuron; one without a neuron to split is bounded again."""
    whole = (scores <= 0).all(1)
    again = cells.take(whole)
    again = replace(again, tries=again.tries + 1)
    if whole.all():
        return again
    cells, scores = cells.take(~whole), scores[~whole]
    best, neuron = torch.full_like(cells.lower, -torch.inf), torch.zeros_like(cells.image)
    top = scores.topk(min(CANDIDATES, scores.shape[1]), dim=1)
    for value, candidate in zip(top.values.T, top.indices.T, strict=True):
        one, other = passed(task, cells.halves(candidate)).clamp_max(0).view(2, -1)
        gain = (one + other).masked_fill(value <= 0, -torch.inf)
        better = gain > best
        best, neuron = torch.where(better, gain, best), torch.where(better, candidate, neuron)
    return Cells.cat([cells.halves(neuron), again])


def _lowest(pool: Cells, most: Tensor) -> Tensor:
    """The sub-problems with the lowest bounds, at most so many of each image. (n,) -> (D,) bool."""
    order = pool.lower.argsort(stable=True)
    order = order[pool.image[order].argsort(stable=True)]
    image = pool.image[order]
    first = torch.searchsorted(image, image)
    rank = torch.arange(len(pool), device=image.device) - first
    return torch.zeros_like(image, dtype=torch.bool).scatter(0, order, rank < most[image])


def _close(worst: Tensor, cells: Cells) -> None:
    """The bound of a margin is that of its worst case."""
    flat = cells.image * worst.shape[1] + cells.rival
    worst.view(-1).scatter_reduce_(0, flat, cells.lower, "amin")


def _try(graph: Graph, task: Task, now: Bounded, witness: Tensor) -> None:
    """Look for misclassified points near those where the bounds are least; keeps those found."""
    open_ = (now.cells.lower <= 0).nonzero()[:, 0]
    if len(open_) == 0:
        return
    image, rival = now.cells.image[open_], now.cells.rival[open_]
    points = minimisers(task.region, image, now.slope[open_])
    points, margin = descend(graph, task.region, task.y, image, rival, points, 10)
    for d in (margin < 0).nonzero()[:, 0].tolist():
        if task.region.take(image[d : d + 1]).contains(points[d : d + 1]).all():
            witness[image[d]] = points[d]


def _check(branches: int, seconds: float | None) -> None:
    """Refuse limits that mean nothing."""
    for bad, what in (
        (branches < 0, f"branches must not be negative, got {branches}"),
        (seconds is not None and not seconds > 0, f"seconds must be a positive number, got {seconds}"),
    ):
        if bad:
            raise UsageError(what, code="A02", do="robeval list bounds shows the settings and their defaults")
