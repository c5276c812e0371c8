"""The Square attack."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robeval.attacks.lookahead import Lookahead, lowers
from robeval.attacks.squares import Squares, side
from robeval.core.ball import Ball
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Logits, Proposals
from robeval.core.streams import Streams


@attack(
    source="Andriushchenko, Croce, Flammarion, Hein 2020, Square Attack: a query-efficient black-box adversarial attack"
    " via random search, arXiv:1912.00049, algorithms 1, 2 and 3",
    norms=("linf", "l2", "l1"),
    access="black-box",
    attempts="restarts",
)
def square(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    queries: int = 5000,
    share: float = 0.8,
    schedule: Literal["autoattack", "paper"] = "autoattack",
    restarts: int = 1,
    lookahead: int = 16,
) -> Attack:
    """Random search with squares that shrink over time; sees logits only.

    Starts from vertical stripes of +-eps (linf) or a tiling of bumps (l2, l1). A proposal paints one square of +-eps,
    one sign per channel; in l2 and l1 it moves the change of one window into a bump in another. It is kept when the
    margin falls.

    Args:
        queries: Proposals after the start.
        share: Share of the image that the first squares cover.
        schedule: autoattack shrinks the squares as if there were 10,000 proposals; paper rescales the schedule to the
            budget.
        restarts: Independent runs; the worst case counts.
        lookahead: Most proposals asked at once; 1 asks one at a time. The search is the same, only passes differ.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        At most ``queries`` + 1 forward passes per restart and open image that count, and the proposals that looking
        ahead discards, about a tenth; none for a proposal that changes nothing.
    Source:
        Andriushchenko et al. 2020, arXiv:1912.00049, algorithm 1 with the samplings of algorithms 2 (linf) and 3 (l2);
        l1 as in Croce and Hein 2021, arXiv:2103.01208, section 4.
    Departs:
        Every image draws its own squares (the AutoAttack code shares them over a batch), squares reach the last row and
        column, and proposals that change nothing are skipped rather than drawn again. The start's tiling is centred.
    """
    height, width = x0.shape[2:]
    scaled = [q if schedule == "autoattack" else int(q / queries * 10_000) for q in range(queries)]
    sides = torch.tensor([side(q, share, height, width) for q in scaled], device=x0.device)
    squares, ahead = Squares(x0, ball, rng, sides), Lookahead(len(x0), lookahead, x0.device)
    x = squares.start()
    at = yield Logits(x)
    margin, tried = goal.margin(at.logits), torch.zeros_like(rng.attempt)
    while True:
        rows = (at.open & (tried < queries)).nonzero().squeeze(1)
        if not len(rows):
            return None
        length = torch.minimum(ahead.length(rows), queries - tried[rows])
        places = torch.arange(int(length.max()), device=x0.device)
        points = squares.propose(rows, x[rows], tried[rows][:, None] + places)
        changed = (points != x[rows][:, None]).flatten(2).any(2)
        at = yield Proposals(rows, points, changed & (places < length[:, None]), lowers, args=(margin[rows],))
        better = at.first < len(places)
        used, taken = torch.where(better, at.first + 1, length), at.first.clamp(max=len(places) - 1)
        each = torch.arange(len(rows), device=x0.device)
        new = goal[rows].margin(at.logits[each, taken])
        margin[rows] = torch.where(better, new, margin[rows])
        x[rows] = torch.where(better[:, None, None, None], points[each, taken], x[rows])
        tried[rows] += used
        ahead.learn(rows, used, better)
