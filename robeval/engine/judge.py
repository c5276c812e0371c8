"""The judge sees every point that an attack asks about and alone decides what is adversarial."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.core.ball import Ball, vector_norm
from robeval.core.goal import Goal, clearly
from robeval.core.images import Images
from robeval.engine.backend import Backend
from robeval.engine.verdict import Verdicts, judge_points

#: The nearest point lies on the boundary itself, where rounding decides: one that is clearly beyond is preferred to a
#: nearer one that is not, by this distance.
UNCLEAR = 1e9


@dataclass
class Outcome:
    """What an attack did to one image; plain numbers, and the verified image if there is one."""

    position: int
    success: bool
    prediction: int
    margin: float
    attempt: int
    iterations: int
    forwards: int
    backwards: int
    first_success_forward: int
    survives_8bit: bool
    distances: dict[str, float]
    example: Tensor | None
    error: str = ""


class Judge:
    """State of one attack on one set of images, one entry per image.

    Args:
        images: The images under attack.
        goal: One goal per image.
        ball: The threat model; ``eps = inf`` keeps the nearest adversarial point instead of closing at the first.
        backend: For the verdicts.
    """

    def __init__(self, images: Images, goal: Goal, ball: Ball, backend: Backend):
        self.images, self.goal, self.ball, self.backend = images, goal, ball, backend
        self.minimal = math.isinf(ball.eps)
        n, device = len(images), images.x.device
        self.closed = torch.zeros(n, dtype=torch.bool, device=device)
        zero = torch.zeros(n, dtype=torch.int64, device=device)
        self.forwards, self.backwards, self.iterations = zero, zero.clone(), zero.clone()
        self.first_success, self.attempt = zero - 1, zero - 1
        self.margin = torch.full((n,), math.inf, dtype=torch.float64, device=device)
        self.distance = torch.full((n,), math.inf, dtype=torch.float64, device=device)
        self.best = images.x.clone() if self.minimal else None

    def charge(self, rows: Tensor, backwards: int) -> None:
        """Count one asked row after another: a forward pass, and so many backward passes."""
        self.forwards.index_add_(0, rows, torch.ones_like(rows))
        if backwards:
            self.backwards.index_add_(0, rows, torch.full_like(rows, backwards))

    def look(self, rows: Tensor, attempts: Tensor, points: Tensor, logits: Tensor) -> Iterator[Outcome]:
        """Judge the points of one answered question; yield the images that it decides.

        Args:
            rows: (m,) position of the image of each row, ascending, so that attempts of an image stand together.
            attempts: (m,) attempt of each row, ascending within an image.
            points: (m, C, H, W).
            logits: (m, K).
        """
        first = torch.ones_like(rows, dtype=torch.bool)
        first[1:] = rows[1:] != rows[:-1]
        leader = torch.zeros_like(self.attempt).index_copy_(0, rows[first], attempts[first])
        mine = rows[attempts == leader[rows]]  # of attempts side by side the earliest counts
        self.iterations.index_add_(0, mine, torch.ones_like(mine))
        finite = logits.isfinite().all(1)
        for position in rows[~finite].unique().tolist():
            if not self.closed[position]:
                yield self._close(position, error="the model gave NaN or Inf logits under attack")
        goal = self.goal[rows]
        margin = goal.margin(logits).double().masked_fill(~finite, math.inf)
        self.margin.scatter_reduce_(0, rows, margin, "amin")
        hit = goal.reached(logits) & finite & ~self.closed[rows]
        if not hit.any():
            return
        hit[hit.clone()] = self.ball.contains(self.images.x[rows[hit]], points[hit])
        if self.minimal:
            self._keep_nearest(rows[hit], attempts[hit], points[hit], clearly(goal[hit], logits[hit]))
            return
        found, start = hit.nonzero().squeeze(1), 0
        while start < len(found):  # the earliest attempt of each image first; others only if its verdict fails
            left = found[start:]
            left = left[~self.closed[rows[left]]]
            if not len(left):
                return
            lead = torch.ones_like(left, dtype=torch.bool)
            lead[1:] = rows[left[1:]] != rows[left[:-1]]
            yield from self._confirm(rows[left[lead]], attempts[left[lead]], points[left[lead]])
            found, start = left[~lead], 0

    def finish(self, rows: Tensor) -> Iterator[Outcome]:
        """The attack has no more to say about these images."""
        rows = rows[~self.closed[rows]]
        if self.best is None:
            yield from (self._close(position) for position in rows.tolist())
            return
        near = rows[self.distance[rows].isfinite()]
        if len(near):
            yield from self._confirm(near, self.attempt[near], self.best[near])
        yield from (self._close(position) for position in rows[~self.closed[rows]].tolist())

    def _keep_nearest(self, rows: Tensor, attempts: Tensor, points: Tensor, clear: Tensor) -> None:
        assert self.best is not None
        if not len(rows):
            return
        distance = self.ball.norm_of(points.double() - self.images.x[rows].double()) + UNCLEAR * ~clear
        unseen = rows[self.first_success[rows] < 0]
        self.first_success[unseen] = self.forwards[unseen]
        order = distance.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]
        lead = torch.ones_like(order, dtype=torch.bool)
        lead[1:] = rows[order[1:]] != rows[order[:-1]]
        nearest = order[lead]  # the nearest point of each image, the earliest attempt among equals
        nearest = nearest[distance[nearest] < self.distance[rows[nearest]]]
        where = rows[nearest]
        self.distance[where], self.attempt[where] = distance[nearest], attempts[nearest]
        self.best[where] = points[nearest]

    def _confirm(self, rows: Tensor, attempts: Tensor, points: Tensor) -> Iterator[Outcome]:
        """The independent verdict; a candidate that fails it does not count, and its image stays open."""
        verdicts = judge_points(self.backend, self.images.x[rows], points, self.goal[rows], self.ball)
        first = torch.where(self.first_success[rows] < 0, self.forwards[rows], self.first_success[rows])
        self.forwards[rows] += 2
        for k, position in enumerate(rows.tolist()):
            if verdicts.adversarial[k]:
                self.attempt[position], self.first_success[position] = attempts[k], first[k]
                yield self._close(position, points[k], verdicts, k)

    def _close(
        self,
        position: int,
        point: Tensor | None = None,
        verdicts: Verdicts | None = None,
        k: int = 0,
        *,
        error: str = "",
    ) -> Outcome:
        self.closed[position] = True
        distances = dict.fromkeys(("linf", "l2", "l1", "l0"), math.inf)
        if point is not None:
            change = (point.double() - self.images.x[position].double())[None]
            distances = {norm: float(vector_norm(change, norm)) for norm in distances}
        return Outcome(
            position,
            success=point is not None,
            prediction=int(verdicts.prediction[k]) if verdicts else int(self.images.y[position]),
            margin=float(verdicts.margin[k]) if verdicts else float(self.margin[position]),
            attempt=int(self.attempt[position]) if verdicts else -1,
            iterations=int(self.iterations[position]),
            forwards=int(self.forwards[position]),
            backwards=int(self.backwards[position]),
            first_success_forward=int(self.first_success[position]) if verdicts else -1,
            survives_8bit=bool(verdicts.survives_8bit[k]) if verdicts else False,
            distances=distances,
            example=None if point is None else point.clone(),
            error=error,
        )
