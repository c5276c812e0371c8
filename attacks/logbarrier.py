"""The log barrier attack."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.attacks.decision import Oracle, to_boundary
from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Gradient, Logits
from robeval.core.streams import Streams


def barrier(goal: Goal, z: Tensor) -> Tensor:
    """Log of the best other probability minus the true one; flat where that is not positive. (n, K) -> (n,)."""
    return (-goal.margin(z.softmax(1))).clamp_min(torch.finfo(z.dtype).tiny).log()


def towards(x0: Tensor, x: Tensor, norm: str, sharpness: float) -> Tensor:
    """Descent of the distance that shortens it by its own length: of l2, or of a softmax form of linf. (n, ...)."""
    d = x - x0
    if norm == "l2":
        return -d
    size = d.abs().flatten(1)
    share = (sharpness * size).softmax(1)
    smooth = (share * size).sum(1, keepdim=True)
    slope = share * (1 + sharpness * (size - smooth))  # of the smooth maximum
    slope = slope / slope.abs().amax(1, keepdim=True) * size.amax(1, keepdim=True)
    return -d.sign() * slope.view_as(d)


@attack(
    source="Finlay, Pooladian, Oberman 2019, The LogBarrier adversarial attack: making effective use of decision"
    " boundary information, arXiv:1903.10396, algorithm 1",
    norms=("l2", "linf"),
    search="minimal",
)
def logbarrier(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    outer: int = 15,
    inner: int = 500,
    dt: float = 0.01,
    alpha: float = 0.1,
    beta: float = 0.75,
    gamma: float = 0.5,
    sharpness: float = 500.0,
    tolerance: float = 1e-6,
    bisections: int = 10,
) -> Attack:
    """Walks from a misclassified point towards the image, kept off the decision boundary by a log barrier.

    Starts at the image plus Gaussian noise that grows until the class changes. The barrier weakens from one outer loop
    to the next, and a step that crosses the boundary is taken back in part until it does not.

    Args:
        outer: Weights of the barrier, one after the other.
        inner: Most accepted steps per weight.
        dt: Share of the distance that a step takes off, and step size of the barrier.
        alpha: First weight of the barrier.
        beta: Factor from one weight to the next.
        gamma: Share of a step that is taken back each time.
        sharpness: Temperature of the softmax that stands for the maximum in linf, per pixel unit.
        tolerance: A loop ends when a step is no longer than this, in pixel units.
        bisections: Halvings of the line between the image and the start, and again the last point.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        At most ``outer`` x ``inner`` forward and backward passes per image and one for each crossing, mostly half of
        that; up to 60 forwards for the start and ``bisections`` twice.
    Source:
        Finlay et al. 2019, arXiv:1903.10396, algorithm 1 and section 4.
    Departs:
        The noise grows by 10 % a time rather than 1 %, and bisection brings the start to the boundary. Loops end for
        each image on its own. A gradient is asked together with the test for a crossing, so an accepted step costs one
        forward pass instead of two. In linf both parts of a step are steepest in that norm and scaled to it, since the
        published one moves all pixels together by at most dt; the barrier's part is at most twice the distance. The
        barrier keeps the last point off the boundary by a length that does not shrink with the distance; bisection
        closes the gap.
    """
    x, w = x0, x0
    off = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    for k in range(60):
        noisy = (x0 + 0.01 * 1.1**k * rng.normal(*x0.shape[1:])).clamp(0, 1)
        at = yield Logits(noisy, only=~off)
        w = torch.where(per_row(off, x0), w, noisy)
        off = off | goal.reached(at.logits) | ~at.open
        if off.all():
            break
    started = off
    oracle = Oracle(goal, 2 * bisections, x0)
    w = yield from to_boundary(oracle, x0, w, started, ball, 2.0**-bisections)
    left = torch.where(started, outer, 0)
    accepted = torch.zeros_like(left)
    weight, grad = torch.full_like(ball.norm_of(x0), alpha), torch.zeros_like(x0)
    while left.any():
        asks = left > 0
        at = yield Gradient(w, barrier, only=asks)
        left = torch.where(at.open, left, 0)
        hit = asks & at.open & goal.reached(at.logits)
        moved = ball.norm_of(w - x)
        x, grad = torch.where(per_row(hit, x), w, x), torch.where(per_row(hit, x), at.grad, grad)
        accepted = accepted + hit
        over = (moved <= tolerance) | (accepted >= inner)
        left, accepted = (left - over.long()).clamp_min(0), torch.where(over, 0, accepted)
        weight = torch.where(over, beta * weight, weight)
        push = torch.minimum(weight * ball.dual_norm(grad), 2 * ball.norm_of(x - x0))
        fresh = x + dt * (towards(x0, x, ball.norm, sharpness) + per_row(push, x) * ball.ascent(grad))
        w = torch.where(per_row(hit | over, x), fresh.clamp(0, 1), (1 - gamma) * w + gamma * x)
    yield from to_boundary(oracle, x0, x, started, ball, 2.0**-bisections)
    return None
