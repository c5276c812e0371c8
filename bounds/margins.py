"""All margins of all images at once: one column per rival class, or one column for a loss over all rivals.

Machinery of the bounds, no bound itself. If rival j cannot overtake the true class within r_j, the class stays the best
within min_j r_j, and among the best k within the k-th smallest r_j. So no loss over all rivals is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.bounds.expansion import RIVALS, OnBatch, Reading, expand, forward
from robeval.core.ball import Ball
from robeval.core.classifier import Classifier
from robeval.core.errors import UsageError
from robeval.core.goal import column, without
from robeval.core.images import Images

#: Gradients that a bound takes per image: one for each of the best rivals. Of the others nothing but the gap is known.
GRADIENTS = 10


@dataclass
class Margins:
    """Margins of N images against M columns, float64 on the CPU; M is K with one margin per rival, else 1.

    Args:
        value: (N, M), f_j - f_y or the loss; -inf for the true class itself.
        gap: (N, M), how far the value lies below the level at which the class can change, at least 0.
        slope: (N, M), dual norm of the gradient; nan where none was taken.
        prediction: (N,).
        backwards: Gradients per image.
    """

    value: Tensor
    gap: Tensor
    slope: Tensor
    prediction: Tensor
    backwards: int

    def filled(self) -> Tensor:
        """Slopes, with the largest of all where none was taken. (N, M)."""
        return self.slope.nan_to_num(nan=float(self.slope.nan_to_num(nan=0.0).max()))

    def deciding(self, radius: Tensor, top: int = 1) -> Tensor:
        """Column of each image's k-th smallest radius; of equal ones that with the larger value. (N, M) -> (N,)."""
        by_value = self.value.argsort(dim=1, descending=True, stable=True)
        by_radius = radius.gather(1, by_value).argsort(dim=1, stable=True)
        return by_value.gather(1, by_radius)[:, top - 1 if self.value.shape[1] > 1 else 0]


def readable(space: str) -> str:
    """Name of the margins of logits or of probabilities."""
    return "rivals_prob" if space == "probabilities" else "rivals"


def level(loss: str, classes: int, temperature: float) -> float:
    """Value of the loss below which the class is certainly the true one.

    0, but for softcw_prob: a mean over K entries lies below their maximum by up to log(K) / T.
    """
    return -math.log(classes) / temperature if loss == "softcw_prob" else 0.0


def refuse_top(loss: str, top: int, classes: int) -> None:
    """Refuse a rank that the loss does not have.

    Raises:
        UsageError: no such rank, or a soft loss, which is one of the best rival only.
    """
    if not 1 <= top < classes:
        raise UsageError(f"top must be between 1 and {classes - 1}, got {top}", code="A04")
    if top > 1 and loss not in ("cw", "cw_prob", *RIVALS):
        raise UsageError(f"{loss} has no top-{top} form", code="A04", do="loss=rivals, which has every rank")


def measure(
    classifier: Classifier,
    images: Images,
    norm: str,
    loss: str,
    temperature: float = 10.0,
    *,
    top: int = 1,
    zero: float | None = None,
    batch_size: int = 256,
    on_batch: OnBatch | None = None,
    name: str = "",
) -> Margins:
    """Values, gaps and slopes of all images: one forward pass each, one backward pass per column looked at.

    Raises:
        UsageError: a rank that the loss does not have.
        ContractBroken: NaN logits or gradients, or a model without gradients.
    """
    refuse_top(loss, top, classifier.classes)
    ball = Ball(norm, math.inf)
    look = min(max(GRADIENTS, top), classifier.classes - 1) if loss in RIVALS else 1
    values, slopes, predictions = [], [], []
    for rows in torch.arange(len(images)).split(batch_size):
        x, y = images.x[rows], images.y[rows]
        if loss in RIVALS:
            value, slope, z = towards_rivals(classifier, x, y, ball, RIVALS[loss], look)
        else:
            at = expand(classifier, x, y, loss, temperature, top=top)
            value = at.value.detach()[: at.rows, None].double()
            slope = ball.dual_norm(at.gradient[: at.rows].double())[:, None]
            z = at.logits.detach()[: at.rows]
        values.append(value.cpu())
        slopes.append(slope.cpu())
        predictions.append(z.argmax(1).cpu())
        if on_batch:
            on_batch(int(rows[-1]) + 1, len(images), name)
    value, slope, prediction = torch.cat(values), torch.cat(slopes), torch.cat(predictions)
    start = level(loss, classifier.classes, temperature) if zero is None else zero
    gap = (start - value).clamp_min(0)
    if loss not in RIVALS and top == 1:  # the sign of a soft loss is not exactly the verdict
        gap = gap.masked_fill((prediction != images.y.cpu())[:, None], 0)
    return Margins(value, gap, slope, prediction, look)


def towards_rivals(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    probabilities: bool,
    look: int,
    rivals: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """f_j - f_y of every class, and its slope for some: the ``look`` best rivals, or the given ones (n, look).

    Returns:
        Values (n, K) and slopes (n, K), float64, and logits.
    """
    point, labels, z = forward(classifier, x, y)
    n = len(x)
    with torch.enable_grad():
        f = z.softmax(1) if probabilities else z
        lead = f - column(f, labels)[:, None]
    value = without(lead.detach(), labels)[:n].double()
    order = value.topk(look, dim=1).indices if rivals is None else rivals
    slope = torch.full_like(value, math.nan)
    for k in range(order.shape[1]):
        with torch.enable_grad():
            total = column(lead[:n], order[:, k]).sum()
        (gradient,) = torch.autograd.grad(
            total, point, retain_graph=k + 1 < order.shape[1], materialize_grads=True, allow_unused=True
        )
        slope.scatter_(1, order[:, k : k + 1], ball.dual_norm(gradient[:n].double())[:, None])
    return value, slope, z.detach()[:n]


def largest_per_column(values: Tensor) -> Tensor:
    """Largest entry of each column, nan left aside; a column of nan gets the largest of all. (N, M) -> (M,)."""
    known = values.nan_to_num(nan=-math.inf)
    column_ = known.amax(0)
    return torch.where(column_.isfinite(), column_, column_.max())


def nearest_columns(at: Margins, radius: Tensor, count: int) -> Tensor:
    """The rivals with the smallest radii; of equal ones those with the larger values. (n, M) -> (n, <= count)."""
    places = range(1, min(count, radius.shape[1] - 1) + 1)
    return torch.stack([at.deciding(radius, k) for k in places], 1)


def with_unseen(constants: Tensor, searched: Tensor) -> Tensor:
    """Constants (n, M, S) where rivals not ``searched`` (n, M) get at least the largest of those that were."""
    most = constants.masked_fill(~searched[:, :, None], -math.inf).amax(1, keepdim=True)
    return torch.where(searched[:, :, None], constants, torch.maximum(constants, most))


def readings(
    images: Images,
    at: Margins,
    radius: Tensor,
    which: Tensor,
    constant: Tensor,
    *,
    loss: str,
    domain: str,
    forwards: Tensor | None = None,
    backwards: Tensor | None = None,
    **columns: Tensor | int,
) -> list[Reading]:
    """One reading per image from the columns that decide.

    Args:
        images: The images.
        at: Their margins.
        radius: (N, M) radii, one per column.
        which: (N,), the deciding column.
        constant: (N, M) constants.
        loss: Name of the loss.
        domain: Where the constants were taken.
        forwards: (N,) forward passes; one where absent.
        backwards: (N,) gradients; those of the margins where absent.
        columns: More of the reading, (N,) or (N, M) tensors or numbers.
    """
    kind = str(images.x.dtype).removeprefix("torch.")

    def number(t: Tensor | int, i: int) -> float | int:
        if isinstance(t, int):
            return t
        picked = t[i, which[i]] if t.dim() == 2 else t[i]
        return picked.item()

    return [
        Reading(
            index=int(images.ids[i]),
            label=int(images.y[i]),
            prediction=int(at.prediction[i]),
            radius=float(radius[i, which[i]]),
            loss=loss,
            loss_value=float(at.value[i, which[i]]),
            gradient_norm=float(at.filled()[i, which[i]]),
            constant=float(constant[i, which[i]]),
            domain=domain,
            arithmetic=f"{kind}, rounding not enclosed",
            forwards=1 if forwards is None else int(forwards[i]),
            backwards=at.backwards if backwards is None else int(backwards[i]),
            rival=int(which[i]) if loss in RIVALS else -1,
            **{name: number(t, i) for name, t in columns.items()},  # type: ignore[arg-type]
        )
        for i in range(len(images))
    ]
