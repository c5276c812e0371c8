"""A cohort: some images of one wave of attempts, one suspended attack, and the question that it waits on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robeval.core.errors import ContractBroken
from robeval.core.questions import Answer, Attack, Gradient, Logits, Question

#: What rows hold that nobody asked about. No attack may look at it: a test fills in NaN.
BLANK = 0.0


@dataclass(eq=False)
class Cohort:
    """Rows that advance in lockstep.

    Args:
        rows: (n,) position of the image of each row, ascending.
        attempts: (n,) attempt of each row.
        wave: Number of the wave of attempts.
        attack: The suspended generator.
        black_box: The attack may only ask for logits.
    """

    rows: Tensor
    attempts: Tensor
    wave: int
    attack: Attack
    black_box: bool
    question: Question | None = None
    waiting: Tensor | None = None
    asked: Tensor | None = None
    reply: Answer | None = None
    last: bool = False

    def resume(self, open_: Tensor) -> None:
        """Hand over the answer and take the next question; ``question`` is None when the attack has ended."""
        if self.last or not bool(open_.any()):
            self.attack.close()
            self.question = None
            return
        try:
            if self.reply is None:
                self.question = next(self.attack)
            else:
                self.reply.open = open_
                self.question = self.attack.send(self.reply)
        except StopIteration as end:
            self.last = True
            self.question = None if end.value is None else Logits(end.value)
        if self.question is None:
            return
        if self.black_box and isinstance(self.question, Gradient):
            raise ContractBroken("a black-box attack asked for a gradient", code="C20")
        asks = open_ if self.question.only is None else open_ & self.question.only
        self.asked, self.waiting, self.reply = asks, asks.clone(), None

    @property
    def lane(self) -> object:
        """Rows of the same lane can share a batch."""
        assert self.question is not None
        if isinstance(self.question, Gradient):
            return (self.question.loss, tuple(a.shape[1:] for a in self.question.args))
        return None

    @property
    def open_waiting(self) -> int:
        """Rows that still want an answer."""
        return 0 if self.waiting is None or self.question is None else int(self.waiting.sum())

    def take(self, room: int) -> Tensor:
        """Up to ``room`` waiting rows, which wait no longer. -> (m,) indices into the cohort."""
        assert self.waiting is not None
        rows = self.waiting.nonzero().squeeze(1)[:room]
        self.waiting[rows] = False
        return rows

    def store(self, rows: Tensor, said: Answer) -> None:
        """Keep the answer for some rows; all others stay zero."""
        old = self.reply

        def into(held: Tensor | None, part: Tensor) -> Tensor:
            held = part.new_full((len(self.rows), *part.shape[1:]), BLANK) if held is None else held
            if len(part):
                held[rows] = part
            return held

        self.reply = Answer(
            into(old.logits if old else None, said.logits),
            said.open,
            into(old.loss if old else None, said.loss),
            into(old.grad if old else None, said.grad),
        )


def waves(attempts: int, at_once: bool) -> list[list[int]]:
    """Which attempts of an image run side by side, wave after wave: 1, 2, 4, 8, then 16 at a time.

    The first attempt goes alone, since it settles most images that can be settled. Later attempts share batches, which
    keeps them full when few images are left. The plan is fixed, so that passes and results do not depend on the number
    of neighbours. A search for the nearest point cannot stop early, so all its attempts run at once.
    """
    if at_once:
        return [list(range(attempts))]
    plan, start, width = [], 0, 1
    while start < attempts:
        plan.append(list(range(start, min(start + width, attempts))))
        start, width = start + width, min(2 * width, 16)
    return plan
