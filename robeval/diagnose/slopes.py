"""Input gradients for the diagnostics of group 2, each taken once per subject."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from robeval.core.ball import Ball, per_row
from robeval.core.images import Images
from robeval.diagnose.subject import Subject

#: Losses whose gradients are looked at, in the order of the reports.
LOSSES = ("ce", "margin", "dlr", "cw-targeted")
IMAGES = 256
#: What torch says of a graph that does not lead back to the input.
CUT = ("does not require grad", "not have been used in the graph")


def without_gradient(error: BaseException) -> bool:
    """The error says that the model's answer does not lead back to its input."""
    return any(words in str(error) for words in CUT)


def slope(subject: Subject, loss: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """:meth:`Subject.gradient`, zero where the model gives none, as an attack would find it. -> (n,), (n, C, H, W)."""
    try:
        return subject.gradient(loss, x, y)
    except RuntimeError as error:
        if not without_gradient(error):
            raise
    return torch.zeros(len(x), dtype=x.dtype, device=x.device), torch.zeros_like(x)


def start(subject: Subject, images: Images) -> Tensor:
    """The random point of the ball from which gradients are taken besides the images. -> (n, C, H, W)."""
    rng = subject.rng("random-start", images.ids)
    return Ball(subject.norm, subject.eps).sample(images.x, rng)


class _Taken:
    """Gradients of the first correctly classified images of one subject, by loss and place."""

    def __init__(self, subject: Subject):
        self.images = subject.correct(IMAGES)
        self.at = {"image": self.images.x, "start": start(subject, self.images)}
        self.known: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}


_TAKEN: WeakKeyDictionary[Subject, _Taken] = WeakKeyDictionary()


def taken(subject: Subject, loss: str, place: str) -> tuple[Images, Tensor, Tensor]:
    """The first correctly classified images, with value and gradient of a loss at the image or at a random start.

    Args:
        subject: The model.
        loss: One of :data:`LOSSES`.
        place: ``image`` or ``start``.

    Cost:
        1 backward pass per image the first time, none later.
    """
    if subject not in _TAKEN:
        _TAKEN[subject] = _Taken(subject)
    held = _TAKEN[subject]
    if (loss, place) not in held.known:
        held.known[loss, place] = slope(subject, loss, held.at[place], held.images.y)
    return held.images, *held.known[loss, place]


def unit(d: Tensor) -> Tensor:
    """Each row divided by its l2 length; zero rows stay zero. (n, ...) -> (n, ...)."""
    length = torch.linalg.vector_norm(d.flatten(1), dim=1)
    return d / per_row(torch.where(length > 0, length, 1.0), d)


def is_zero(grad: Tensor) -> Tensor:
    """The whole gradient of an image is exactly zero. (n, ...) -> (n,) bool."""
    return ~grad.flatten(1).any(1)


def losses_for(classes: int) -> tuple[str, ...]:
    """The losses that exist with so many classes: DLR needs three."""
    return LOSSES if classes >= 3 else tuple(loss for loss in LOSSES if loss != "dlr")
