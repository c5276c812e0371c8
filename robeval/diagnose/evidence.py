"""What gradient attacks reach on a subject, shared by the diagnostics that hold something against them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from robeval.core.catalogue import find
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, RobevalError
from robeval.core.images import Images
from robeval.diagnose.outcomes import Outcome, reach
from robeval.diagnose.subject import Subject

#: The gradient attacks of a diagnosis, one per loss. Other tests hold their finds against all of them, and against
#: cross-entropy alone: a black box that finds what cross-entropy misses is a sign although another loss finds it too.
BY_LOSS = {
    "ce": "pgd:steps=40,relative_step=0.2",
    "margin": "pgd:steps=40,relative_step=0.2,loss=cw",
    "dlr": "pgd:steps=40,relative_step=0.2,loss=dlr",
    "targeted": "apgd:steps=40,loss=cw,targets=3",
}
#: Points by which black-box attacks may lead one loss: the marks of the disagreement between losses.
LEAD_WARN, LEAD_FAIL = 8.0, 15.0


def images_of(subject: Subject) -> int:
    """Images that a test of the attacks looks at: 256 at the quick level, 1000 beyond."""
    return 256 if subject.level == "quick" else 1000


def attacked(
    subject: Subject,
    text: str,
    images: Images,
    *,
    eps: float | None = None,
    norm: str | None = None,
    on: Classifier | None = None,
) -> Outcome:
    """:meth:`Subject.attack`; a model without gradients gives a gradient attack nothing to climb: it breaks nothing."""
    try:
        return subject.attack(text, images, eps=eps, norm=norm, on=on)
    except ContractBroken as error:
        if error.code != "C19":
            raise
    n, device = len(images), images.x.device
    none = torch.zeros(n, dtype=torch.bool, device=device)
    far = torch.full((n,), math.inf, dtype=torch.float64, device=device)
    zero = torch.zeros(n, dtype=torch.int64, device=device)
    return Outcome(none, images.x.clone(), far, far.clone(), none.clone(), zero, zero.clone())


def by_loss(subject: Subject, images: Images) -> dict[str, Tensor]:
    """Images broken by the gradient attack on each loss: cross-entropy and margin, beyond the quick level all four.

    Returns:
        (n,) bool by loss.
    """
    losses = ("ce", "margin") if subject.level == "quick" else tuple(BY_LOSS)
    return {loss: attacked(subject, BY_LOSS[loss], images).broken for loss in losses}


def stored(subject: Subject, images: Images, *, black_box: bool) -> Tensor:
    """Images that an attack of the stored runs broke within eps, by the access that the attack has. -> (n,) bool."""
    hit: set[int] = set()
    for store in subject.stores:
        labels = [m["label"] for m in store.manifest()["methods"] if is_black_box(m) == black_box]
        frame = store.frame()
        near = frame["success"] & frame["attack"].isin(labels)
        near &= frame[f"distance_{subject.norm}"] <= reach(subject.eps)
        hit |= set(frame.loc[near, "index"].tolist())
    return torch.tensor([i in hit for i in images.ids.tolist()], dtype=torch.bool, device=images.x.device)


def is_black_box(method: dict[str, object]) -> bool:
    """Whether a method of a manifest saw no gradient of the model: a random search, or images crafted elsewhere."""
    if "crafted_on" in method:
        return True
    with suppress(RobevalError):
        return find("attacks", str(method["name"])).facts.get("access") == "black-box"
    return False


def by_gradients(subject: Subject, images: Images) -> Tensor:
    """Images that any gradient attack broke, ours or one of the stored runs. -> (n,) bool."""
    found = stored(subject, images, black_box=False)
    return either([found, *by_loss(subject, images).values()])


def either(masks: Iterable[Tensor]) -> Tensor:
    """(n,) bool each -> (n,) bool."""
    return torch.stack(list(masks)).any(0)


def ids(images: Images, mask: Tensor) -> list[int]:
    """Ids of the images where the mask holds."""
    return images.ids[mask].tolist()


def points(k: Tensor | int, n: int) -> float:
    """A count of n images in points of a percentage."""
    return 100.0 * float(k) / n if n else 0.0


def whole_box(norm: str, size: int) -> float:
    """The radius of a ball that holds every image of ``size`` pixel entries, whatever its centre."""
    return {"linf": 1.0, "l2": math.sqrt(size), "l1": float(size)}[norm]


def one_step(loss: str = "ce") -> str:
    """One step of the length eps from the image itself, in any norm: FGSM in linf."""
    return f"pgd:steps=1,relative_step=1,random_start=false,loss={loss}"
