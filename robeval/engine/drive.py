"""Run one attack on one batch, without the engine: for trainers and for reading how questions are answered."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robeval.core.goal import Goal, loss_named
from robeval.core.questions import Answer, Attack, Gradient, Logits, Proposals, Question


def answer(question: Question, logits: Callable[[Tensor], Tensor], goal: Goal, open_: Tensor) -> Answer:
    """Ask the model about every row of the question at once.

    Uses ``autograd.grad`` with respect to the points alone, so no parameter's ``.grad`` is touched.
    """
    if isinstance(question, Proposals):
        with torch.no_grad():
            z = logits(question.points.flatten(0, 1)).unflatten(0, question.only.shape)
            empty = z.new_empty(0)
            return Answer(z, open_, empty, empty, question.first(goal[question.rows], z))
    if not isinstance(question, Gradient):
        with torch.no_grad():
            z = logits(question.points)
            return Answer(z, open_, z.new_empty(0), z.new_empty(0))
    with torch.enable_grad():
        x = question.points.detach().requires_grad_()
        z = logits(x)
        loss = loss_named(question.loss)(goal, z, *question.args)
        columns = loss[:, None] if loss.dim() == 1 else loss
        grads = [
            torch.autograd.grad(columns[:, k].sum(), x, retain_graph=k + 1 < columns.shape[1])[0]
            for k in range(columns.shape[1])
        ]
    grad = grads[0] if loss.dim() == 1 else torch.stack(grads, 1)
    return Answer(z.detach(), open_, loss.detach(), grad)


def drive(attack: Attack, logits: Callable[[Tensor], Tensor], goal: Goal) -> Tensor:
    """Drive an attack to its end on one batch and return its last point, unjudged.

    Args:
        attack: A fresh attack generator over a batch.
        logits: The model, (n, C, H, W) -> (n, K). Its mode and parameters are the caller's business.
        goal: The goal that the generator was made with.
    """
    asked: Question | None = None
    try:
        asked = next(attack)
        open_ = torch.ones(len(goal), dtype=torch.bool, device=asked.points.device)
        while True:
            asked = attack.send(answer(asked, logits, goal, open_))
    except StopIteration as end:
        if end.value is None:
            if not isinstance(asked, (Logits, Gradient)):
                raise ValueError("the attack returned no point") from None
            return asked.points.detach()
        return end.value.detach()  # type: ignore[no-any-return]
