"""What an attack wants of the logits, one goal per row. Signs are settled here once: attacks always ascend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.core.errors import unknown


def column(z: Tensor, index: Tensor) -> Tensor:
    """The entry of each row at its own index. Shapes: (n, K), (n,) -> (n,)."""
    return z.gather(1, index[:, None]).squeeze(1)


def without(z: Tensor, index: Tensor) -> Tensor:
    """The logits with one class masked out by -inf. Shapes: (n, K), (n,) -> (n, K)."""
    return z.scatter(1, index[:, None], -torch.inf)


@dataclass(frozen=True)
class Untargeted:
    """Any class but the true one.

    Args:
        y: True labels, shape (n,), int64.
    """

    y: Tensor

    def __getitem__(self, rows: Tensor) -> Untargeted:
        return Untargeted(self.y[rows])

    def __len__(self) -> int:
        return len(self.y)

    def reached(self, z: Tensor) -> Tensor:
        """(n, K) -> (n,) bool: the predicted class is wrong."""
        return z.argmax(1) != self.y

    def margin(self, z: Tensor) -> Tensor:
        """z_y minus the best other logit; negative where the goal is reached. (n, K) -> (n,)."""
        return column(z, self.y) - without(z, self.y).amax(1)

    def cross_entropy(self, z: Tensor) -> Tensor:
        """logsumexp(z) - z_y. (n, K) -> (n,)."""
        return z.logsumexp(1) - column(z, self.y)

    def dlr(self, z: Tensor) -> Tensor:
        """Difference of logits ratio (Croce and Hein 2020, equation 6); needs three classes. (n, K) -> (n,)."""
        top = z.sort(1, descending=True).values
        return -self.margin(z) / (top[:, 0] - top[:, 2] + 1e-12)

    def rivals(self, classes: int) -> Tensor:
        """The classes other than y, in ascending order. -> (n, K - 1) int64."""
        everyone = torch.arange(classes - 1, device=self.y.device).expand(len(self.y), -1)
        return everyone + (everyone >= self.y[:, None])

    def gaps(self, z: Tensor) -> Tensor:
        """z_j - z_y for each rival j. (n, K) -> (n, K - 1)."""
        return z.gather(1, self.rivals(z.shape[1])) - column(z, self.y)[:, None]


@dataclass(frozen=True)
class Targeted:
    """One given class.

    Args:
        t: Target labels, shape (n,), int64.
    """

    t: Tensor

    def __getitem__(self, rows: Tensor) -> Targeted:
        return Targeted(self.t[rows])

    def __len__(self) -> int:
        return len(self.t)

    def reached(self, z: Tensor) -> Tensor:
        return z.argmax(1) == self.t

    def margin(self, z: Tensor) -> Tensor:
        return without(z, self.t).amax(1) - column(z, self.t)

    def cross_entropy(self, z: Tensor) -> Tensor:
        return column(z, self.t) - z.logsumexp(1)

    def dlr(self, z: Tensor) -> Tensor:
        top = z.sort(1, descending=True).values
        return -self.margin(z) / (top[:, 0] - top[:, 2] + 1e-12)

    def gaps(self, z: Tensor) -> Tensor:
        """z_t - z_j for each other class j. (n, K) -> (n, K - 1)."""
        return column(z, self.t)[:, None] - z.gather(1, Untargeted(self.t).rivals(z.shape[1]))


Goal = Untargeted | Targeted

#: Rounding decides on the boundary itself. A margin of so many roundings of the largest logit is clear in any batch and
#: on any machine.
ROUNDINGS = 64


def clearly(goal: Goal, z: Tensor) -> Tensor:
    """The goal is reached by more than rounding. (n, K) -> (n,) bool."""
    return goal.margin(z) < -ROUNDINGS * torch.finfo(z.dtype).eps * z.abs().amax(1)


Loss = Callable[..., Tensor]


def cross_entropy(goal: Goal, z: Tensor) -> Tensor:
    return goal.cross_entropy(z)


def margin_loss(goal: Goal, z: Tensor) -> Tensor:
    return -goal.margin(z)


def dlr(goal: Goal, z: Tensor) -> Tensor:
    """DLR, or the plain margin when there are too few classes for its denominator."""
    return goal.dlr(z) if z.shape[1] >= 3 else -goal.margin(z)


def gaps(goal: Goal, z: Tensor) -> Tensor:
    return goal.gaps(z)


def ranked_rivals(goal: Goal, z: Tensor, rank: Tensor) -> Tensor:
    """The rival class at the given rank of the logits, 0 for the most probable one. (n, K), (n,) -> (n,)."""
    if isinstance(goal, Targeted):
        return goal.t
    order = without(z, goal.y).argsort(dim=1, descending=True, stable=True)
    return column(order, rank)


def leads(goal: Untargeted, z: Tensor, classes: Tensor) -> Tensor:
    """z_j - z_y for the given classes j of each row. (n, K), (n, S) -> (n, S)."""
    return z.gather(1, classes) - column(z, goal.y)[:, None]


def towards(goal: Untargeted, z: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y for one rival class t of each row, whatever the other classes do. (n, K), (n,) -> (n,)."""
    return column(z, target) - column(z, goal.y)


def dlr_towards(goal: Untargeted, z: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR (Croce and Hein 2020, equation 7), or :func:`towards` with too few classes for its denominator."""
    if z.shape[1] < 4:
        return towards(goal, z, target)
    top = z.sort(1, descending=True).values
    return towards(goal, z, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def cross_entropy_towards(goal: Untargeted, z: Tensor, target: Tensor) -> Tensor:
    """Minus the cross-entropy of the class t. (n, K), (n,) -> (n,)."""
    return Targeted(target).cross_entropy(z)


#: Losses that pull towards a class given with each row.
TOWARDS: dict[str, Loss] = {"ce": cross_entropy_towards, "cw": towards, "dlr": dlr_towards}

#: Losses by the name that the command line, the records and the attacks use. Attacks ascend them.
LOSSES: dict[str, Loss] = {"ce": cross_entropy, "cw": margin_loss, "dlr": dlr, "gaps": gaps}


def loss_named(loss: str | Loss) -> Loss:
    """The row-wise loss ``(goal, logits) -> (n,)`` or ``(n, S)`` for a name; a callable passes through."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    return LOSSES[loss]
