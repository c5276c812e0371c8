"""Points of the ball that nobody optimised: random noise and corruptions, tried until one is misclassified."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from robeval.core.images import Images
from robeval.diagnose.subject import Subject


def guess(subject: Subject, images: Images, candidates: Iterable[tuple[str, Tensor]], what: str) -> dict[str, Tensor]:
    """Judge candidates one batch after another; an image that one of them breaks is asked about no more.

    Args:
        subject: The model.
        images: Correctly classified images.
        candidates: Names and points (n, C, H, W) inside the ball, one for each image.
        what: How the counterexamples are called in the records; the name is appended.

    Returns:
        Images first broken by each name, (n,) bool.
    """
    found: dict[str, Tensor] = {}
    open_ = torch.ones(len(images), dtype=torch.bool, device=images.x.device)
    for name, x in candidates:
        mine = found.setdefault(name, torch.zeros_like(open_))
        rows = open_.nonzero().squeeze(1)
        if not len(rows):
            continue
        hit = rows[subject.logits(x[rows]).argmax(1) != images.y[rows]]
        if len(hit):
            stands = hit[subject.counterexample(images.ids[hit], x[hit], f"{what}: {name}")]
            mine[stands], open_[stands] = True, False
    return found
