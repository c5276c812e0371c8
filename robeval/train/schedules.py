"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

from robeval.core.errors import UsageError, unknown
from robeval.core.numbers import number

Factor = Callable[[int], float]


def constant(arguments: str, steps: int, steps_per_epoch: int) -> Factor:
    """The same rate throughout."""
    return lambda step: 1.0


def cosine(arguments: str, steps: int, steps_per_epoch: int) -> Factor:
    """Half a cosine from 1 to 0 over the whole training."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def cyclic(arguments: str, steps: int, steps_per_epoch: int) -> Factor:
    """Linear from 0 to 1 in the first half and back to 0 in the second (Wong et al. 2020)."""
    return lambda step: 1 - abs(2 * (step + 1) / (steps + 1) - 1)


def milestones(arguments: str, steps: int, steps_per_epoch: int) -> Factor:
    """``milestones:60/120/160`` or ``milestones:60/120/160x0.2``: times 0.1 (or 0.2) from each of these epochs on."""
    epochs, _, ratio = arguments.partition("x")
    gamma = number(ratio, name="factor of the milestones", code="A04") if ratio else 0.1
    at = [int(number(e, name="a milestone", code="A04")) for e in epochs.split("/") if e.strip()]
    if not at:
        raise UsageError(
            "milestones need epochs", code="A04", do="write them like milestones:60/120 or milestones:60x0.2"
        )
    return lambda step: gamma ** sum(step // steps_per_epoch >= e for e in at)


SCHEDULES = {"constant": constant, "cosine": cosine, "cyclic": cyclic, "milestones": milestones}


def schedule(text: str, steps: int, steps_per_epoch: int) -> Factor:
    """The factor of the learning rate at each step.

    Args:
        text: ``constant``, ``cosine``, ``cyclic`` or ``milestones:EPOCHS`` with epochs counted from 0.
        steps: Steps of the whole training.
        steps_per_epoch: Steps of one epoch.

    Raises:
        UsageError: unknown schedule or malformed milestones.
    """
    name, _, arguments = text.partition(":")
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    return SCHEDULES[name](arguments, steps, steps_per_epoch)
