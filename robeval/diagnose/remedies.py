"""Where a test found an attack that cannot work, attack again with what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robeval.core.classifier import Classifier
from robeval.core.errors import RobevalError
from robeval.core.images import Images
from robeval.core.records import FAILED, WARNING
from robeval.diagnose.counted import Counted
from robeval.diagnose.subject import Subject

#: What a softmax rounds to nothing still has a logarithm: the smallest normal number of single precision.
TINY = 1.2e-38


@dataclass(frozen=True)
class Remedy:
    """One way to mend an evaluation.

    Args:
        name: A word for labels.
        tests: Tests whose failure or warning calls for it.
        attacks: What to run, in order, on images that still stand.
        view: The logits as the attack shall see them; verdicts are the model's own.
        batch_size: Images in one model call; 0 leaves it.
    """

    name: str
    tests: tuple[str, ...]
    attacks: tuple[str, ...]
    view: Callable[[Tensor, Tensor], Tensor] | None = None
    batch_size: int = 0


def _as_logits(z: Tensor, clean: Tensor) -> Tensor:
    """Logarithm of probabilities: logits up to a constant, in which losses have a slope again."""
    return z.clamp_min(TINY).log()


def _rescaled(z: Tensor, clean: Tensor) -> Tensor:
    """Logits over the median lead of the first class, so that a softmax of them does not saturate."""
    top = clean.topk(2, dim=1).values
    return z / (top[:, 0] - top[:, 1]).median().clamp_min(1e-12)


REMEDIES = (
    Remedy("averaged", ("D1", "D4"), ("apgd-ce:samples=20,steps=50", "apgd-dlr:samples=20,steps=50")),
    Remedy("alone", ("D2",), ("pgd:steps=40", "pgd:steps=40,loss=cw"), batch_size=1),
    Remedy("logarithm", ("D3",), ("apgd-ce:steps=50", "pgd:steps=40,loss=cw"), view=_as_logits),
    Remedy("rescaled", ("G1", "G5", "G6", "X2"), ("apgd-ce:steps=50", "apgd-t:steps=50"), view=_rescaled),
    Remedy("margin", ("G1", "G5", "K1", "K2", "K5", "X2"), ("pgd:steps=100,loss=cw", "apgd-t")),
    Remedy("gradient-free", ("G1", "G3", "G4", "K10", "X1", "X4"), ("noise", "square:queries=2000")),
)


def called_for(results: Mapping[str, str]) -> Iterator[Remedy]:
    """The remedies that the results of a diagnosis ask for, in order.

    Args:
        results: Result by id of the test.
    """
    for remedy in REMEDIES:
        if any(results.get(test) in (FAILED, WARNING) for test in remedy.tests):
            yield remedy


def applied(remedy: Remedy, subject: Subject) -> dict[str, Any]:
    """Attack the images that still stand, and hand what is found to the subject, which judges it with its own answers.

    Returns:
        The remedy's name and tests, its attacks, how many images it attacked and broke, and why it stopped early.
    """
    said: dict[str, Any] = {"remedy": remedy.name, "tests": list(remedy.tests), "attacks": list(remedy.attacks)}
    before, attacked, why = len(subject.found), 0, ""
    view = _subject(remedy, subject)
    for text in remedy.attacks:
        try:
            images = _standing(subject)
            attacked = max(attacked, len(images))
            outcome = view.attack(text, images)
            if outcome.broken.any():
                rows = outcome.broken.nonzero().squeeze(1)
                subject.counterexample(images.ids[rows], outcome.x_adv[rows], f"{remedy.name}: {text}")
        except RobevalError as error:  # no gradient, or no image left that stands
            why = error.what
    return said | {"attacked": attacked, "broken": len(subject.found) - before, "why": why}


class _View(nn.Module):
    """A model whose logits are shown in another way."""

    def __init__(self, model: Callable[[Tensor], Tensor], show: Callable[[Tensor, Tensor], Tensor], clean: Tensor):
        super().__init__()
        self.model, self.show, self.clean = model, show, clean

    def forward(self, x: Tensor) -> Tensor:
        return self.show(self.model(x), self.clean)


def _standing(subject: Subject) -> Images:
    """Correct images that nothing has broken yet.

    Raises:
        ContractBroken: there is none (D13).
    """
    correct = subject.correct(len(subject.images))
    stands = [k for k, index in enumerate(correct.ids.tolist()) if index not in subject.broken]
    return correct[torch.tensor(stands, dtype=torch.int64, device=correct.x.device)]


def _subject(remedy: Remedy, subject: Subject) -> Subject:
    """The same model as the remedy lets attacks see it, counting into the same passes."""
    s, model = subject, subject.model
    if remedy.view is not None:
        shown = _View(s.model.module, remedy.view, s.clean_logits())
        model = Classifier(shown, s.model.classes, s.model.name, s.model.fingerprint)
    size = remedy.batch_size or s.batch_size
    new = Subject(model, s.images, s.norm, s.eps, s.seed, s.level, randomised=s.randomised, batch_size=size)
    new.classifier = Counted.of(model, s.passes)
    return new
