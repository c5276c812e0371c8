"""What the log says about a network after each epoch."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from robeval.attacks.pgd import pgd
from robeval.core.ball import Ball, vector_norm
from robeval.core.classifier import frozen
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.engine.drive import drive
from robeval.train.gradients import input_grad


def attacked(
    module: nn.Module, x: Tensor, y: Tensor, ball: Ball, rng: Streams, *, steps: int, step_size: float | None = None
) -> Tensor:
    """Where PGD from a random start ends on a frozen network. Shapes: (n, C, H, W) -> same."""
    goal = Untargeted(y)
    return drive(pgd(x, goal, ball, rng, steps=steps, step_size=step_size), module, goal)


def pgd_accuracy(
    module: nn.Module, images: Images, ball: Ball, *, seed: int, batch_size: int, fast: bool = False
) -> float:
    """Share of images that are correct clean and at the last point of PGD.

    Args:
        module: The network; it is frozen inside and restored.
        images: Where to measure.
        ball: The threat model.
        seed: Seed of the random starts, which are the same in every epoch.
        batch_size: Images per call.
        fast: 5 steps of eps / 4, the check for catastrophic overfitting (Wong et al. 2020), in place of 20 steps.
    """
    right = 0
    with frozen(module):
        for rows in range(0, len(images), batch_size):
            x, y = images.x[rows : rows + batch_size], images.y[rows : rows + batch_size]
            rng = _streams(images, rows, batch_size, seed, "pgd")
            steps, step_size = (5, ball.eps / 4) if fast else (20, None)
            x_adv = attacked(module, x, y, ball, rng, steps=steps, step_size=step_size)
            right += int(((module(x).argmax(1) == y) & (module(x_adv).argmax(1) == y)).sum())
    return right / len(images)


def transferred(surrogate: nn.Module, images: Images, ball: Ball, *, seed: int, batch_size: int) -> Tensor:
    """Where PGD with 20 steps ends on another network. -> (N, C, H, W)."""
    parts = []
    with frozen(surrogate):
        for rows in range(0, len(images), batch_size):
            x, y = images.x[rows : rows + batch_size], images.y[rows : rows + batch_size]
            parts.append(attacked(surrogate, x, y, ball, _streams(images, rows, batch_size, seed, "pgd"), steps=20))
    return torch.cat(parts)


@torch.no_grad()
def accuracy_on_both(module: nn.Module, images: Images, others: Tensor, *, batch_size: int) -> float:
    """Share of images that are recognised both as they are and in another form, (N, C, H, W)."""
    right = 0
    with frozen(module):
        for rows in range(0, len(images), batch_size):
            part = slice(rows, rows + batch_size)
            y = images.y[part]
            right += int(((module(images.x[part]).argmax(1) == y) & (module(others[part]).argmax(1) == y)).sum())
    return right / len(images)


def measure(module: nn.Module, images: Images, ball: Ball, *, seed: int, batch_size: int) -> dict[str, float]:
    """Accuracy, confidence and input gradients, as means over the images.

    Returns:
        ``clean_accuracy``, ``pgd20_accuracy``; mean largest softmax output at clean, random and one-step PGD inputs;
        ``grad_nonzero``, the mean number of non-zero entries of the cross-entropy's input gradient; its mean l1 and l2
        norms.
    """
    sums: dict[str, float] = defaultdict(float)
    with frozen(module):
        for rows in range(0, len(images), batch_size):
            x, y = images.x[rows : rows + batch_size], images.y[rows : rows + batch_size]
            z = module(x)
            sums["clean_accuracy"] += float((z.argmax(1) == y).sum())
            random = ball.sample(x, _streams(images, rows, batch_size, seed, "random"))
            one = attacked(
                module, x, y, ball, _streams(images, rows, batch_size, seed, "pgd1"), steps=1, step_size=ball.eps
            )
            for name, points in (("clean", x), ("random", random), ("pgd1", one)):
                sums[f"confidence_{name}"] += float(module(points).softmax(1).amax(1).sum())
            _, g = input_grad(module, x, y)
            sums["grad_nonzero"] += float(vector_norm(g, "l0").sum())
            sums["grad_l1"] += float(vector_norm(g, "l1").sum())
            sums["grad_l2"] += float(vector_norm(g, "l2").sum())
    means = {name: total / len(images) for name, total in sums.items()}
    means["pgd20_accuracy"] = pgd_accuracy(module, images, ball, seed=seed, batch_size=batch_size)
    return means


def _streams(images: Images, rows: int, batch_size: int, seed: int, what: str) -> Streams:
    ids = images.ids[rows : rows + batch_size].tolist()
    return Streams(seed, ids, f"measure/{what}", dtype=images.x.dtype, device=images.x.device)
