"""The smallest constants that are consistent with every adversarial image found."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from robeval.bounds.expansion import RIVALS, expand, forward
from robeval.core.ball import vector_norm
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.store.runstore import RunStore

BATCH = 256


def repaired(
    classifier: Classifier, images: Images, method: dict[str, Any], norm: str, constant: float, runs: list[RunStore]
) -> tuple[float, int]:
    """A bound's largest constant, raised to what the stored adversarial images prove at least, over all rivals.

    Args:
        classifier: Pixels in [0, 1] to logits.
        images: Clean images; stored images of other ids are left out.
        method: The bound's entry in the manifest: its order and settings.
        norm: Norm of the radius.
        constant: The largest constant that the bound used.
        runs: Attack runs on the same weights and data.

    Returns:
        The repaired constant and the number of adversarial images that it was checked against.
    """
    least, seen = least_constants(classifier, images, method, norm, runs)
    return max(constant, float(least.max())), seen


def least_constants(
    classifier: Classifier, images: Images, method: dict[str, Any], norm: str, runs: list[RunStore]
) -> tuple[Tensor, int]:
    """What the stored adversarial images prove the constants to be at least: one per rival class, or one for a loss.

    For a first-order bound L >= (l(x + v) - l(x)) / |v|, for a second-order one C >= 2 (l(x + v) - l(x) - <g, v>) /
    |v|^2: a smaller constant contradicts the loss seen at x + v. With constants raised to these no stored image lies
    below its bound; they are still estimates.

    Returns:
        (K,) or (1,) float64, -inf where nothing was seen, and the number of adversarial images.
    """
    place = {(int(i), int(y)): k for k, (i, y) in enumerate(zip(images.ids, images.y, strict=True))}
    spaces = {"logits": "rivals", "probabilities": "rivals_prob"}
    loss = method["settings"].get("loss") or spaces[method["settings"].get("space", "logits")]
    temperature = float(method["settings"].get("temperature", 10.0))
    top = int(method["settings"].get("top", 1))
    best, seen = torch.full((classifier.classes if loss in RIVALS else 1,), -torch.inf, dtype=torch.float64), 0
    for store in runs:
        frame = store.frame()
        rows = frame[frame["success"] & frame["clean_correct"] & (frame["example"] >= 0)]
        known = [(i, y) in place for i, y in zip(rows["index"], rows["label"], strict=True)]
        rows = rows[pd.Series(known, index=rows.index, dtype=bool)]
        for start in range(0, len(rows), BATCH):
            part = rows.iloc[start : start + BATCH]
            where = torch.tensor([place[int(i), int(y)] for i, y in zip(part["index"], part["label"], strict=True)])
            x, y = images.x[where.to(images.x.device)], images.y[where.to(images.x.device)]
            found = torch.from_numpy(store.examples(part)).to(x)
            length = vector_norm((found.double() - x.double()).flatten(1), norm).cpu()
            second = method["order"] == 2
            if loss in RIVALS:
                least = _rises_of_rivals(classifier, x, found, y, RIVALS[loss], second)
            else:
                least = _rises(classifier, x, found, y, loss, temperature, top, second)
            least = (2 * least / length.square()[:, None]) if second else least / length[:, None]
            moved = least[length > 0]
            if len(moved):
                best = torch.maximum(best, moved.amax(0))
            seen += len(part)
    return best, seen


def _rises(
    classifier: Classifier, x: Tensor, there: Tensor, y: Tensor, loss: str, temperature: float, top: int, second: bool
) -> Tensor:
    """l(x + v) - l(x), and with ``second`` less <g, v>. -> (n, 1)."""
    clean, other = (expand(classifier, p, y, loss, temperature, top=top) for p in (x, there))
    rise = (other.value.detach().double() - clean.value.detach().double())[: len(x)]
    if second:
        rise = rise - ((there.double() - x.double()) * clean.gradient.double()[: len(x)]).flatten(1).sum(1)
    return rise[:, None].cpu()


def _rises_of_rivals(
    classifier: Classifier, x: Tensor, there: Tensor, y: Tensor, probabilities: bool, second: bool
) -> Tensor:
    """The same of f_j - f_y for every class j; -inf for the true class. -> (n, K)."""
    point, _, z = forward(classifier, x, y)
    _, _, z_there = forward(classifier, there, y)
    with torch.enable_grad():
        f = z.softmax(1) if probabilities else z
        f_there = z_there.softmax(1) if probabilities else z_there
        rise = (f_there.detach().double() - f.detach().double())[: len(x)]
        if second:
            # <grad f_j, v> of all classes at once: the derivative in u of <J^T u, v>.
            u = torch.zeros_like(f, requires_grad=True)
            (back,) = torch.autograd.grad(f, point, u, create_graph=True)
            v = torch.zeros_like(point)
            v[: len(x)] = there - x
            (along,) = torch.autograd.grad((back * v).sum(), u)
            rise = rise - along.detach().double()[: len(x)]
    rise = rise - rise.gather(1, y[:, None])
    return rise.scatter(1, y[:, None], -torch.inf).cpu()
