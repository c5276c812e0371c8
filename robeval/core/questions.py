"""The three questions that an attack can ask, and the answer that it gets.

An attack is a generator: it yields a question and receives an :class:`Answer`. It never sees the model, and it never
decides whether it succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robeval.core.goal import Goal, Loss


@dataclass
class Logits:
    """Which logits does the model give here?

    Args:
        points: (n, C, H, W), one point per row. The clean images themselves cost nothing: their logits are known.
        only: (n,) bool, the rows that ask; all when None. The others get zeros and pay nothing.
    """

    points: Tensor
    only: Tensor | None = None


@dataclass
class Gradient:
    """Logits, loss and gradient of the loss with respect to the points.

    Args:
        points: (n, C, H, W), one point per row.
        loss: A name of :data:`robeval.core.goal.LOSSES` or a function ``(goal, logits, *args) -> (n,)`` or ``(n, S)``.
            With S losses per row the gradient has shape (n, S, C, H, W) and costs S backward passes.
        only: (n,) bool, the rows that ask; all when None.
        args: Tensors with one row per image that the loss needs besides the goal.
    """

    points: Tensor
    loss: str | Loss
    only: Tensor | None = None
    args: tuple[Tensor, ...] = field(default=())


@dataclass
class Proposals:
    """Which of these points, tried one after the other, is the first to be accepted? The question of a random search.

    All points of a row start from the same state, so they can be asked at once; those after the first accepted one are
    discarded unseen, as if they had never been asked. Hence looking ahead never changes what the search does.

    Args:
        rows: (m,) int64, the rows that ask.
        points: (m, L, C, H, W), in the order in which they are tried.
        only: (m, L) bool, the points to try; the others count as not accepted and cost nothing.
        accept: ``(goal, logits, *args) -> bool`` for one point per row.
        args: (m, ...) tensors that ``accept`` needs.
    """

    rows: Tensor
    points: Tensor
    only: Tensor
    accept: Callable[..., Tensor]
    args: tuple[Tensor, ...] = field(default=())

    def first(self, goal: Goal, logits: Tensor) -> Tensor:
        """Place of the first accepted point of each asking row; L where there is none. (m, L, K) -> (m,).

        Args:
            goal: Goals of the asking rows.
            logits: (m, L, K).
        """
        m, length = self.only.shape
        each = torch.arange(m, device=self.only.device).repeat_interleave(length)
        accepted = self.accept(goal[each], logits.flatten(0, 1), *(a[each] for a in self.args)).view(m, length)
        place = torch.arange(length, device=self.only.device).expand(m, -1)
        return torch.where(accepted & self.only, place, length).amin(1)


Question = Logits | Gradient | Proposals


@dataclass
class Answer:
    """What the model said. Rows that were closed or did not ask hold zeros.

    Args:
        logits: (n, K); after :class:`Proposals` (m, L, K).
        open: (n,) bool, rows that are still undecided.
        loss: (n,) or (n, S); empty unless a :class:`Gradient` was asked.
        grad: (n, C, H, W) or (n, S, C, H, W); empty unless a :class:`Gradient` was asked.
        first: (m,) int64, place of the first accepted point, L where there is none; empty unless :class:`Proposals`
            were asked.
    """

    logits: Tensor
    open: Tensor
    loss: Tensor
    grad: Tensor
    first: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __getitem__(self, rows: slice) -> Answer:
        """The answer for some rows."""
        return Answer(self.logits[rows], self.open[rows], self.loss[rows], self.grad[rows])


#: What an attack function returns. The final value, if any, is one last point per row, which the engine judges too.
Attack = Generator[Question, Answer, Tensor | None]
