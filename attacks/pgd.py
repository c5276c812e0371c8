"""Projected gradient ascent."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Gradient
from robeval.core.streams import Streams


@attack(
    source="Madry, Makelov, Schmidt, Tsipras, Vladu 2018, Towards Deep Learning Models Resistant to Adversarial"
    " Attacks, arXiv:1706.06083, section 2",
    norms=("linf", "l2", "l1"),
    attempts="restarts",
    presets={
        "pgd20": {"steps": 20, "relative_step": 0.25},
        "pgd100": {"steps": 100, "relative_step": 0.25},
        "pgd200": {"steps": 200, "relative_step": 0.25},
        "pgd1000": {"steps": 1000, "relative_step": 0.25},
        "pgd20x50": {"steps": 20, "relative_step": 0.25, "restarts": 50},
    },
)
def pgd(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    steps: int = 20,
    step_size: float | None = None,
    relative_step: float | None = None,
    loss: Literal["ce", "cw", "dlr"] = "ce",
    restarts: int = 1,
    random_start: bool = True,
) -> Attack:
    """Projected gradient ascent on a loss from a random start in the ball.

    Each step moves by a fixed length along the steepest direction of the norm, then projects on the ball and the box.
    Every iterate is judged, the last one too.

    Args:
        steps: Gradient steps per restart.
        step_size: Length of a step in pixel units and in the attack's norm; none means relative_step times eps.
        relative_step: Length of a step as a fraction of eps; none means 2.5 / steps.
        loss: What is ascended: cross-entropy, the margin (cw) or DLR.
        restarts: Independent random starts; the worst case counts.
        random_start: Start at a random point of the ball; otherwise at the image.

    Shapes:
        x0 (n, C, H, W) in [0, 1]; returns the same shape.
    Cost:
        ``steps`` forward and backward passes and one more forward per restart and open image.
    Source:
        Madry et al. 2018, arXiv:1706.06083, section 2.
    Departs:
        The presets' step is eps / 4: the papers' 2/255 at eps 8/255, kept in proportion elsewhere. In l1 the step
        spreads over the 5 % largest gradient entries, since the single steepest pixel makes little progress.
    """
    alpha = step_size or (relative_step or 2.5 / steps) * ball.eps
    x = ball.sample(x0, rng) if random_start else x0
    for _ in range(steps):
        at = yield Gradient(x, loss)
        x = ball.project(x0, x + alpha * ball.ascent(at.grad, x))
    return x
