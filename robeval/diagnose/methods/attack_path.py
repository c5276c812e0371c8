"""P2, the loss along the path of an attack, as a picture."""

from __future__ import annotations

import torch

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, Finding
from robeval.diagnose.path import path
from robeval.diagnose.subject import Subject


@diagnostic(
    id="P2",
    group=6,
    level="full",
    images=100,
    question="how do loss and success grow from step to step?",
    limit="no verdict",
    source="Carlini et al. 2019, On Evaluating Adversarial Robustness, arXiv:1902.06705, section 5",
)
def attack_path(subject: Subject, *, images: int = 100, steps: int = 40) -> Finding:
    """Median and quartiles of the loss after each step of PGD, and the share of images broken so far, per loss.

    Args:
        images: Images, the first of those chosen, the misclassified left out.
        steps: Steps of PGD.

    Cost:
        Three times ``steps`` forward and backward passes per image.
    Source:
        Carlini et al. 2019, arXiv:1902.06705, section 5: plot loss and success against iterations.
    Departs:
        None.
    """
    chosen = subject.correct(images)
    losses = {}
    for loss in ("ce", "cw", "dlr") if subject.classifier.classes > 2 else ("ce", "cw"):
        went = path(subject, f"pgd:steps={steps},loss={loss}", chosen)
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=went.loss.device)
        low, median, high = went.loss.double().quantile(quartiles, dim=1).tolist()
        broken = went.hit.cummax(0).values.double().mean(1).tolist()
        losses[loss] = {"low": low, "median": median, "high": high, "broken": broken}
    data = {"images": len(chosen), "losses": losses}
    return Finding(CLEAR, f"{len(chosen)} images", "no verdict", len(chosen), why="a picture", data=data)
