"""A cohort: some images of one wave of attempts, one suspended attack, and the question that it waits on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.core.errors import ContractBroken
from robeval.core.goal import Goal
from robeval.core.questions import Answer, Attack, Gradient, Logits, Proposals, Question

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
        x0: (n, C, H, W), the clean images that the generator was made with.
        black_box: The attack may not ask for gradients.
        clean: (n, K), logits of the clean images where they are known; asking for them then costs nothing.
    """

    rows: Tensor
    attempts: Tensor
    wave: int
    attack: Attack
    x0: Tensor
    black_box: bool = False
    clean: Tensor | None = None
    question: Question | None = None
    points: Tensor | None = None  # (p, C, H, W), every point of the question
    owner: Tensor | None = None  # (p,), its row in the cohort
    waiting: Tensor | None = None  # (p,) bool, still unanswered
    asked: Tensor | None = None  # (p,) bool, somebody wants to know
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
            while self.clean is not None and isinstance(self.question, Logits) and self.question.points is self.x0:
                none = self.clean.new_empty(0)
                self.question = self.attack.send(Answer(self.clean, open_, none, none))
        except StopIteration as end:
            self.last = True
            self.question = None if end.value is None else Logits(end.value)
        self.reply = None
        if isinstance(self.question, Gradient) and self.black_box:
            raise ContractBroken("a black-box attack asked for a gradient", code="C20")
        if isinstance(self.question, Proposals):
            rows, ahead = self.question.rows, self.question.only.shape[1]
            self.points, self.owner = self.question.points.flatten(0, 1), rows.repeat_interleave(ahead)
            self.asked = (self.question.only & open_[rows][:, None]).flatten()
        elif self.question is not None:
            self.points = self.question.points
            self.owner = torch.arange(len(self.rows), device=self.rows.device)
            self.asked = open_ if self.question.only is None else open_ & self.question.only
        self.waiting = None if self.asked is None else self.asked.clone()

    @property
    def lane(self) -> object:
        """Questions of the same lane can share a batch."""
        if isinstance(self.question, Gradient):
            return (self.question.loss, tuple(a.shape[1:] for a in self.question.args))
        return None

    @property
    def open_waiting(self) -> int:
        """Points that still want an answer."""
        return 0 if self.waiting is None or self.question is None else int(self.waiting.sum())

    def take(self, room: int) -> Tensor:
        """Up to ``room`` waiting points, which wait no longer. -> (m,) indices into the question's points."""
        assert self.waiting is not None
        chosen = self.waiting.nonzero().squeeze(1)[:room]
        self.waiting[chosen] = False
        return chosen

    def store(self, chosen: Tensor, said: Answer) -> None:
        """Keep the answer for some points; all others stay zero."""
        assert self.points is not None
        old, size = self.reply, len(self.points)

        def into(held: Tensor | None, part: Tensor) -> Tensor:
            held = part.new_full((size, *part.shape[1:]), BLANK) if held is None else held
            if len(part):
                held[chosen] = part
            return held

        self.reply = Answer(
            into(old.logits if old else None, said.logits),
            said.open,
            into(old.loss if old else None, said.loss),
            into(old.grad if old else None, said.grad),
        )

    def complete(self, goal: Goal) -> Tensor:
        """Bring the answer in its final form. -> (m,) the points that count, in order, as if asked one at a time.

        Args:
            goal: One goal per row of the cohort.
        """
        assert self.asked is not None and self.reply is not None
        counts = self.asked
        if isinstance(self.question, Proposals):
            shape = self.question.only.shape
            asked = self.asked.view(shape)
            self.question.only = asked
            self.reply.logits = self.reply.logits.unflatten(0, shape)
            self.reply.first = self.question.first(goal[self.question.rows], self.reply.logits)
            place = torch.arange(shape[1], device=asked.device)
            counts = (asked & (place <= self.reply.first[:, None])).flatten()
        return counts.nonzero().squeeze(1)


def waves(attempts: int, at_once: bool) -> list[list[int]]:
    """Which attempts of an image run side by side, wave after wave: 1, 8, 16, 16, ...

    The first attempt goes alone, since it settles most images that can be settled. Later attempts share batches: that
    keeps them full when few images are left, and the attempt that succeeds first spares the others most of their steps.
    The plan is fixed, so that passes and results do not depend on the number of neighbours. A search for the nearest
    point cannot stop early, so all its attempts run at once.
    """
    if at_once:
        return [list(range(attempts))]
    plan: list[list[int]] = []
    start = 0
    for width in itertools.chain((1, 8), itertools.repeat(16)):
        if start >= attempts:
            return plan
        plan.append(list(range(start, min(start + width, attempts))))
        start += width
    return plan
