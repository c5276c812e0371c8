"""Projected gradient ascent."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robeval.attacks.averaged import averaged
from robeval.core.ball import Ball
from robeval.core.catalogue import attack
from robeval.core.goal import Goal, Loss
from robeval.core.questions import Attack, Gradient, Logits
from robeval.core.streams import Streams


def capped_margin(goal: Goal, z: Tensor, most: Tensor) -> Tensor:
    """The best other logit minus the true one, up to ``most``. (n, K), (n,) -> (n,)."""
    return (-goal.margin(z)).minimum(most)


def divergence(goal: Goal, z: Tensor, clean: Tensor) -> Tensor:
    """KL(clean || now) of the probabilities, as TRADES ascends it. (n, K), (n, K) -> (n,)."""
    return (clean.softmax(1) * (clean.log_softmax(1) - z.log_softmax(1))).sum(1)


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
        "pgd40": {"steps": 40, "relative_step": 0.2},
        "l2-pgd100": {"steps": 100},
        "cw20": {"steps": 20, "relative_step": 0.25, "loss": "cw", "confidence": 50},
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
    loss: Literal["ce", "cw", "dlr", "kl"] = "ce",
    confidence: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    samples: int = 1,
) -> Attack:
    """Projected gradient ascent on a loss from a random start in the ball.

    Each step moves by a fixed length along the steepest direction of the norm, then projects on the ball and the box.
    Every iterate is judged, the last one too.

    Args:
        steps: Gradient steps per restart.
        step_size: Length of a step in pixel units and in the attack's norm; none means relative_step times eps.
        relative_step: Length of a step as a fraction of eps; none means 2.5 / steps.
        loss: What is ascended: cross-entropy, margin (cw), DLR, or divergence from the clean probabilities (kl).
        confidence: The margin by which the cw loss stops to grow, in logits; none means never.
        restarts: Independent random starts; the worst case counts.
        random_start: Start at a random point of the ball; otherwise at the image.
        samples: Gradients averaged at each point, for models that answer at random (EOT).

    Shapes:
        x0 (n, C, H, W) in [0, 1]; returns the same shape.
    Cost:
        ``steps`` forward and backward passes (times ``samples``) and one more forward per restart and open image.
    Source:
        Madry et al. 2018, arXiv:1706.06083, section 2.
    Departs:
        The presets' step is eps / 4: the papers' 2/255 at eps 8/255, kept in proportion elsewhere; pgd40 takes eps / 5
        (SGR), cw20 is the 20-step attack on the margin that adversarial-training papers call CW-20. In l1 the step
        spreads over the 5 % largest gradient entries, since the single steepest pixel makes little progress.
    """
    alpha = step_size or (relative_step or 2.5 / steps) * ball.eps
    objective: str | Loss = loss
    args: tuple[Tensor, ...] = ()
    if loss == "kl":
        at = yield Logits(x0)
        objective, args = divergence, (at.logits,)
    elif loss == "cw" and confidence is not None:
        objective, args = capped_margin, (x0.new_full((len(x0),), confidence),)
    x = ball.sample(x0, rng) if random_start else x0
    for _ in range(steps):
        at = yield from averaged(Gradient(x, objective, args=args), samples)
        x = ball.project(x0, x + alpha * ball.ascent(at.grad, x))
    return x
