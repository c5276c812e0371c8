"""Auto-PGD in the l1 norm: the part of APGD that differs there."""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
from torch import Tensor

from robeval.attacks.averaged import averaged
from robeval.core.ball import Ball, per_row, vector_norm
from robeval.core.goal import Loss
from robeval.core.questions import Answer, Gradient, Question
from robeval.core.streams import Streams

#: Radius in eps and share of the steps of each stage.
STAGES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


def largest(grad: Tensor, share: Tensor) -> Tensor:
    """Signs of the largest entries of each row, a given share of all, to total length 1. (n, ...) -> (n, ...)."""
    size = grad.abs().flatten(1)
    place = ((1 - share) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
    least = size.sort(1).values.gather(1, place[:, None])
    sign = grad.flatten(1).sign() * (size >= least)
    return (sign / sign.abs().sum(1, keepdim=True).clamp_min(1)).view_as(grad)


def shrinking_balls(
    x0: Tensor,
    ball: Ball,
    rng: Streams,
    loss: str | Loss,
    args: tuple[Tensor, ...],
    steps: int,
    staged: bool,
    samples: int,
) -> Generator[Question, Answer, Tensor]:
    """APGD in l1 (Croce and Hein 2021, Mind the box, arXiv:2103.01208, algorithm 1), in shrinking balls if ``staged``.

    Searches the ball of three times the radius first, takes the best point into the smaller one, and so to the end.
    Points outside the ball of the run are stepping stones; they never count as adversarial.
    """
    stages = STAGES if staged else ((1.0, 1.0),)
    x = Ball("l1", stages[0][0] * ball.eps).project(x0, x0 + rng.normal(*x0.shape[1:]))
    left = steps
    for number, (radius, part) in enumerate(stages):
        wide = Ball("l1", radius * ball.eps)
        these = left if number + 1 == len(stages) else min(left, math.ceil(part * steps))
        left -= these
        x = yield from sparse_ascent(x0, wide.project(x0, x), wide, loss, args, these, staged, samples)
    return x


def sparse_ascent(
    x0: Tensor,
    x: Tensor,
    ball: Ball,
    loss: str | Loss,
    args: tuple[Tensor, ...],
    steps: int,
    staged: bool,
    samples: int,
) -> Generator[Question, Answer, Tensor]:
    """Ascent that moves the largest gradient entries only; how many follows from the best point's sparsity."""
    at = yield from averaged(Gradient(x, loss, args=args), samples)
    grad, best_x, best_loss, best_grad = at.grad, x, at.loss, at.grad
    size = x0[0].numel()
    changed = vector_norm(x - x0, "l0") if staged else torch.full_like(at.loss, float(size))
    share = changed / size / 1.5 if staged else torch.full_like(at.loss, 0.2)
    step = torch.full_like(at.loss, ball.eps)
    every = max(1, int(0.04 * steps))
    for k in range(1, steps + 1):
        x = ball.project(x0, x + per_row(step, x) * largest(grad, share))
        at = yield from averaged(Gradient(x, loss, args=args), samples)
        grad, better = at.grad, at.loss > best_loss
        best_loss = torch.where(better, at.loss, best_loss)
        best_x = torch.where(per_row(better, x), x, best_x)
        best_grad = torch.where(per_row(better, x), grad, best_grad)
        if k % every == 0:
            now = vector_norm(best_x - x0, "l0")
            sparser = now < 0.95 * changed
            share, changed = now / size / 1.5, now
            step = torch.where(sparser, ball.eps, (step / 1.5).clamp_min(ball.eps / 10))
            x = torch.where(per_row(sparser, x), best_x, x)
            grad = torch.where(per_row(sparser, x), best_grad, grad)
    return best_x
