"""The whole path of a gradient attack; the engine stops at the first success and never shows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import parse
from robeval.core.classifier import Classifier
from robeval.core.goal import LOSSES, Untargeted, clearly
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.diagnose.subject import Subject
from robeval.engine.drive import drive
from robeval.evaluate.settings import plan


@dataclass(frozen=True)
class Path:
    """Every point that an attack asked about, in order, and the one it ended at.

    Args:
        loss: (steps, n), what the attack ascends.
        hit: (steps, n) bool, the point is misclassified by more than rounding.
        last: (n, C, H, W), where it ended.
        logits: (n, K) of the crafting model there.
    """

    loss: Tensor
    hit: Tensor
    last: Tensor
    logits: Tensor


def path(subject: Subject, text: str, images: Images, on: Classifier | None = None) -> Path:
    """Run an attack to its own end on the subject, or on another model, with the streams of an attack run.

    Cost:
        The attack's full length per image, and 1 forward pass.
    Raises:
        RuntimeError: the model gives no gradient.
    """
    spec, model = parse("attacks", text), on or subject.classifier
    ball = Ball(subject.norm, subject.eps)
    lasts, logits, losses, hits = [], [], [], []
    for rows in torch.arange(len(images)).split(subject.batch_size):
        part = images[rows].to(model.device)
        seen: list[Tensor] = []

        def asked(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            z = model.logits(x)
            seen.append(z.detach())
            return z

        goal = Untargeted(part.y)
        rng = Streams(subject.seed, part.ids.tolist(), spec.method.name, dtype=part.x.dtype, device=part.x.device)
        last = drive(plan(spec).start(part.x, goal, ball, rng), asked, goal).detach()
        with torch.no_grad():
            z = model.logits(last)
        loss = LOSSES[str(spec.settings["loss"])]
        losses.append(torch.stack([loss(goal, s) for s in [*seen, z]]))
        hits.append(torch.stack([clearly(goal, s) for s in [*seen, z]]))
        lasts.append(last)
        logits.append(z)
    return Path(torch.cat(losses, 1), torch.cat(hits, 1), torch.cat(lasts), torch.cat(logits))
