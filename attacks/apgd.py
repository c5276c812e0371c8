"""Auto-PGD."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robeval.attacks.apgd_l1 import shrinking_balls
from robeval.attacks.averaged import averaged
from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.goal import TOWARDS, Goal, Loss, ranked_rivals
from robeval.core.questions import Attack, Gradient, Logits
from robeval.core.streams import Streams


def checkpoints(steps: int) -> list[int]:
    """Lengths of the windows between checks: 0.22 of the steps, each 0.03 shorter, never under 0.06."""
    window, shrink, least = (max(int(f * steps), 1) for f in (0.22, 0.03, 0.06))
    lengths: list[int] = []
    while sum(lengths) + window <= steps:
        lengths.append(window)
        window = max(window - shrink, least)
    return lengths


@attack(
    source="Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse"
    " parameter-free attacks, arXiv:2003.01690, algorithm 1; in l1 Croce and Hein 2021, Mind the box: l1-APGD for"
    " sparse adversarial attacks on image classifiers, arXiv:2103.01208, algorithm 1",
    norms=("linf", "l2", "l1"),
    attempts=("restarts", "targets"),
    presets={
        "apgd-ce": {"loss": "ce"},
        "apgd-dlr": {"loss": "dlr"},
        "apgd-t": {"loss": "dlr", "targets": 9},
    },
)
def apgd(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    steps: int = 100,
    loss: Literal["ce", "dlr", "cw"] = "ce",
    restarts: int = 1,
    targets: int = 0,
    rho: float = 0.75,
    staged: bool = True,
    samples: int = 1,
) -> Attack:
    """Projected gradient ascent with momentum and a step size that halves itself.

    Steps start at 2 eps. At each checkpoint an image whose loss rose too seldom, or whose best loss stood still, halves
    its step and goes back to its best point. With targets, each attempt pulls towards one rival class, those most
    probable at the image first; any misclassification counts.

    Args:
        steps: Gradient steps per attempt.
        loss: What is ascended: cross-entropy, DLR or the margin (cw).
        restarts: Independent random starts; the worst case counts.
        targets: Number of rival classes attacked one by one; 0 is the untargeted attack.
        rho: Share of rising steps that a window must exceed to keep its step size.
        staged: In l1, search balls of 3, 2 and 1 times eps one after the other.
        samples: Gradients averaged at each point, for models that answer at random (EOT).

    Shapes:
        x0 (n, C, H, W) in [0, 1]; returns the same shape.
    Cost:
        ``steps`` forward and backward passes (times ``samples``) and one more forward per attempt and open image; in l1
        three more of both.
    Source:
        Croce and Hein 2020, arXiv:2003.01690, algorithm 1, conditions 1 and 2 of section 3.2, equations 6 and 7;
        Croce and Hein 2021, arXiv:2103.01208, algorithm 1.
    Departs:
        Follows the published code where it differs from the papers: the first step of a run counts as rising when its
        loss is positive, the momentum after a jump back uses the iterate before the jump, and l1 checks for sparsity at
        every iteration when staged. An image stops at its first success, and the last iterate costs no gradient (linf
        and l2), since none of it is used. With fewer classes than a loss needs, DLR becomes the margin.
    """
    objective: str | Loss = loss
    args: tuple[Tensor, ...] = ()
    if targets:
        at = yield Logits(x0)
        objective, args = TOWARDS[loss], (ranked_rivals(goal, at.logits, rng.attempt % targets),)
    if ball.norm == "l1":
        return (yield from shrinking_balls(x0, ball, rng, objective, args, steps, staged, samples))
    x = ball.surface(x0, rng)
    at = yield from averaged(Gradient(x, objective, args=args), samples)
    best_x, best_loss, best_grad = x, at.loss, at.grad
    grad, before, last_loss = at.grad, x, torch.zeros_like(at.loss)
    step = torch.full_like(at.loss, 2 * ball.eps)
    rises, halved, best_before = torch.zeros_like(step), torch.ones_like(step, dtype=torch.bool), best_loss
    checks = set(torch.tensor(checkpoints(steps)).cumsum(0).tolist())
    start = 0
    for k in range(1, steps + 1):
        ahead = ball.project(x0, x + per_row(step, x) * ball.ascent(grad))
        keep = 0.75 if k > 1 else 1.0
        x, before = ball.project(x0, x + keep * (ahead - x) + (1 - keep) * (x - before)), x
        if k == steps:
            break
        at = yield from averaged(Gradient(x, objective, args=args), samples)
        grad, rises, last_loss = at.grad, rises + (at.loss > last_loss), at.loss
        better = at.loss > best_loss
        best_loss = torch.where(better, at.loss, best_loss)
        best_x = torch.where(per_row(better, x), x, best_x)
        best_grad = torch.where(per_row(better, x), grad, best_grad)
        if k in checks:
            halve = (rises <= rho * (k - start)) | (~halved & (best_before >= best_loss))
            step = torch.where(halve, step / 2, step)
            x = torch.where(per_row(halve, x), best_x, x)
            grad = torch.where(per_row(halve, x), best_grad, grad)
            halved, best_before, rises, start = halve, best_loss, torch.zeros_like(rises), k
    return x
