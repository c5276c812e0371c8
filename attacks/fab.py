"""Fast adaptive boundary attack."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robeval.attacks.hyperplanes import shortest_move
from robeval.attacks.nearer import nearer, nearest
from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.goal import Goal, leads, ranked_rivals
from robeval.core.questions import Answer, Attack, Gradient, Logits
from robeval.core.streams import Streams

#: Half the radius at which models are usually compared; random starts lie so far from the image.
START = {"linf": 4 / 255, "l2": 0.25, "l1": 6.0}


@attack(
    source="Croce and Hein 2020, Minimally distorted adversarial examples with a fast adaptive boundary attack,"
    " arXiv:1907.02044, algorithm 1",
    norms=("linf", "l2", "l1"),
    search="minimal",
    attempts=("restarts", "targets"),
    presets={"fab-t": {"targets": 9}},
)
def fab(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 0,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    start_radius: float | None = None,
    descent: int = 30,
) -> Attack:
    """Goes back and forth over the decision boundary, each time a little closer to the image.

    A step projects the iterate and the image exactly on the linearised boundary within the box and goes to a mean of
    the two, biased towards the image; from beyond the boundary it is pulled back towards the image first.

    Args:
        steps: Linearisations per attempt.
        restarts: Starts per target, the first at the image, the others at random points near it.
        targets: Rival classes attacked one by one, the most likely ones at the image first; 0 takes in each step the
            class whose linearised boundary is nearest.
        alpha_max: Largest weight of the image's projection in the mean.
        eta: Projections are lengthened by this factor, to end beyond the boundary.
        beta: Share of its way from the image that a point beyond the boundary keeps.
        start_radius: Distance of the random starts from the image, in the norm; none means half of eps, and in the
            search for the nearest point 4/255 (linf), 0.25 (l2) or 6 (l1).
        descent: Gradient steps along the boundary in the end, from the nearest point that each start found (with
            targets: the nearest of all its targets).

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        2 forward passes per step, attempt and open image, and 1 backward pass, K - 1 of them when ``targets`` is 0;
        ``descent`` forward and backward passes and one more forward per start.
    Source:
        Croce and Hein 2020, arXiv:1907.02044, algorithm 1, with the targeted form of the AutoAttack code
        (arXiv:2003.01690).
    Departs:
        Follows the published code (random starts at half of eps, no search along a line in the end) until its last
        point; then it descends along the boundary, which that code does not: ``descent=0`` is the published attack.
        Classes of equal logits are ranked by number. A hyperplane is given by the gap between the logits at the
        iterate, which spares the rounding of its offset. Points that were pulled back are judged too, so that a
        distance can only be smaller.
    """
    at = yield Logits(x0)
    targets = min(targets, at.logits.shape[1] - 1)
    if targets:
        classes = ranked_rivals(goal, at.logits, rng.attempt % targets)[:, None]
    else:
        classes = goal.rivals(at.logits.shape[1])  # type: ignore[union-attr]
    x = x0
    if restarts > 1:
        radius = start_radius or (ball.eps / 2 if math.isfinite(ball.eps) else START[ball.norm])
        later = per_row(rng.attempt >= max(targets, 1), x0)
        x = torch.where(later, Ball(ball.norm, radius).surface(x0, rng), x0)
    rows = torch.arange(len(x0), device=x0.device)
    best, distance = x0, torch.full_like(ball.norm_of(x0), torch.inf)

    def keep(at: Answer) -> Tensor:
        """Remember x where it is misclassified and the nearest so far. -> (n,) bool, misclassified."""
        nonlocal best, distance
        hit, length = at.open & goal.reached(at.logits), ball.norm_of(x - x0)
        closer = hit & (length < distance)
        best, distance = torch.where(per_row(closer, x), x, best), torch.where(closer, length, distance)
        return hit

    for _ in range(steps):
        at = yield Gradient(x, leads, args=(classes,))
        keep(at)
        steepness = ball.dual_norm(at.grad.flatten(0, 1)).view_as(at.loss)
        rival = (at.loss.abs() / (steepness + 1e-12)).argmin(1)
        gap, w = at.loss[rows, rival], at.grad[rows, rival]
        gap0 = gap + (w * (x0 - x)).flatten(1).sum(1)
        to_plane, from_image = shortest_move(
            torch.cat([x, x0]), torch.cat([w, w]), torch.cat([gap, gap0]), ball.norm
        ).chunk(2)
        far, near = ball.norm_of(to_plane).clamp_min(1e-8), ball.norm_of(from_image).clamp_min(1e-8)
        alpha = per_row((far / (far + near)).clamp_max(alpha_max), x)
        x = ((1 - alpha) * (x + eta * to_plane) + alpha * (x0 + eta * from_image)).clamp(0, 1)
        at = yield Logits(x)
        hit = keep(at)
        x = torch.where(per_row(hit, x), x0 + beta * (x - x0), x)
    last = nearest(distance, torch.stack([rng.ids, rng.attempt // max(targets, 1)], 1))
    yield from nearer(best, x0, goal, ball, last, descent)
    return None
