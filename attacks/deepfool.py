"""DeepFool."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.goal import Goal, clearly, leads
from robeval.core.questions import Attack, Gradient, Logits
from robeval.core.streams import Streams


@attack(
    source="Moosavi-Dezfooli, Fawzi, Frossard 2016, DeepFool: a simple and accurate method to fool deep neural"
    " networks, arXiv:1511.04599, algorithm 2",
    norms=("l2", "linf"),
    search="minimal",
)
def deepfool(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    steps: int = 100,
    overshoot: float = 0.02,
    candidates: int = 10,
) -> Attack:
    """Walks to the nearest decision boundary of the linearised model until the class changes.

    Each step goes to the closest hyperplane on which a rival class ties with the true one, a little beyond in the end.

    Args:
        steps: Most steps; an image stops as soon as its class changes.
        overshoot: The found perturbation is lengthened by this share.
        candidates: How many rivals are linearised, the most probable ones at the image.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        1 forward and min(candidates, K - 1) backward passes per step and open image; mostly 2 to 5 steps.
    Source:
        Moosavi-Dezfooli et al. 2016, arXiv:1511.04599, algorithm 2 and section 3.3 for the other norms.
    Departs:
        The iterates stay in the box [0, 1]. Steps are taken as if there were none: leaving pixels at the box out of the
        step was tried, and the longer steps ended farther from the image.
    """
    at = yield Logits(x0)
    classes = goal.rivals(at.logits.shape[1])  # type: ignore[union-attr]
    rank = at.logits.gather(1, classes).topk(min(candidates, classes.shape[1]), dim=1).indices
    classes = classes.gather(1, rank)
    x, moved = x0, torch.zeros_like(x0)
    done = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    for _ in range(steps):
        at = yield Gradient(x, leads, only=~done, args=(classes,))
        done = done | clearly(goal, at.logits) | ~at.open
        if done.all():
            return None
        steepness = ball.dual_norm(at.grad.flatten(0, 1)).view_as(at.loss)
        distance = torch.where(steepness > 0, at.loss.abs() / steepness, torch.inf)
        nearest = distance.argmin(1)
        rows = torch.arange(len(x), device=x.device)
        length = distance[rows, nearest].nan_to_num(posinf=0.0) + 1e-6
        moved = torch.where(per_row(done, x), moved, moved + per_row(length, x) * ball.ascent(at.grad[rows, nearest]))
        x = torch.where(per_row(done, x), x, (x0 + (1 + overshoot) * moved).clamp(0, 1))
    yield Logits(x, only=~done)
    return None
