"""How much the margin moves under tiny noise."""

from __future__ import annotations

import torch

from robeval.core.catalogue import diagnostic
from robeval.core.goal import Untargeted
from robeval.diagnose.finding import DOES_NOT_APPLY, Finding
from robeval.diagnose.slopes import IMAGES
from robeval.diagnose.subject import Subject


@diagnostic(
    id="G8",
    group=2,
    level="standard",
    images=256,
    question="how far do tiny changes move the margin?",
    limit="none, a number only",
    source="Pintor et al. 2022, Indicators of Attack Failure, arXiv:2106.09947, I2",
)
def unstable_predictions(subject: Subject, *, draws: int = 20, width: float = 8 / 255) -> Finding:
    """Mean change of the margin under uniform noise, relative to how much the margin differs between images.

    The published form divides by the loss of the image and explodes where that is near 0, on honest models too.

    Args:
        draws: Noisy copies per image.
        width: Full width of the box of noise, in pixel units.

    Cost:
        ``draws`` forward passes per image.
    Source:
        The indicator I2 of Pintor et al. 2022, arXiv:2106.09947, as its code has it.
    Departs:
        The margin in place of the loss, and its inter-quartile range over the images in place of the image's own loss.
        20 draws instead of 100. Shown, never judged.
    """
    images = subject.correct(IMAGES)
    rng, goal = subject.rng("unstable-predictions", images.ids), Untargeted(images.y)
    clean = goal.margin(subject.logits(images.x)).double()
    spread = float(clean.quantile(0.75) - clean.quantile(0.25))
    change = torch.zeros_like(clean)
    for _ in range(draws):
        x = (images.x + width * (rng.uniform(*images.x.shape[1:]) - 0.5)).clamp(0, 1)
        change += (goal.margin(subject.logits(x)).double() - clean).abs() / draws
    middle = float((change / spread).clamp(max=1).mean()) if spread > 0 else 0.0
    return Finding(
        DOES_NOT_APPLY,
        measured=f"{middle:.3g} of the spread of the margins",
        limit="none, a number only",
        n_images=len(images),
        why="fires on honest models; read it beside a model that you know",
        data={"mean": middle, "spread": spread},
    )
