"""Run another package's attack on our model, and judge what it returns like any other candidate."""

from __future__ import annotations

import importlib
import io
import logging
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout

import numpy as np
import torch
from torch import Tensor, nn

from robeval.core.ball import Ball, per_row, vector_norm
from robeval.core.catalogue import Spec
from robeval.core.classifier import Classifier, frozen
from robeval.core.errors import ContractBroken, MachineError, RobevalError
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.engine.backend import Backend
from robeval.engine.judge import Outcome
from robeval.engine.verdict import Verdicts, judge_points

#: A candidate may leave ball or box by this much, in pixel units, through rounding; it is brought back before the
#: verdict. One that leaves by more is judged as it is, and refused.
ROUNDING = 1e-5


class Counted(nn.Module):
    """The classifier as a module of its own that counts the rows of every pass."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.network = classifier.module
        self.forwards = self.backwards = self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        z = self.network(x)
        self.forwards += len(x)
        self.calls += 1
        if z.requires_grad:
            z.register_hook(lambda grad: self._count(len(grad)))
        return z

    def _count(self, rows: int) -> None:
        self.backwards += rows


def insist(specs: Iterable[Spec]) -> None:
    """Refuse references that do not exist, before anything is written.

    Raises:
        UsageError: the package has no such attack, or the attack no such setting.
    """
    for spec in specs:
        if spec.method.kind == "references":
            check = getattr(importlib.import_module(spec.method.module), "check", None)
            if check:
                check(**spec.settings)


def run_reference(
    spec: Spec,
    images: Images,
    goal: Untargeted,
    ball: Ball,
    backend: Backend,
    *,
    seed: int = 0,
    on_batch: Callable[[int, int, str], None] | None = None,
) -> Iterator[Outcome]:
    """Attack every image in plain batches; yield each outcome after the verdict on its one candidate.

    A package does not say what it spent on which image. So passes are counted for a batch as a whole, rows forward and
    rows backward, and each of its images is charged the mean, rounded up; ``iterations`` is the number of model calls
    of the batch, and an adversarial image counts as found at the end of it.

    Args:
        spec: A reference with its settings.
        images: (N, C, H, W) in [0, 1]; all of them are attacked.
        goal: True labels, one per image.
        ball: Threat model; ``eps = inf`` for classes that take no radius.
        backend: Its capacity is the batch size.
        seed: Handed to the package for every batch.
        on_batch: Told (decided, total, text) after every batch.

    Raises:
        UsageError: no such attack, or too few classes for it.
        ContractBroken: the package fails on this model.
        MachineError: out of memory.
    """
    function = spec.method.load()
    for rows in torch.arange(len(images), device=images.x.device).split(max(1, backend.capacity)):
        x, part = images.x[rows], goal[rows]
        model = Counted(backend.classifier)
        with frozen(model), _contained(seed, x.device), _told(spec.label):
            found = function(model, x.clone(), part.y.clone(), ball, seed, **spec.settings).detach().to(x.dtype)
        candidates = _mended(x, found, ball)
        verdicts = judge_points(backend, x, candidates, part, ball)
        counts = backend.counts
        counts.forwards, counts.backwards = counts.forwards + model.forwards, counts.backwards + model.backwards
        counts.calls, counts.slots = counts.calls + model.calls, counts.slots + model.forwards
        for k, position in enumerate(rows.tolist()):
            yield _outcome(position, k, x, candidates, part.y, verdicts, model)
        if on_batch:
            text = f"{spec.label}  {counts.forwards + counts.backwards:,} passes"
            on_batch(int(rows[-1]) + 1, len(images), text)


def _mended(x0: Tensor, x: Tensor, ball: Ball) -> Tensor:
    """Candidates without NaN, and without what rounding alone carried out of the ball or the box."""
    x = torch.where(per_row(x.isfinite().flatten(1).all(1), x), x, x0)
    inside = ball.project(x0, x)
    near = vector_norm(inside - x, "linf") <= ROUNDING
    return torch.where(per_row(near & ~ball.contains(x0, x), x), inside, x)


def _outcome(
    position: int, k: int, x: Tensor, candidates: Tensor, y: Tensor, verdicts: Verdicts, model: Counted
) -> Outcome:
    success = bool(verdicts.adversarial[k])
    forwards, backwards = (math.ceil(rows / len(x)) for rows in (model.forwards, model.backwards))
    distances = dict.fromkeys(("linf", "l2", "l1", "l0"), math.inf)
    if success:
        change = (candidates[k].double() - x[k].double())[None]
        distances = {norm: float(vector_norm(change, norm)) for norm in distances}
    return Outcome(
        position,
        success=success,
        prediction=int(verdicts.prediction[k] if success else y[k]),
        margin=float(verdicts.margin[k]),
        attempt=0 if success else -1,
        iterations=model.calls,
        forwards=forwards + 2,
        backwards=backwards,
        first_success_forward=forwards if success else -1,
        survives_8bit=success and bool(verdicts.survives_8bit[k]),
        distances=distances,
        example=candidates[k].clone() if success else None,
        error="" if bool(verdicts.evaluable[k]) else "the model gave NaN or Inf logits under attack",
    )


@contextmanager
def _contained(seed: int, device: torch.device) -> Iterator[None]:
    """Global random numbers, tracing, printing and logging are as before when the package has finished."""
    trace, drawn, drawn_plain = sys.gettrace(), np.random.get_state(), random.getstate()
    logger = logging.getLogger("auto-attack")
    silent = logger.disabled
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.enable_grad(),
        redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = silent
            np.random.set_state(drawn)
            random.setstate(drawn_plain)
            sys.settrace(trace)


@contextmanager
def _told(label: str) -> Iterator[None]:
    """A package's failure in the user's terms."""
    try:
        yield
    except RobevalError:
        raise
    except (torch.OutOfMemoryError, MemoryError):
        raise MachineError(f"out of memory in {label}", code="E01", do="a smaller --batch-size") from None
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise ContractBroken(
            f"{label} failed: {type(error).__name__}: {text}",
            code="C21",
            why="the package does not handle this model, norm or these images; what was decided before is saved",
        ) from error
