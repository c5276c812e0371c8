"""The two questions that an attack can ask, and the answer that it gets.

An attack is a generator: it yields a question about one point per row and receives an :class:`Answer`. It never sees
the model, and it never decides whether it succeeded.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from torch import Tensor

from robeval.core.goal import Loss


@dataclass
class Logits:
    """Which logits does the model give here? The only question of a black-box attack.

    Args:
        points: (n, C, H, W), one point per row.
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


Question = Logits | Gradient


@dataclass
class Answer:
    """What the model said. Rows that were closed or did not ask hold zeros.

    Args:
        logits: (n, K).
        open: (n,) bool, rows that are still undecided.
        loss: (n,) or (n, S); empty after :class:`Logits`.
        grad: (n, C, H, W) or (n, S, C, H, W); empty after :class:`Logits`.
    """

    logits: Tensor
    open: Tensor
    loss: Tensor
    grad: Tensor

    def __getitem__(self, rows: slice) -> Answer:
        """The answer for some rows."""
        return Answer(self.logits[rows], self.open[rows], self.loss[rows], self.grad[rows])


#: What an attack function returns. The final value, if any, is one last point per row, which the engine judges too.
Attack = Generator[Question, Answer, Tensor | None]
