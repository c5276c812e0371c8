"""Expectation over transformation: the gradient of a model that answers at random."""

from __future__ import annotations

from collections.abc import Generator

from robeval.core.questions import Answer, Gradient, Question


def averaged(question: Gradient, samples: int) -> Generator[Question, Answer, Answer]:
    """Ask the same question several times and average losses and gradients (Athalye et al. 2018, arXiv:1707.07397).

    Use as ``at = yield from averaged(Gradient(x, "ce"), samples)``. Every answer is judged; the logits handed on
    are the last ones.
    """
    at = yield question
    loss, grad = at.loss, at.grad
    for _ in range(samples - 1):
        at = yield question
        loss, grad = loss + at.loss, grad + at.grad
    at.loss, at.grad = loss / samples, grad / samples
    return at
